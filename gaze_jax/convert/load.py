"""Load any checkpoint: converted, as published, or from a training run."""

from pathlib import Path

import flax.traverse_util
import jax
from jax.sharding import Mesh

from gaze_jax.convert import checkpoint, manifest
from gaze_jax.convert.checkpoint import Converted, flat_leaves, materialise, text_part
from gaze_jax.convert.run import ORIGIN, Plan, plan_directory, read_origin
from gaze_jax.convert.tokenizer_files import read_tokenizer
from gaze_jax.errors import UserError
from gaze_jax.families import check_views
from gaze_jax.models.config import MLLMConfig
from gaze_jax.models.parameters import abstract_params
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train.checkpoint import FOLDER, load_for_inference


def place(plan: Plan, mesh: Mesh) -> Converted:
    """Put a planned checkpoint on a mesh without writing it; host memory holds one leaf at a time.

    Args:
      plan: from :mod:`gaze_jax.convert.run`.
      mesh: the mesh to put the parameters on.

    Raises:
      UserError: the mesh does not divide a parameter, or a value does not fit the plan's dtype.
    """
    placed = {}
    for name, target in flat_leaves(abstract_params(plan.config, mesh)).items():
        values, _ = materialise(plan.leaves[name])
        placed[name] = jax.make_array_from_callback(values.shape, target.sharding, values.__getitem__)
    params = flax.traverse_util.unflatten_dict(placed, sep="/")
    part = text_part(plan.opened)
    files = None if part is None else plan.opened[part].directory
    return Converted(
        plan.config, params, None if files is None else read_tokenizer(files, plan.config), files
    )


def one_device() -> Mesh:
    """Return a mesh of this process's first device."""
    return make_mesh(MeshConfig(data=1), jax.local_devices()[:1])


def load(directory: Path, mesh: Mesh, *, check: bool = True) -> Converted:
    """Load a converted checkpoint, a Hugging Face directory or a run of train.py.

    Args:
      directory: contains manifest.json, or config.json and safetensors files, or checkpoints/.
      mesh: the mesh to put the parameters on.
      check: verify the checksums of a converted checkpoint.

    Raises:
      UserError: the directory is none of these, it is damaged, or the views in its config are invalid.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give a checkpoint.")
    found = _load(directory, mesh, check)
    if isinstance(found.config, MLLMConfig):
        check_views(found.config.views)
    return found


def _load(directory: Path, mesh: Mesh, check: bool) -> Converted:
    if (directory / manifest.FILE).exists():
        return checkpoint.load(directory, mesh, check=check)
    if (directory / FOLDER).is_dir():
        trained = load_for_inference(directory, mesh)
        kept = read_origin(directory)
        part = None if kept is None else text_part(kept.sources)
        files = None if part is None else directory / ORIGIN / part
        return Converted(trained.experiment.model, trained.params, trained.tokenizer.json, files)
    return place(plan_directory(directory), mesh)
