"""Export a model to directories that transformers loads, tensor by tensor."""

import concurrent.futures
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np

from gaze_jax.config import to_dict
from gaze_jax.convert import shards
from gaze_jax.convert.checkpoint import Config, numpy_dtype
from gaze_jax.convert.manifest import Leaf, Source
from gaze_jax.convert.shards import Tensor
from gaze_jax.convert.source import CONFIG, UNUSED, PartConfig, cast, read_config
from gaze_jax.errors import UserError
from gaze_jax.families import CONVERSIONS, joint_rules, written_as
from gaze_jax.families.table import Conversion, Rule
from gaze_jax.models.config import MLLMConfig, VisionConfig
from gaze_jax.stored import NEWEST

GAZE_TENSORS = "gaze.safetensors"
GAZE_SETTINGS = "gaze.json"
SHARD_BYTES = 5 * 10**9
_DTYPE = ("dtype", "torch_dtype")
_PT = {"format": "pt"}

ReadLayer = Callable[[str, int | None], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to export; its parameters are read only when they are written.

    Attributes:
      config: the config of a whole model, or of a single image tower.
      leaves: the parameters' leaves, by name.
      read: returns the values of a leaf, or of one of its layers.
      sources: the source of each part; empty for a model that was trained here.
      beside: directory with other files of the parts; None if there are none.
      tokenizer: content of tokenizer.json if the model has no such files; None if it has no tokenizer.
    """

    config: Config
    leaves: Mapping[str, Leaf]
    read: ReadLayer
    sources: Mapping[str, Source]
    beside: Path | None
    tokenizer: str | None = None

    @property
    def parts(self) -> dict[str, PartConfig]:
        """Configs of the parts to write: the source's parts, or else a language model and a tower."""
        if isinstance(self.config, VisionConfig):
            return {"vision": self.config}
        if "model" in self.sources:
            whole: dict[str, PartConfig] = {"model": self.config}
            return whole | ({"vision": self.config.tower} if "vision" in self.sources else {})
        parts: dict[str, PartConfig] = {"decoder": self.config.decoder}
        return parts if self.config.vision is None else parts | {"vision": self.config.vision}


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor to write: dtype name, shape, and a function that returns its values."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * shards.DTYPES[self.dtype].itemsize


def _of_rule(model: Model, rule: Rule, dtype: str | None) -> dict[str, _Entry]:
    leaf = model.leaves[rule.leaf]
    target = numpy_dtype(dtype or leaf.dtype)
    shape = rule.tensor_shape(leaf.shape)

    def entry(name: str, layer: int | None) -> _Entry:
        return _Entry(
            shards.NAMES[target.name],
            shape,
            lambda: rule.to_tensor(cast(model.read(rule.leaf, layer), target, name)),
        )

    return {name: entry(name, i if rule.layers else None) for i, name in enumerate(rule.tensors)}


def _of_file(path: Path, dtype: str | None) -> dict[str, _Entry]:
    """Tensors that were stored next to the parameters."""

    def entry(name: str, tensor: Tensor) -> _Entry:
        target = numpy_dtype(dtype or shards.DTYPES[tensor.dtype].name)
        return _Entry(
            shards.NAMES[target.name], tensor.shape, lambda: cast(shards.read(tensor), target, name)
        )

    return {name: entry(name, tensor) for name, tensor in shards.open_file(path).tensors.items()}


def _of_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, _Entry]:
    def entry(values: np.ndarray) -> _Entry:
        return _Entry(shards.NAMES[values.dtype.name], values.shape, lambda: values)

    return {name: entry(values) for name, values in arrays.items()}


def _part_entries(
    model: Model, conversion: Conversion, config: PartConfig, beside: Path | None, dtype: str | None
) -> dict[str, _Entry]:
    """All tensors of a part, by canonical name."""
    entries: dict[str, _Entry] = {}
    for rule in conversion.rules(config):
        entries |= _of_rule(model, rule, dtype)
    for name, original in conversion.implied(config).items():
        entries[name] = entries[original]
    if beside is None:
        entries |= _of_arrays(conversion.defaults(config))
    elif (beside / UNUSED).exists():
        entries |= _of_file(beside / UNUSED, dtype)
    return entries


def _plan(
    entries: Mapping[str, _Entry],
    conversion: Conversion,
    config: PartConfig,
    source: Source | None,
    whole: bool,
) -> dict[str, tuple[dict[str, str], dict[str, _Entry]]]:
    """File name -> metadata and tensors; the source's own files if they held exactly these tensors."""
    if source is not None and whole:
        return {
            file: (
                dict(content["metadata"]),
                {name: entries[conversion.canonical(name)] for name in content["tensors"]},
            )
            for file, content in source.files.items()
            if content["tensors"]  # skip a shard of which no tensor was converted
        }
    implied = conversion.implied(config)
    parts: list[dict[str, _Entry]] = [{}]
    filled = 0
    for name, entry in entries.items():
        if name in implied:
            continue
        if parts[-1] and filled + entry.size > SHARD_BYTES:
            parts.append({})
            filled = 0
        parts[-1][name] = entry
        filled += entry.size
    if len(parts) == 1:
        return {shards.SINGLE: (_PT, parts[0])}
    return {
        f"model-{i:05d}-of-{len(parts):05d}.safetensors": (_PT, part) for i, part in enumerate(parts, start=1)
    }


def _write_files(
    directory: Path,
    plan: Mapping[str, tuple[Mapping[str, str], Mapping[str, _Entry]]],
    progress: Callable[[int], None],
) -> None:
    writers = {}
    for file, (metadata, entries) in plan.items():
        header = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
        writers[file] = shards.Writer(directory / file, header, metadata)
    jobs = [(file, name, entry) for file, (_, entries) in plan.items() for name, entry in entries.items()]

    def write(job: tuple[str, str, _Entry]) -> None:
        file, name, entry = job
        writers[file].write(name, entry.read())
        progress(entry.size)

    with shards.writing(writers), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, jobs))


def _write_index(directory: Path, plan: Mapping[str, tuple[Mapping[str, str], Mapping[str, _Entry]]]) -> None:
    """Write an index of the shards, unless the source's index is still correct."""
    if list(plan) == [shards.SINGLE]:
        return
    where = {name: file for file, (_, entries) in plan.items() for name in entries}
    path = directory / shards.INDEX
    if path.exists() and shards.read_json(path).get("weight_map") == where:
        return
    total = sum(entry.size for _, entries in plan.values() for entry in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _write_json(path, index)


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_config(directory: Path, config: dict[str, object], entries: Mapping[str, _Entry]) -> None:
    """Write config.json, with the tensors' dtype unless they have several."""
    dtypes = {shards.DTYPES[entry.dtype].name for entry in entries.values()}
    if len(dtypes) == 1:
        (dtype,) = dtypes
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
        # A whole model's config.json contains one per part, which repeats the dtype.
        for name, inner in config.items():
            if isinstance(inner, dict):
                config[name] = {key: dtype if key in _DTYPE else value for key, value in inner.items()}
    _write_json(directory / CONFIG, config)


def _recast(written: Mapping[str, _Entry], source: Source | None) -> bool:
    """Whether any tensor's dtype differs from that in the source."""
    files = {} if source is None else source.files
    came = {name: dtype for content in files.values() for name, dtype in content["tensors"].items()}
    return any(came.get(name, entry.dtype) != entry.dtype for name, entry in written.items())


def _export_part(
    model: Model,
    part: str,
    config: PartConfig,
    directory: Path,
    dtype: str | None,
    progress: Callable[[int], None],
) -> None:
    source = model.sources.get(part)
    beside = None if source is None or model.beside is None else model.beside / part
    if source is None:
        assert not isinstance(config, MLLMConfig), "a whole model without a source is written part by part"
        model_type = written_as(config)
    else:
        model_type = source.model_type
    conversion = CONVERSIONS[model_type]
    entries = _part_entries(model, conversion, config, beside, dtype)
    original = None if beside is None else read_config(beside)
    if original is None:
        assert conversion.write_config is not None, "decoders and towers have it"
        own = conversion.write_config(config)
    else:
        own = dict(conversion.own_config(original))
    plan = _plan(entries, conversion, config, source, whole=own == original)
    directory.mkdir(exist_ok=True)
    _write_files(directory, plan, progress)
    if beside is not None:
        for path in beside.iterdir():
            if path.name != UNUSED:
                shutil.copyfile(path, directory / path.name)
    elif part == "decoder" and model.tokenizer is not None:
        (directory / "tokenizer.json").write_text(model.tokenizer, encoding="utf-8")
    written = {name: entry for _, entries in plan.values() for name, entry in entries.items()}
    if own != original or _recast(written, source):
        _write_config(directory, own, written)
        (directory / shards.INDEX).unlink(missing_ok=True)
    _write_index(directory, plan)


def tensors_beside(config: MLLMConfig, parts: Collection[str]) -> tuple[Rule, ...]:
    """Rules of the parameters that no directory of transformers has a place for: those of gaze.safetensors.

    Args:
      config: the model.
      parts: the parts that are written. A whole model has its projector and newline, but no context tokens.
    """
    if config.vision is None:
        return ()
    rules = joint_rules(config.gaze.context_tokens)
    return tuple(rule for rule in rules if "model" not in parts or rule.leaf == "context")


def export(
    model: Model,
    directory: Path,
    *,
    dtype: str | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a model for transformers.

    A single part is written to ``directory`` itself. So is a whole model whose source was one directory; if
    its tower came from another one, that is written to ``directory/vision``, and context tokens, which
    transformers does not know, to ``directory/gaze.safetensors``. Any other whole model becomes
    ``directory/decoder`` and ``directory/vision``, with the projector and the other joining parameters in
    ``directory/gaze.safetensors``. Settings are in ``directory/gaze.json``.

    Args:
      model: the model to write.
      directory: an existing, empty directory.
      dtype: dtype of all tensors; None keeps each tensor's own.
      progress: called with the number of bytes of every written tensor.

    Raises:
      UserError: transformers has no class for a part, or a value does not fit ``dtype``.
    """
    parts = model.parts
    places = {part: "." if len(parts) == 1 or part == "model" else part for part in parts}
    for part, config in parts.items():
        _export_part(model, part, config, directory / places[part], dtype, progress)
    if isinstance(model.config, MLLMConfig):
        entries: dict[str, _Entry] = {}
        for rule in tensors_beside(model.config, parts):
            entries |= _of_rule(model, rule, dtype)
        if entries:
            _write_files(directory, {GAZE_TENSORS: (_PT, entries)}, progress)
        config = model.config if dtype is None else dataclasses.replace(model.config, param_dtype=dtype)
        settings = {"format_version": NEWEST["export"], "model": to_dict(config), "parts": places}
        _write_json(directory / GAZE_SETTINGS, settings)


_PLACES = (
    {"decoder": "."},
    {"decoder": "decoder", "vision": "vision"},
    {"model": "."},
    {"model": ".", "vision": "vision"},
)


def part_directories(directory: Path) -> dict[str, Path]:
    """The directory of each part that :func:`export` wrote.

    Raises:
      UserError: gaze.json names directories that export would not use.
    """
    settings = directory / GAZE_SETTINGS
    if not settings.exists():
        return {"vision": directory}
    places = shards.read_json(settings).get("parts")
    if places not in _PLACES:
        raise UserError(f"{settings} has parts={places!r}, which is not what was written; export again.")
    return {part: directory / place for part, place in places.items()}
