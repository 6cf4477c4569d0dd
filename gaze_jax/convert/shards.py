"""Safetensors files, read strictly and written tensor by tensor.

A checkpoint is one ``model.safetensors`` or several shards with an index. The library checks that a file's
offsets cover it without gaps or overlaps. It does not notice a duplicate key, a tensor in two shards or an
index that points outside the directory; these are checked here. Tensors are read one at a time and never
mapped, so that memory holds only what is being converted.
"""

import contextlib
import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from gaze_jax.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".npz", ".npy", ".msgpack", ".h5")
DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes of parameters, by their names in safetensors."""
NAMES: Mapping[str, str] = {dtype.name: name for name, dtype in DTYPES.items()}
"""NumPy's name of a dtype -> safetensors' name."""
_LENGTH = struct.Struct("<Q")
_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Location of a tensor.

    Attributes:
      file: the file that holds it.
      dtype: "F32", "F16" or "BF16", or another name in the file.
      shape: shape as stored.
      offset: offset of its first byte in the file.
      size: size in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"key {key!r} is given twice")
        out[key] = value
    return out


def refuse_pointer(path: Path) -> None:
    """Raise a UserError if a file is what Git leaves in the place of a large one that was not downloaded."""
    try:
        with path.open("rb") as file:
            pointer = file.read(len(_POINTER)) == _POINTER
    except OSError:
        return  # the caller says what is wrong
    if pointer:
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}, or "
            "download the file."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object without duplicate keys.

    Raises:
      UserError: the file is missing, a Git LFS pointer or no JSON object, or has a duplicate key.
    """
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; a checkpoint needs it.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


@dataclasses.dataclass(frozen=True)
class File:
    """One safetensors file.

    Attributes:
      path: the file's path.
      tensors: its tensors by name, in the order of the header.
      metadata: free text, such as ``{"format": "pt"}``.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def open_file(path: Path) -> File:
    """Check a safetensors file and read its header.

    Raises:
      UserError: the file is missing, a Git LFS pointer, truncated or malformed, or has a duplicate key.
    """
    refuse_pointer(path)
    try:
        with safetensors.safe_open(path, framework="numpy"):  # checks offsets and sizes
            pass
        with path.open("rb") as stream:
            (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; download the checkpoint again.") from error
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path} is not a valid safetensors file ({error}); download it again, it may be truncated."
        ) from error
    metadata = header.pop("__metadata__", {})
    start = _LENGTH.size + length
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensors[name] = Tensor(path, entry["dtype"], tuple(entry["shape"]), start + first, last - first)
    return File(path, tensors, metadata)


def _refuse_pickles(directory: Path) -> None:
    found = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
    raise UserError(
        f"{directory} holds no {SINGLE} and no {INDEX}"
        + (
            f", only {', '.join(found)}: such files can run code when opened, so they are not read. Load the "
            "model with transformers where that is safe and call save_pretrained(), which writes safetensors."
            if found
            else "; give a directory with a checkpoint in safetensors."
        )
    )


def _index_files(directory: Path) -> dict[str, str]:
    """Read the index: tensor name -> file name."""
    path = directory / INDEX
    weights = read_json(path).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"{path} has no weight_map; download it again.")
    problems = sorted(
        {
            f"{name} lies in {file!r}, which is not a file name in this directory"
            for name, file in weights.items()
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors")
        }
    )
    if problems:
        raise UserError(f"{path} is refused: {'; '.join(problems)}.")
    return weights


def open_checkpoint(directory: Path) -> tuple[File, ...]:
    """Open the safetensors files of a Hugging Face directory and check them against their index.

    Raises:
      UserError: there are no such files, or files and index disagree; all disagreements are listed.
    """
    single, index = (directory / SINGLE).exists(), (directory / INDEX).exists()
    if single and index:
        raise UserError(
            f"{directory} has both {SINGLE} and {INDEX}, so it is unclear which is meant; remove one."
        )
    if single:
        return (open_file(directory / SINGLE),)
    if not index:
        _refuse_pickles(directory)
    weights = _index_files(directory)
    files = tuple(open_file(directory / name) for name in sorted(set(weights.values())))
    where: dict[str, str] = {}
    problems = []
    for file in files:
        for name in file.tensors:
            if name in where:
                problems.append(f"{name} is in both {where[name]} and {file.path.name}")
            elif weights.get(name) != file.path.name:
                problems.append(f"{name} is in {file.path.name}, the index says {weights.get(name)}")
            where[name] = file.path.name
    problems += [f"{name} is not in {file}" for name, file in weights.items() if name not in where]
    if problems:
        raise UserError(f"{directory / INDEX} does not fit its shards: {'; '.join(problems)}.")
    return files


def read(tensor: Tensor) -> np.ndarray:
    """Read the values of a tensor in its own dtype."""
    values = np.empty(tensor.shape, DTYPES[tensor.dtype])
    read_into(tensor, values)
    return values


def read_into(tensor: Tensor, out: np.ndarray) -> None:
    """Read a tensor into a contiguous array of its dtype and shape.

    Raises:
      UserError: the file became shorter after it was opened.
    """
    data = out.reshape(-1).view(np.uint8).data
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.offset)
        done = 0
        while done < tensor.size:  # one call reads 2 GiB at most
            count = stream.readinto(data[done:])
            if not count:
                raise UserError(f"{tensor.file} ended early; it changed while it was read.")
            done += count


class Writer:
    """Writes one safetensors file; tensors may arrive in any order.

    The header comes first, so names, dtypes and shapes must be known before any value. The byte layout is
    that of the safetensors library: a file read with it and written here is identical.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        """Create ``path`` with the header of ``tensors``, name -> (dtype name, shape)."""
        size = {name: DTYPES[dtype].itemsize for name, (dtype, _) in tensors.items()}
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._place: dict[str, tuple[int, int]] = {}
        end = 0
        for name in sorted(tensors, key=lambda name: (-size[name], tensors[name][0], name)):
            dtype, shape = tensors[name]
            start, end = end, end + size[name] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
            self._place[name] = (start, end - start)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _LENGTH.size)
        self._start = _LENGTH.size + len(text)
        self._missing = set(tensors)
        self._stream = path.open("wb")
        try:
            self._stream.write(_LENGTH.pack(len(text)) + text)
            self._stream.truncate(self._start + end)
            self._stream.flush()
        except OSError:
            with contextlib.suppress(OSError):  # it tries to write again, then closes
                self._stream.close()
            raise

    def write(self, name: str, values: np.ndarray) -> None:
        """Write one tensor; different threads may write different tensors."""
        start, size = self._place[name]
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        if len(data) != size:
            raise ValueError(f"Tensor {name} has {len(data)} bytes, its header says {size}.")
        offset, done = self._start + start, 0
        while done < size:  # one call writes 2 GiB at most
            done += os.pwrite(self._stream.fileno(), data[done:].data, offset + done)
        self._missing.discard(name)

    def close(self) -> None:
        """Finish the file.

        Raises:
          ValueError: a tensor was never written.
        """
        self._stream.close()
        if self._missing:
            raise ValueError(f"Tensors {sorted(self._missing)} were announced and never written.")


@contextlib.contextmanager
def writing(writers: Mapping[str, Writer]) -> Iterator[Mapping[str, Writer]]:
    """Close ``writers`` at the end; after an error, that error takes precedence over theirs."""
    try:
        yield writers
    except BaseException:
        for writer in writers.values():
            with contextlib.suppress(ValueError):
                writer.close()
        raise
    for writer in writers.values():
        writer.close()
