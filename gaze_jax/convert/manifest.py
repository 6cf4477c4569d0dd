"""The directory of a converted checkpoint, and checksums of all its files.

::

    DIR/
      manifest.json   format_version, the model's config, its sources, a CRC-32 of every file
      params/         Orbax; a folder per leaf, a file per layer of a stacked leaf, uncompressed
      decoder/        config.json, tokenizer and generation files of the language model, unchanged
      vision/         config.json and processor settings of the tower, unchanged; unused.safetensors
      model/          the same, instead of decoder/, if one directory held a whole model

Neither Orbax nor safetensors notices a flipped bit, so every file has a checksum. Files are raw, so that a
checksum needs no decoding and damage can be reported by leaf and layer.
"""

import concurrent.futures
import dataclasses
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gaze_jax.config import from_dict, to_dict
from gaze_jax.convert.shards import read_json
from gaze_jax.errors import UserError
from gaze_jax.models.config import MLLMConfig, VisionConfig
from gaze_jax.stored import NEWEST, check_version, upgrade
from gaze_jax.writing import file_crc

FILE = "manifest.json"
PARAMS = "params"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter as it is stored.

    Attributes:
      dtype: NumPy's name of the dtype.
      shape: the leaf's shape.
      layers: number of files that it is split into, one per index of the first axis; 0 for one file.
    """

    dtype: str
    shape: tuple[int, ...]
    layers: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """The checkpoint that a part was converted from.

    Attributes:
      model_type: model_type in its config.json.
      files: for each safetensors file, its "metadata" and its "tensors" (name -> dtype name).
      left_out: sentences about tensors that were not converted.
      commit: the commit at which it was downloaded from the Hugging Face Hub; None if it was not.
    """

    model_type: str
    files: Mapping[str, Mapping[str, Mapping[str, str]]]
    left_out: Sequence[str] = ()
    commit: str | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
      model: config of a whole model, or of a single image tower.
      leaves: leaves by name, such as "decoder/norm/weight".
      sources: sources by part: "decoder" and "vision", or "model".
      new: leaves that were initialised, not converted.
      files: path in the directory -> CRC-32 in hex, for every file except manifest.json.
    """

    model: MLLMConfig | VisionConfig
    leaves: Mapping[str, Leaf]
    sources: Mapping[str, Source]
    new: tuple[str, ...]
    files: Mapping[str, str]


def leaf_folder(name: str) -> str:
    """Orbax's folder of a leaf in the checkpoint."""
    return f"{PARAMS}/{name.replace('/', '.')}"


def chunk_path(name: str, leaf: Leaf, layer: int | None = None) -> str:
    """The file of a leaf, or of one of its layers."""
    index = [0] * len(leaf.shape)
    if layer is not None:
        index[0] = layer
    return f"{leaf_folder(name)}/{'.'.join(map(str, index)) or '0'}"


def crc_hex(data: bytes | memoryview) -> str:
    """CRC-32 of a buffer; detects any flipped bit and any burst of up to 32 bits."""
    return f"{zlib.crc32(data):08x}"


def _body(manifest: Manifest) -> dict[str, object]:
    kind = "tower" if isinstance(manifest.model, VisionConfig) else "model"
    return {
        "format_version": NEWEST["manifest"],
        "kind": kind,
        "model": to_dict(manifest.model),
        "new": list(manifest.new),
        "sources": {part: _stated(source) for part, source in manifest.sources.items()},
        "leaves": {name: dataclasses.asdict(leaf) for name, leaf in manifest.leaves.items()},
        "files": dict(sorted(manifest.files.items())),
    }


def _stated(source: Source) -> dict[str, object]:
    """The fields of a source, without a commit that it does not have."""
    fields = dataclasses.asdict(source)
    return fields if source.commit else {name: value for name, value in fields.items() if name != "commit"}


def _seal(body: Mapping[str, object]) -> str:
    return crc_hex(json.dumps(body, sort_keys=True).encode())


def write(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json; must be the last file written."""
    body = _body(manifest)
    text = json.dumps(body | {"crc32": _seal(body)}, indent=1)
    (directory / FILE).write_text(text + "\n", encoding="utf-8")


def read(directory: Path) -> Manifest:
    """Read and check manifest.json, of this or an earlier version.

    Raises:
      UserError: it is missing, damaged, or of an unknown version.
    """
    path = directory / FILE
    values = read_json(path)
    version = check_version("manifest", values, str(path))
    if values.pop("crc32", None) != _seal(values):
        raise UserError(f"{path} is not what was written: it is damaged or edited; convert again.")
    # Only now: the seal is of the names that are in the file.
    values = upgrade("manifest", values, version)
    model = values["model"]
    return Manifest(
        model=from_dict(VisionConfig, model) if values["kind"] == "tower" else from_dict(MLLMConfig, model),
        leaves={
            name: Leaf(leaf["dtype"], tuple(leaf["shape"]), leaf["layers"])
            for name, leaf in values["leaves"].items()
        },
        sources={part: Source(**source) for part, source in values["sources"].items()},
        new=tuple(values["new"]),
        files=values["files"],
    )


def label(name: str, layer: int | None) -> str:
    """Name of a file of a leaf in messages."""
    return name if layer is None else f"{name}, layer {layer}"


def _owner(path: str, manifest: Manifest) -> str:
    """Name of the leaf that a file belongs to, or else the file's path."""
    folder = path.rpartition("/")[0]
    return next((name for name in manifest.leaves if leaf_folder(name) == folder), path)


def leaf_files(manifest: Manifest) -> set[str]:
    """Paths of the files that hold values of leaves."""
    return {
        chunk_path(name, leaf, layer)
        for name, leaf in manifest.leaves.items()
        for layer in (range(leaf.layers) if leaf.layers else (None,))
    }


def damaged_files(directory: Path, manifest: Manifest, paths: Iterable[str]) -> list[str]:
    """Names of the damaged files, by leaf for those that belong to one."""

    def problem(path: str) -> str | None:
        try:
            crc = file_crc(directory / path)
        except OSError:
            return f"{_owner(path, manifest)} (file {path} cannot be read)"
        return None if crc == manifest.files[path] else _owner(path, manifest)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return [found for found in pool.map(problem, paths) if found]


def refuse_damage(directory: Path, names: Sequence[str]) -> None:
    """Raise a UserError that lists the damaged files, if there are any."""
    if names:
        raise UserError(
            f"{directory} is damaged: {'; '.join(names)} is not what was written; copy or convert it again."
        )
