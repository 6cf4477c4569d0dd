"""The files of a corpus, on this machine or in a bucket: ranges of bytes, sizes, names in a folder.

A path is remote if it begins with ``gs://``, ``s3://`` or another of :data:`PROTOCOLS`; fsspec reads it, from
the ``remote`` extra. Addresses of the web are not among them: not every server reads by ranges, or says when
a file was written. Only users name remote paths, never a record (``records.relative`` sees to it).
"""

import contextlib
import hashlib
import os
import posixpath
import re
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from gaze_jax.errors import UserError, first_line

PROTOCOLS = ("gs", "gcs", "s3", "s3a", "memory")
"""What remote paths begin with; "memory" is fsspec's file system in the memory of a process."""

_CHUNK = 1 << 24
_EXTRAS = {"gs": "remote", "gcs": "remote", "s3": "s3", "s3a": "s3", "memory": "remote"}
# What changes with an object's content, by the names that file systems give it.
_STAMPS = ("generation", "ETag", "etag", "mtime", "LastModified", "updated", "created")


def is_remote(path: str) -> bool:
    """Whether a path is read from elsewhere.

    Raises:
      UserError: it is an address of another protocol.
    """
    if "://" not in path:
        return False  # at once: records are read by the thousand
    found = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+)://", path)
    if found is None or os.path.exists(path):
        return False
    if found[1] not in PROTOCOLS:
        known = ", ".join(f"{protocol}://" for protocol in PROTOCOLS if protocol != "memory")
        raise UserError(f"{path} is an address that is not read; give a local path, or one of {known}.")
    return True


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Context for reading a file: what goes wrong becomes a UserError of one sentence.

    A local file raises OSError only; what is raised for a remote one depends on who stores it.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if not is_remote(path):
            raise UserError(f"{path} cannot be read ({error.strerror or first_line(error)}).") from error
        raise UserError(_sentence(path, error)) from error
    except Exception as error:
        if not is_remote(path):
            raise
        raise UserError(_sentence(path, error)) from error


def _sentence(path: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        protocol = path.split("://")[0]
        why = first_line(error).rstrip(".")
        return f"{protocol}:// needs a package ({why}): pip install 'gaze-jax[{_EXTRAS[protocol]}]'."
    if isinstance(error, FileNotFoundError):
        return f"{path} is not there; check the address."
    if isinstance(error, PermissionError):
        return f"{path} may not be read with your credentials ({first_line(error).rstrip('.')})."
    return f"{path} cannot be read ({first_line(error).rstrip('.')})."


def _system(path: str) -> tuple[Any, str]:
    """The file system of a remote path, and the path in it."""
    import fsspec  # an extra

    return fsspec.core.url_to_fs(path)


def join(folder: str, name: str) -> str:
    """The path of a name below a folder."""
    if not is_remote(folder):
        return os.path.join(folder, name)
    protocol, _, rest = folder.partition("://")
    return f"{protocol}://{posixpath.join(rest, name)}"


def parent(path: str) -> str:
    """The folder of a file."""
    if not is_remote(path):
        return os.path.dirname(path)
    protocol, _, rest = path.partition("://")
    return f"{protocol}://{posixpath.dirname(rest)}"


def open_binary(path: str) -> BinaryIO:
    """Open a file for reading; it can seek. Call it, and read, within :func:`reading`."""
    if not is_remote(path):
        return open(path, "rb")
    system, inner = _system(path)
    file: BinaryIO = system.open(inner, "rb")
    return file


def read_range(path: str, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset`` on, or fewer if the file ends.

    Raises:
      UserError: the file cannot be read.
    """
    if is_remote(path):
        with reading(path):
            system, inner = _system(path)
            return bytes(system.cat_file(inner, start=offset, end=offset + size)) if size else b""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or first_line(error)}).") from error


def read_all(path: str) -> bytes:
    """All of a remote file.

    Raises:
      UserError: the file cannot be read.
    """
    with reading(path):
        system, inner = _system(path)
        return bytes(system.cat_file(inner))


def size(path: str) -> int:
    """The number of bytes of a file.

    Raises:
      UserError: the file cannot be read.
    """
    return size_and_stamp(path)[0]


def size_and_stamp(path: str) -> tuple[int, int | None]:
    """A file's size in bytes, and a number that changes when it is written again; None if there is none.

    Raises:
      UserError: the file cannot be read.
    """
    with reading(path):
        if not is_remote(path):
            state = os.stat(path)
            return state.st_size, state.st_mtime_ns
        system, inner = _system(path)
        found = system.info(inner)
    if found.get("size") is None:
        raise UserError(f"{path} is no file; give the address of one.")
    stamps = [str(found[name]) for name in _STAMPS if found.get(name) is not None]
    digest = hashlib.sha256("\n".join(stamps).encode()).digest()
    return int(found["size"]), int.from_bytes(digest[:7], "little") if stamps else None


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[BinaryIO]:
    """Context with a local file, or with a copy of a remote one, which goes away with it.

    Raises:
      UserError: the file cannot be read, or ends before its size.
    """
    with reading(path), contextlib.ExitStack() as stack:
        file = stack.enter_context(open_binary(path))
        if is_remote(path):
            copy = stack.enter_context(tempfile.TemporaryFile())
            while block := file.read(_CHUNK):
                copy.write(block)
            if copy.tell() != size(path):
                raise UserError(f"{path} ended early while it was read; start again.")
            copy.flush()
            file = copy
        yield file


def names(folder: str) -> list[str] | None:
    """The names of what is in a remote folder, sorted; None if it is no folder.

    Raises:
      UserError: it cannot be read.
    """
    with reading(folder):
        system, inner = _system(folder)
        if not system.isdir(inner):
            return None
        return sorted({posixpath.basename(entry.rstrip("/")) for entry in system.ls(inner, detail=False)})


def matches(pattern: str) -> list[str]:
    """The remote files that a pattern such as ``gs://bucket/shards/*.tar`` stands for, sorted.

    Raises:
      UserError: they cannot be listed.
    """
    with reading(pattern):
        system, inner = _system(pattern)
        protocol = pattern.partition("://")[0]
        return sorted(f"{protocol}://{name.lstrip('/')}" for name in system.glob(inner))
