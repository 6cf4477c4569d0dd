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
