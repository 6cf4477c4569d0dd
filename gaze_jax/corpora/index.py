"""Indexes of large files: where their records begin, computed once and kept.

An index is a few NumPy arrays in the user's cache folder. It is used again only if the file still has the
size and the time of its last change that the index was made for.
"""

import contextlib
import hashlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from gaze_jax.cache_folder import cache_folder
from gaze_jax.corpora import storage
from gaze_jax.writing import file_crc

Arrays = dict[str, np.ndarray]

_VERSION = 1
_KEY = "made_for"


def folder() -> Path:
    """Where indexes are kept."""
    return Path(cache_folder(), "indexes")


def indexed(path: str, kind: str, build: Callable[[str], Arrays]) -> Mapping[str, np.ndarray]:
    """The index of a file, from the cache if it is of the file as it is now.

    A cache that cannot be written or is damaged is no error: the index is built again.

    Args:
      path: the file.
      kind: of the index; part of its name.
      build: makes the arrays from the path; none of them is named "made_for".

    Raises:
      UserError: the file cannot be read.
    """
    size, changed = storage.size_and_stamp(path)
    if changed is None:  # nothing would show that the file was written again
        return build(path)
    stamp = np.array([_VERSION, size, changed], np.int64)
    place = path if storage.is_remote(path) else os.path.realpath(path)
    name = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    cached = folder() / f"{name}.{kind}.npz"
    found = load(cached)
    if _KEY in found and np.array_equal(found.pop(_KEY), stamp):
        return found
    arrays = build(path)
    keep(cached, arrays | {_KEY: stamp})
    return arrays


def load(path: Path) -> Arrays:
    """The arrays that :func:`keep` wrote; none if the file is missing or damaged."""
    # What a damaged zip, npy or stream raises; also a missing one.
    with (
        contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error),
        path.open("rb") as file,
        np.load(file, allow_pickle=False) as found,
    ):
        return {key: found[key] for key in found.files}
    return {}


def keep(path: Path, arrays: Arrays) -> None:
    """Write arrays into the cache folder; one that cannot be written is no error."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as made:
            try:
                np.savez(made, allow_pickle=False, **arrays)
                made.flush()
                os.replace(made.name, path)  # another process may do the same: either result is right
            except BaseException:
                os.unlink(made.name)
                raise


def content_crc(path: str) -> str:
    """CRC-32 of a file's content in hex, computed once and kept as an index is.

    Raises:
      UserError: the file cannot be read.
    """
    return str(indexed(path, "crc", lambda name: {"crc": np.array(_crc(name))})["crc"])


def _crc(path: str) -> str:
    with storage.reading(path):
        if not storage.is_remote(path):
            return file_crc(path)
        crc = 0
        with storage.open_binary(path) as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
        return f"{crc:08x}"
