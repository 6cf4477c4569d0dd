"""Files that are written as a whole or not at all, and checksums of files."""

import contextlib
import errno
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from gaze_jax.errors import UserError

_BLOCK = 1 << 20  # stays in the CPU's cache between reading and checksumming
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def full_disk(error: BaseException) -> str | None:
    """Why a disk refused to be written, such as "No space left on device"; None if that is not what happened.

    Libraries wrap such an error in their own, and TensorStore has it as text among many lines.
    """
    cause: BaseException | None = error
    while cause is not None:
        for code in _FULL:
            if (isinstance(cause, OSError) and cause.errno == code) or os.strerror(code) in str(cause):
                return os.strerror(code)
        cause = cause.__cause__ or cause.__context__
    return None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], what: str = "") -> Iterator[Path]:
    """Context for writing a file: it is written beside its place, and takes it when it is complete.

    If that fails, because the disk is full for example, what was there before stays. A pipe or a device is
    written to directly.

    Args:
      path: the file; a link stays one.
      what: what it is, for the message, such as "The clip "; empty for no more than its name.

    Yields:
      Where to write.

    Raises:
      UserError: it cannot be written.
    """
    place = Path(os.path.realpath(path))
    direct = place.exists() and not place.is_file()
    part = place if direct else place.with_name(f"{place.name}.part")
    try:
        yield part
        if not direct:
            part.replace(place)
    except OSError as error:
        raise UserError(
            f"{what}{os.fspath(path)!r} cannot be written ({error.strerror or error})."
        ) from error
    finally:
        if not direct:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, UTF-8 with line feeds, as :func:`replacing` does.

    Raises:
      UserError: the file cannot be written.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def file_crc(path: str | os.PathLike[str]) -> str:
    """CRC-32 of a file, read in blocks."""
    crc, block = 0, memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            crc = zlib.crc32(block[:count], crc)
    return f"{crc:08x}"
