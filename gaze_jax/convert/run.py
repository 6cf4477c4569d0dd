"""The work of convert.py: open, check, write, report."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import flax.linen as nn
import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from gaze_jax.config import from_dict
from gaze_jax.convert import checkpoint, manifest, shards
from gaze_jax.convert.checkpoint import Config, Pending, flat_leaves, numpy_dtype, pending_array
from gaze_jax.convert.export import (
    GAZE_SETTINGS,
    GAZE_TENSORS,
    Model,
    export,
    part_directories,
    tensors_beside,
)
from gaze_jax.convert.manifest import Leaf
from gaze_jax.convert.source import (
    CONFIG,
    KINDS,
    UNUSED,
    Opened,
    cast,
    copy_beside,
    open_directory,
    pending_leaves,
    read_config,
)
from gaze_jax.errors import UserError
from gaze_jax.families import check_views, conversion_of, feature_tower, joint_rules
from gaze_jax.families.table import Rule
from gaze_jax.models.config import DTYPES, DecoderConfig, GazeConfig, MLLMConfig, VisionConfig
from gaze_jax.models.parameters import boxed_params, init_variables
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.stored import check_version, upgrade
from gaze_jax.train.checkpoint import FOLDER, load_for_inference


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checkpoint of this project that is ready to be written; no tensor is in memory yet.

    Attributes:
      config: the config of a whole model, or of a single image tower.
      leaves: every parameter.
      opened: the source Hugging Face directories, by part.
      new: leaves that are initialised, not converted.
      dtype: the requested dtype; None keeps each tensor's own.
    """

    config: Config
    leaves: Mapping[str, Pending]
    opened: Mapping[str, Opened]
    new: tuple[str, ...] = ()
    dtype: str | None = None


class _Dtypes(TypedDict):
    dtype: str
    param_dtype: str


def _stored(leaves: Mapping[str, Pending]) -> _Dtypes:
    """Settings of a model that computes in the dtype of its embeddings."""
    stored = leaves["decoder/embedding"].leaf.dtype
    return {"dtype": stored if stored in DTYPES else "float32", "param_dtype": stored}


def _text_model(opened: Opened, leaves: Mapping[str, Pending], **fields: Any) -> MLLMConfig:
    """Config of a whole model with this language model."""
    assert isinstance(opened.config, DecoderConfig), "opened as a decoder"
    fields = {"vision": None, "gaze": GazeConfig(context_tokens=0), **fields}
    return MLLMConfig(opened.config, **_stored(leaves), **fields)


def _all_leaves(opened: Mapping[str, Opened], dtype: str | None) -> dict[str, Pending]:
    return {name: leaf for part in opened.values() for name, leaf in pending_leaves(part, dtype).items()}


def plan_directory(
    directory: Path, *, dtype: str | None = None, feature_layer: int = -2, vision: Path | None = None
) -> Plan:
    """Plan the conversion of one Hugging Face directory, or of an exported directory.

    Args:
      directory: a language model, an image tower or a whole multimodal model, or a directory with gaze.json.
      dtype: dtype of all parameters; None keeps each one's own.
      feature_layer: the layer of a tower whose output is used.
      vision: the image tower of a whole model that lacks one, or whose config.json does not describe it.

    Raises:
      UserError: the directory is of no known kind, or it is damaged.
    """
    if (directory / manifest.FILE).exists():
        raise UserError(f"{directory} is already converted; --format=hf converts it back for transformers.")
    exported = (directory / GAZE_SETTINGS).exists()
    conversion = None if exported else conversion_of(read_config(directory), str(directory / CONFIG))
    if vision is not None and (conversion is None or not conversion.tower_elsewhere):
        what = "an export of this project" if conversion is None else KINDS[conversion.part]
        whole = "" if conversion is None or conversion.part != "model" else " with its image tower"
        raise UserError(f"--vision has no effect: {directory} is {what}{whole}; drop it.")
    if conversion is None:
        return _plan_export(directory, dtype)
    if conversion.part == "model":
        opened = _open_whole(directory, vision)
        leaves = _all_leaves(opened, dtype)
        config = opened["model"].config
        assert isinstance(config, MLLMConfig), "opened as a whole model"
        return Plan(dataclasses.replace(config, **_stored(leaves)), leaves, opened, dtype=dtype)
    part = open_directory(directory, feature_layer=feature_layer)
    leaves = pending_leaves(part, dtype)
    if isinstance(part.config, VisionConfig):
        return Plan(part.config, leaves, {"vision": part}, dtype=dtype)
    return Plan(_text_model(part, leaves), leaves, {"decoder": part}, dtype=dtype)


def _described_tower(directory: Path) -> VisionConfig:
    """The tower in a directory's config.json, up to the penultimate layer; the weights may be missing."""
    where = directory / CONFIG
    values = read_config(directory)
    conversion = conversion_of(values, str(where))
    if conversion.part != "vision":
        raise UserError(f"{directory} is not an image tower; give one with --vision.")
    try:
        return feature_tower(conversion.read_config(values), -2)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _open_whole(directory: Path, vision: Path | None, tower: VisionConfig | None = None) -> dict[str, Opened]:
    """Open a whole model: one directory, or two where the first lacks the image tower.

    Args:
      directory: the model's directory.
      vision: directory of the tower's config.json, and of its weights if ``directory`` lacks them.
      tower: config of the tower up to its features, if it is already known.
    """
    if vision is not None and not vision.is_dir():
        raise UserError(f"{vision} is not a directory; give that of an image tower with --vision.")
    if tower is None and vision is not None:
        tower = _described_tower(vision)
    model = open_directory(directory, part="model", tower=tower)
    if model.has_tower:
        return {"model": model}
    if vision is None:
        values = read_config(directory)
        field = "mm_vision_tower_aux_list" if "mm_vision_tower_aux_list" in values else "mm_vision_tower"
        raise UserError(
            f"{directory} holds no image tower; its {field} names {values.get(field)!r}: convert it with "
            "convert.py and give that tower's directory with --vision."
        )
    return {"model": model, "vision": open_directory(vision, part="vision")}


def _joint_leaves(
    path: Path, config: MLLMConfig, rules: Sequence[Rule], dtype: str | None
) -> dict[str, Pending]:
    """Read the parameters of ``rules``, such as projector and context tokens, from gaze.safetensors."""
    shapes = {name: leaf.shape for name, leaf in flat_leaves(nn.meta.unbox(boxed_params(config))).items()}
    tensors = dict(shards.open_file(path).tensors)
    leaves, problems = {}, []
    for rule in rules:
        tensor = tensors.pop(rule.tensor, None)
        want = rule.tensor_shape(shapes[rule.leaf])
        if tensor is None or tensor.shape != want or tensor.dtype not in shards.DTYPES:
            have = "missing" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"
            problems.append(f"{rule.tensor} is {have} and should be {list(want)}")
            continue
        values = rule.to_leaf(shards.read(tensor))
        leaves[rule.leaf] = pending_array(cast(values, numpy_dtype(dtype or values.dtype.name), rule.tensor))
    problems += [f"{name} is unexpected" for name in tensors]
    if problems:
        raise UserError(f"{path} does not fit {GAZE_SETTINGS}: {'; '.join(problems)}.")
    return leaves


def _plan_export(directory: Path, dtype: str | None) -> Plan:
    settings = shards.read_json(directory / GAZE_SETTINGS)
    where = directory / GAZE_SETTINGS
    version = check_version("export", settings, str(where))
    try:
        settings = upgrade("export", settings, version)
        config = from_dict(MLLMConfig, settings["model"])
        check_views(config.views)
        places = part_directories(directory)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where} is not what was written ({error}); export the model again.") from error
    opened = _open_whole_export(places, config) if "model" in places else _open_parts(places, config)
    for part, found in opened.items():
        whole = found.config
        for name in ("decoder", "vision", "views") if isinstance(whole, MLLMConfig) else (part,):
            described = getattr(whole, name) if isinstance(whole, MLLMConfig) else whole
            if described != getattr(config, name):
                raise UserError(
                    f"{where} describes another {name} than {found.directory / 'config.json'} does."
                )
    leaves = _all_leaves(opened, dtype)
    if rules := tensors_beside(config, opened):
        leaves |= _joint_leaves(directory / GAZE_TENSORS, config, rules, dtype)
    if dtype is not None:
        config = dataclasses.replace(config, param_dtype=dtype)
    return Plan(config, leaves, opened, dtype=dtype)


def _open_parts(places: Mapping[str, Path], config: MLLMConfig) -> dict[str, Opened]:
    """Open the directories of a model that was exported part by part."""
    opened = {"decoder": open_directory(places["decoder"], part="decoder")}
    if config.vision is not None:
        total = open_directory(places["vision"], part="vision", feature_layer=-1).config
        assert isinstance(total, VisionConfig), "opened as a tower"
        layer = config.vision.depth - total.depth - 1
        opened["vision"] = open_directory(places["vision"], part="vision", feature_layer=layer)
    return opened


def _open_whole_export(places: Mapping[str, Path], config: MLLMConfig) -> dict[str, Opened]:
    """Open the directories of a model that was exported as a whole."""
    vision = places.get("vision")
    return _open_whole(places["model"], vision, config.vision if vision is None else None)


def compose(
    llm: Path,
    vision: Path,
    *,
    gaze: GazeConfig,
    dtype: str | None = None,
    feature_layer: int = -2,
    seed: int = 0,
) -> Plan:
    """Plan a new multimodal model from a language model and an image tower.

    Args:
      llm, vision: Hugging Face directories.
      gaze: config of regions, context tokens and selection.
      dtype: dtype of all parameters; None keeps each one's own and gives new ones the language model's.
      feature_layer: the layer of the tower whose output is used.
      seed: seed of the new parameters: projector, newline, context tokens.

    Raises:
      UserError: a directory is of the wrong kind or damaged, or the regions do not fit the tower.
    """
    opened = {
        "decoder": open_directory(llm, part="decoder"),
        "vision": open_directory(vision, part="vision", feature_layer=feature_layer),
    }
    leaves = _all_leaves(opened, dtype)
    try:
        config = _text_model(opened["decoder"], leaves, vision=opened["vision"].config, gaze=gaze)
    except ValueError as error:
        raise UserError(str(error)) from error
    new = [rule.leaf for rule in joint_rules(gaze.context_tokens)]

    def init(key: jax.Array) -> dict[str, jax.Array]:
        flat = flat_leaves(nn.meta.unbox(init_variables(config, key)))
        return {name: flat[name] for name in new}

    values = jax.device_get(jax.jit(init)(jax.random.key(seed)))
    leaves |= {name: pending_array(value) for name, value in values.items()}
    return Plan(config, leaves, opened, tuple(new), dtype)


def write_plan(plan: Plan, directory: Path, progress: Callable[[int], None] = lambda count: None) -> None:
    """Write the checkpoint completely or not at all.

    Raises:
      UserError: ``directory`` exists, or cannot be written.
    """
    sources = {part: opened.source for part, opened in plan.opened.items()}
    # The size of one shard and one leaf; shards are never in memory, so this allows for a second leaf.
    shard = max((file.path.stat().st_size for o in plan.opened.values() for file in o.files), default=0)
    memory = shard + max(leaf.nbytes for leaf in plan.leaves.values())
    with checkpoint.new_directory(directory) as partial:
        for part, opened in plan.opened.items():
            copy_beside(opened, partial / part, plan.dtype)
        checkpoint.write(
            partial, plan.config, plan.leaves, sources=sources, new=plan.new, memory=memory, progress=progress
        )


def open_model(directory: Path) -> Model:
    """Open a converted checkpoint, or the newest one of a run of train.py, for export.

    Raises:
      UserError: the directory is neither, or it is damaged.
    """
    if (directory / manifest.FILE).exists():
        found = manifest.read(directory)
        others = sorted(set(found.files) - manifest.leaf_files(found))  # leaves are checked as they are read
        manifest.refuse_damage(directory, manifest.damaged_files(directory, found, others))

        def read(name: str, layer: int | None) -> np.ndarray:
            return checkpoint.read_layer(directory, found, name, layer)

        return Model(found.model, found.leaves, read, found.sources, directory)
    if (directory / FOLDER).is_dir():
        return _open_run(directory)
    raise UserError(
        f"{directory} is neither a converted checkpoint ({manifest.FILE}) nor a run of train.py ({FOLDER}/)."
    )


ORIGIN = "origin"
"""Folder of a run with what it kept of the checkpoint that it started from (``convert.origin``)."""


def read_origin(workdir: Path) -> manifest.Manifest | None:
    """The checked manifest of what a run kept; None if it started from new parameters.

    Raises:
      UserError: a file is missing or damaged.
    """
    folder = workdir / ORIGIN
    if not folder.is_dir():
        return None
    kept = manifest.read(folder)
    manifest.refuse_damage(folder, manifest.damaged_files(folder, kept, sorted(kept.files)))
    return kept


def _open_run(directory: Path) -> Model:
    trained = load_for_inference(directory, make_mesh(MeshConfig(data=1), jax.local_devices()[:1]))
    values = {name: np.asarray(leaf) for name, leaf in flat_leaves(trained.params).items()}
    leaves = {
        name: Leaf(str(value.dtype), value.shape, value.shape[0] if "/layers/" in name else 0)
        for name, value in values.items()
    }

    def read(name: str, layer: int | None) -> np.ndarray:
        return values[name] if layer is None else values[name][layer]

    kept = read_origin(directory)
    if kept is None:
        return Model(trained.experiment.model, leaves, read, {}, None, trained.tokenizer.json)
    return Model(trained.experiment.model, leaves, read, kept.sources, directory / ORIGIN)


@contextmanager
def show_progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr, or one line at the end if that is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("converting", total=total)
        yield lambda count: bar.advance(task, count)


def summary(plan: Plan) -> str:
    """A readable summary of what a plan will write."""
    size = sum(leaf.nbytes for leaf in plan.leaves.values())
    count = sum(int(np.prod(leaf.leaf.shape)) for leaf in plan.leaves.values())
    lines = [f"{count:,} parameters in {len(plan.leaves)} arrays, {size / 1e9:.2f} GB"]
    for part, opened in plan.opened.items():
        lines.append(f"{part}: {opened.model_type}, {len(opened.used)} tensors of {opened.directory}")
        if opened.unused:
            lines.append(f"  stored but not used: {len(opened.unused)} tensors")
        lines += [f"  {note}" for note in opened.notes]
    if plan.new:
        lines.append(f"new, initialised: {', '.join(plan.new)}")
    return "\n".join(lines)


def save(plan: Plan, target: Path) -> None:
    """Run :func:`write_plan` with progress on stderr and a summary on stdout."""
    start = time.perf_counter()
    with show_progress(sum(leaf.nbytes for leaf in plan.leaves.values())) as progress:
        write_plan(plan, target, progress)
    print(f"{summary(plan)}\n{target}: written in {time.perf_counter() - start:.1f} s", flush=True)


def convert_back(source: Path, target: Path, *, dtype: str | None = None) -> None:
    """Write a converted checkpoint or a trained run for transformers, with progress on stderr.

    Raises:
      UserError: see :func:`open_model` and :func:`gaze_jax.convert.export.export`.
    """
    start = time.perf_counter()
    model = open_model(source)
    for part, came in model.sources.items():
        for sentence in came.left_out:
            print(f"{part}: {sentence}", flush=True)
    size = sum(
        int(np.prod(leaf.shape)) * numpy_dtype(dtype or leaf.dtype).itemsize for leaf in model.leaves.values()
    )
    size += sum(path.stat().st_size for path in source.glob(f"*/{UNUSED}"))
    with checkpoint.new_directory(target) as partial, show_progress(size) as progress:
        export(model, partial, dtype=dtype, progress=progress)
    print(f"{target}: written for transformers in {time.perf_counter() - start:.1f} s", flush=True)
