"""PNG files without their metadata.

Pillow refuses a PNG whose text or colour profile exceeds a limit or is damaged. Browsers show it, because the
picture does not depend on these.
"""

import io
import struct
import zlib
from typing import BinaryIO

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PICTURE = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""Chunks that the pixels of a still picture depend on."""
_TURNING = (b"eXIf", b"iTXt", b"zTXt", b"tEXt")
"""Chunks that may hold an EXIF orientation, as such or in a text of XMP or of a raw profile."""


def without_metadata(file: BinaryIO) -> io.BytesIO | None:
    """The picture of a PNG file: its chunks of pixels, palette and transparency, and its EXIF if whole.

    Chunks are copied as they are, so that damage to the picture is still found. None if the file is no PNG.
    """
    if file.read(len(_SIGNATURE)) != _SIGNATURE:
        return None
    kept = io.BytesIO()
    kept.write(_SIGNATURE)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        body = file.read(length + 4)  # and the checksum
        intact = len(body) == length + 4 and body[length:] == zlib.crc32(kind + body[:length]).to_bytes(4)
        if kind in _PICTURE or (kind == b"eXIf" and intact):
            kept.write(head + body)
        if kind == b"IEND":
            break
    kept.seek(0)
    return kept


def pixels_intact(file: BinaryIO) -> bool:
    """Whether the chunks of pixels have the checksums that they state, which Pillow does not look at.

    True of other files, and of a chunk that is not all there: that is for the decoder to say.
    """
    file.seek(0)
    if file.read(len(_SIGNATURE)) != _SIGNATURE:
        return True
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            break
        if kind != b"IDAT":
            file.seek(length + 4, io.SEEK_CUR)
            continue
        body = file.read(length + 4)
        if len(body) == length + 4 and body[length:] != zlib.crc32(kind + body[:length]).to_bytes(4):
            return False
    return True


def may_be_turned(file: BinaryIO) -> bool:
    """Whether a PNG file has a chunk that may hold an orientation; only the heads of chunks are read."""
    file.seek(len(_SIGNATURE))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in _TURNING:
            return True
        file.seek(length + 4, io.SEEK_CUR)
    return False
