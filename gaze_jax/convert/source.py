"""Open a Hugging Face directory, check it against its family's table, and read it leaf by leaf."""

import dataclasses
import fnmatch
import functools
import re
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import flax.linen as nn
import numpy as np

from gaze_jax.convert import shards
from gaze_jax.convert.checkpoint import Pending, flat_leaves, numpy_dtype
from gaze_jax.convert.manifest import Leaf, Source
from gaze_jax.convert.shards import DTYPES, NAMES, Tensor
from gaze_jax.errors import UserError
from gaze_jax.families import CONVERSIONS, feature_tower, model_type_of
from gaze_jax.families.table import Conversion, Json, Part, Rule, copy
from gaze_jax.models.config import DecoderConfig, MLLMConfig, VisionConfig
from gaze_jax.models.parameters import boxed_params

COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIG = "config.json"
UNUSED = "unused.safetensors"
TOWER = "vision/"
"""Prefix of the names of the tower's leaves."""
KEPT = (
    CONFIG,
    shards.INDEX,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
"""Files that are copied along with the weights."""

PartConfig = DecoderConfig | VisionConfig | MLLMConfig
KINDS: Mapping[Part, str] = {
    "decoder": "a language model",
    "vision": "an image tower",
    "model": "a whole multimodal model",
}


@functools.cache
def leaf_shapes(config: PartConfig) -> Mapping[str, tuple[int, ...]]:
    """Name -> shape of every parameter of a part."""
    whole = MLLMConfig(config, None) if isinstance(config, DecoderConfig) else config
    return {name: leaf.shape for name, leaf in flat_leaves(nn.meta.unbox(boxed_params(whole))).items()}


def expected_tensors(rules: Iterable[Rule], config: PartConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this config must hold."""
    shapes = leaf_shapes(config)
    return {name: rule.tensor_shape(shapes[rule.leaf]) for rule in rules for name in rule.tensors}


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checked Hugging Face directory.

    Attributes:
      directory: its path.
      model_type, conversion: its key and value in CONVERSIONS.
      config: config of the part that is converted.
      rules: rules of all parameters it holds; those of the part, without the tower if that is elsewhere.
      files: its safetensors files.
      used: canonical name -> tensor, for tensors in the table.
      unused: canonical name -> tensor, for tensors that are stored next to the parameters.
      left_out: sentences about tensors that are not converted.
      remarks: sentences about settings that are ignored.
    """

    directory: Path
    model_type: str
    conversion: Conversion
    config: PartConfig
    rules: tuple[Rule, ...]
    files: tuple[shards.File, ...]
    used: Mapping[str, Tensor]
    unused: Mapping[str, Tensor]
    left_out: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def has_tower(self) -> bool:
        """Whether its parameters include the image tower."""
        return any(rule.leaf.startswith(TOWER) for rule in self.rules)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about the conversion."""
        return self.left_out + self.remarks

    @property
    def source(self) -> Source:
        """Its entry in the manifest; names as in the files, so that they can be written again."""
        kept = {self.conversion.canonical(name) for name in (*self.used, *self.unused)}
        kept |= set(self.conversion.implied(self.config))
        files = {}
        for file in self.files:
            names = {
                name: tensor.dtype
                for name, tensor in file.tensors.items()
                if self.conversion.canonical(name) in kept
            }
            files[file.path.name] = {"metadata": dict(file.metadata), "tensors": names}
        return Source(self.model_type, files, self.left_out, commit_of(self.directory))


def _sort(
    conversion: Conversion, config: PartConfig, files: Iterable[shards.File]
) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[str, ...]]:
    """Tensors that are used, tensors that are only stored, and notes on those left out."""
    used: dict[str, Tensor] = {}
    unused: dict[str, Tensor] = {}
    left: dict[str, int] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            canonical = conversion.canonical(name)
            reasons = (
                why for glob, why in conversion.left_out.items() if fnmatch.fnmatchcase(canonical, glob)
            )
            if (reason := next(reasons, None)) is not None:
                left[reason] = left.get(reason, 0) + 1
                continue
            group = unused if conversion.unused(config, canonical) else used
            if canonical in group:
                raise UserError(f"{file.path} has {canonical} under two names; remove one.")
            group[canonical] = tensor
    return used, unused, tuple(f"{count} tensors not converted: {why}." for why, count in left.items())


def _check_implied(
    conversion: Conversion, config: PartConfig, used: dict[str, Tensor], directory: Path
) -> None:
    """Drop the copy of a tied tensor from ``used``, after comparing it with the original."""
    for name, original in conversion.implied(config).items():
        if name not in used or original not in used:
            continue
        copy, first = used.pop(name), used[original]
        same = copy.dtype == first.dtype and copy.shape == first.shape
        if not same or not np.array_equal(_bits(shards.read(copy)), _bits(shards.read(first))):
            raise UserError(
                f"{directory}: config.json ties the embeddings but {name} differs from {original}; set "
                "tie_word_embeddings to false if they are meant to differ."
            )


def _bits(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1).view(np.uint8)


def _check_tensors(opened: Opened) -> None:
    """Check names, shapes and dtypes; report all problems at once."""
    wanted = expected_tensors(opened.rules, opened.config)
    problems = []
    for name in sorted({*wanted, *opened.used}):
        tensor = opened.used.get(name)
        if tensor is None:
            problems.append(f"{name} {list(wanted[name])} is missing")
        elif name not in wanted:
            problems.append(f"{name} {list(tensor.shape)} is unexpected")
        elif tensor.shape != wanted[name]:
            problems.append(f"{name} is {list(tensor.shape)} and should be {list(wanted[name])}")
        elif tensor.dtype not in DTYPES:
            problems.append(f"{name} is of dtype {tensor.dtype} and should be one of {', '.join(DTYPES)}")
    problems += [
        f"{name} is of dtype {tensor.dtype} and should be one of {', '.join(DTYPES)}"
        for name, tensor in sorted(opened.unused.items())
        if tensor.dtype not in DTYPES
    ]
    if problems:
        raise UserError(
            f"{opened.directory} does not fit its config.json ({opened.model_type}): {'; '.join(problems)}. "
            "Nothing was converted."
        )


def commit_of(directory: Path) -> str | None:
    """The commit at which the Hub's client downloaded a directory: the folder's name in its cache."""
    where = directory.resolve()
    return where.name if COMMIT.fullmatch(where.name) and where.parent.name == "snapshots" else None


def read_config(directory: Path) -> Json:
    """Read ``config.json`` of a Hugging Face directory; code it points to (``auto_map``) is never run."""
    return shards.read_json(directory / CONFIG)


def _read_part(
    directory: Path, conversion: Conversion, values: Json, feature_layer: int, tower: VisionConfig | None
) -> PartConfig:
    """The part that ``config.json`` describes, up to the features that are used."""
    try:
        if conversion.tower_elsewhere:
            return conversion.read_config(values, tower)
        config = conversion.read_config(values)
        return feature_tower(config, feature_layer) if isinstance(config, VisionConfig) else config
    except ValueError as error:
        raise UserError(f"{directory / CONFIG}: {error}") from error


def _rules(conversion: Conversion, config: PartConfig, names: Iterable[str]) -> tuple[Rule, ...]:
    """The family's table, without the tower if the family allows that and the file has none of it."""
    rules = conversion.rules(config)
    if not conversion.tower_elsewhere or conversion.names is None:
        return rules
    if any(conversion.canonical(name).startswith(conversion.names.vision) for name in names):
        return rules
    return tuple(rule for rule in rules if not rule.leaf.startswith(TOWER))


def open_directory(
    directory: Path,
    *,
    part: Part | None = None,
    feature_layer: int = -2,
    tower: VisionConfig | None = None,
) -> Opened:
    """Open and check a Hugging Face directory; only headers are read.

    Args:
      directory: contains config.json and safetensors files.
      part: the part that it must be; None accepts any.
      feature_layer: for a tower, see :func:`gaze_jax.families.feature_tower`.
      tower: config of the tower up to its features, for a whole model whose config.json only names its tower.

    Raises:
      UserError: its family is unknown, it is another part, or tensors do not fit (all of them are listed).
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give one with config.json and safetensors files.")
    values = read_config(directory)
    kind = model_type_of(values, str(directory / CONFIG))
    conversion = CONVERSIONS[kind]
    if part is not None and conversion.part != part:
        raise UserError(f"{directory} is {KINDS[conversion.part]} but {KINDS[part]} is needed here.")
    config = _read_part(directory, conversion, values, feature_layer, tower)
    files = shards.open_checkpoint(directory)
    rules = _rules(conversion, config, (name for file in files for name in file.tensors))
    used, unused, left_out = _sort(conversion, config, files)
    _check_implied(conversion, config, used, directory)
    opened = Opened(
        directory, kind, conversion, config, rules, files, used, unused, left_out, conversion.remarks(values)
    )
    _check_tensors(opened)
    return opened


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Convert ``values`` to another dtype.

    Raises:
      UserError: a finite value becomes infinite.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        out = values.astype(dtype)
    lost = np.isinf(out.astype(np.float32)) & np.isfinite(values.astype(np.float32))
    if lost.any():
        raise UserError(f"{name} has values too large for {dtype.name}; choose another --dtype.")
    return out


def pending_leaves(opened: Opened, dtype: str | None = None) -> dict[str, Pending]:
    """All leaves of the part, to be read when they are written.

    Args:
      opened: the checkpoint.
      dtype: dtype of all leaves; None keeps each leaf's own.

    Raises:
      UserError: layers of one leaf have several dtypes and ``dtype`` is None.
    """
    shapes = leaf_shapes(opened.config)
    leaves = {}
    for rule in opened.rules:
        tensors = [opened.used[name] for name in rule.tensors]
        found = {DTYPES[tensor.dtype].name for tensor in tensors}
        if dtype is None and len(found) > 1:
            raise UserError(
                f"{opened.directory}: {rule.tensor} is {' and '.join(sorted(found))} in different layers, "
                "which are stored as one array; choose one with --dtype."
            )
        target = numpy_dtype(dtype or found.pop())

        leaf = Leaf(target.name, shapes[rule.leaf], rule.layers)
        leaves[rule.leaf] = Pending(leaf, functools.partial(_fill, rule, tensors))
    return leaves


_scratch = threading.local()


def _scratch_array(tensor: Tensor) -> np.ndarray:
    """A reusable buffer of this thread for one tensor: new memory pages cost as much as reading."""
    if getattr(_scratch, "data", np.empty(0)).size < tensor.size:
        _scratch.data = np.empty(tensor.size, np.uint8)
    return _scratch.data[: tensor.size].view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def _fill(rule: Rule, tensors: Sequence[Tensor], out: np.ndarray, layer: int) -> None:
    """Read one tensor into a layer of its leaf."""
    tensor = tensors[layer]
    if rule.layout == "same" and DTYPES[tensor.dtype] == out.dtype:
        shards.read_into(tensor, out)
        return
    values = _scratch_array(tensor)
    shards.read_into(tensor, values)
    copy(out, rule.to_leaf(cast(values, out.dtype, rule.tensors[layer])))


def copy_beside(opened: Opened, directory: Path, dtype: str | None = None) -> None:
    """Copy configs, tokenizer and processor files, and write unused tensors, into ``directory``.

    Args:
      opened: the checkpoint.
      directory: the directory to create.
      dtype: dtype of the unused tensors; None keeps each tensor's own.
    """
    directory.mkdir()
    for name in KEPT:
        if (opened.directory / name).is_file():
            shutil.copyfile(opened.directory / name, directory / name)
    if opened.unused:
        stored = {name: DTYPES[tensor.dtype].name for name, tensor in opened.unused.items()}
        entries = {
            name: (NAMES[dtype or stored[name]], tensor.shape) for name, tensor in opened.unused.items()
        }
        writers = {UNUSED: shards.Writer(directory / UNUSED, entries, {})}
        with shards.writing(writers):
            for name, tensor in opened.unused.items():
                target = numpy_dtype(dtype or stored[name])
                writers[UNUSED].write(name, cast(shards.read(tensor), target, name))
