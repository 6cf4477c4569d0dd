"""The teacher of a distillation: the checkpoint that a run started from, frozen, attended to densely."""

import dataclasses
import json
from pathlib import Path

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from gaze_jax.errors import UserError
from gaze_jax.models import MLLMConfig
from gaze_jax.models.config import DTYPES
from gaze_jax.models.parameters import abstract_params
from gaze_jax.train.config import Experiment
from gaze_jax.writing import write_text

FILE = "teacher.json"
"""In a run's folder: digests of the teacher's parameters, which a resumed run compares."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen model to learn from.

    Attributes:
      config: it, with dense attention and without context tokens.
      params: its parameters in its activation dtype; of the parts that the run does not train only the run
        has a copy.
    """

    config: MLLMConfig = dataclasses.field(metadata={"static": True})
    params: PyTree


def teacher_config(start: MLLMConfig, model: MLLMConfig) -> MLLMConfig:
    """The model ``start`` as the teacher of ``model``.

    It sees what it saw: its own ``visual_scope`` and ``visual_causal``. How tokens are arranged in arrays,
    and how attention is computed, are the run's.

    Raises:
      UserError: it has context tokens, so that without them it is another model.
    """
    if start.gaze.context_tokens:
        raise UserError(
            f"objective.name='distill' needs a teacher without context tokens, and init_from has "
            f"{start.gaze.context_tokens} per view; start from the dense checkpoint that it was made from."
        )
    seen = {name: getattr(start.gaze, name) for name in ("visual_scope", "visual_causal")}
    gaze = dataclasses.replace(model.gaze, top_k=None, context_tokens=0, **seen)
    return dataclasses.replace(model, gaze=gaze)


def abstract_teacher(experiment: Experiment, start: MLLMConfig, mesh: Mesh) -> Teacher:
    """The shapes, dtypes and shardings of a teacher, without computing it.

    Args:
      experiment: the run.
      start: the model of its ``init_from``.
      mesh: the run's mesh.

    Raises:
      UserError: as :func:`teacher_config`.
    """
    config = teacher_config(start, experiment.model)
    dtype = DTYPES[config.dtype]
    params = {
        part: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), tree)
        for part, tree in abstract_params(config, mesh).items()
        if part not in experiment.frozen
    }
    return Teacher(config, params)


def make_teacher(experiment: Experiment, start: MLLMConfig, params: PyTree, mesh: Mesh) -> Teacher:
    """The teacher with the parameters of a checkpoint.

    Args:
      experiment, start, mesh: as in :func:`abstract_teacher`.
      params: the parameters of ``start`` on ``mesh``.
    """
    abstract = abstract_teacher(experiment, start, mesh)
    convert = jax.jit(
        lambda tree: jax.tree.map(lambda leaf, wanted: leaf.astype(wanted.dtype), tree, abstract.params),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract.params),
    )
    return Teacher(abstract.config, convert({part: params[part] for part in abstract.params}))


def check_same(teacher: dict[str, str], workdir: Path, init_from: str) -> None:
    """Compare a teacher with the one that the run began with, or note it if the run begins.

    Args:
      teacher: digest of each parameter, by name.
      workdir: the run's folder.
      init_from: named in the error message.

    Raises:
      UserError: the checkpoint has changed since.
    """
    path = workdir / FILE
    if not path.exists():
        if jax.process_index() == 0:
            write_text(path, json.dumps(teacher, indent=1))
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in {*before, *teacher} if before.get(name) != teacher.get(name))
    if changed:
        raise UserError(
            f"The teacher is not the one that this run began with: {changed[0]} of init_from={init_from} has "
            f"changed ({len(changed)} of {len(teacher)} parameters); restore that checkpoint, or start in a "
            "new workdir."
        )
