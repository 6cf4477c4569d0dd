"""The type of a media file and whether it is complete, from its bytes and without a decoder.

Decoders are lenient: FFmpeg reads a truncated Matroska file as a shorter video, and Pillow a truncated GIF as
one with fewer pictures. The containers state their sizes, so truncation is detected before decoding.
"""

import os
import re
import struct
from typing import BinaryIO

from gaze_jax.errors import UserError

HEAD = 16
"""Number of bytes that identify a file's type."""
VIDEO_FORMATS = ("MP4", "MOV", "MKV", "WEBM", "AVI")
"""Containers that state their size. In streams such as MPEG-TS truncation cannot be detected."""

# Brands of ISO media files that hold pictures.
_STILLS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1", b"crx ", b"jxl ")
_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_LATER_BOXES = (b"moof", b"mfra", b"styp", b"sidx", b"ssix", b"emsg", b"prft", b"pdin", b"uuid", b"meta")
_BOXES = _FIRST_BOXES + _LATER_BOXES
_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_ENTERED = (_SEGMENT, _CLUSTER)


def is_url(name: str) -> bool:
    """Whether a path that does not exist looks like a URL; a drive letter does not."""
    return re.match(r"^[a-zA-Z][a-zA-Z0-9+.-]+:", name) is not None and not os.path.exists(name)


def check_file(name: str, kind: str) -> None:
    """Refuse anything but a non-empty local file; ``kind`` ("Image", "Video") starts the error message.

    Raises:
      UserError: a URL, or a missing or empty file.
    """
    if is_url(name):
        raise UserError(f"{kind} {name!r} looks like a URL; give the path of a local file.")
    if not os.path.isfile(name):
        raise UserError(f"{kind} {name!r} is not a file; check the path.")
    if os.path.getsize(name) == 0:
        raise UserError(f"{kind} {name!r} is empty (0 bytes); write or download it again.")


def video_kind(head: bytes) -> str | None:
    """FFmpeg's name of the container, from the first :data:`HEAD` bytes of a file; None if unknown."""
    if head[4:8] in _FIRST_BOXES and head[8:12] not in _STILLS:
        return "mov"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    return None


def is_static_image(head: bytes) -> bool:
    """Whether these first bytes are of a JPEG, PNG or BMP: formats without animation."""
    bitmap = head[:2] == b"BM" and head[6:10] == bytes(4)
    return bitmap or head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))


def is_animation(head: bytes) -> bool:
    """Whether these first bytes are of a GIF or WEBP, which may be animated."""
    return head[:6] in (b"GIF87a", b"GIF89a") or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def read_head(name: str) -> bytes:
    """Read the first :data:`HEAD` bytes of a file, or all of a shorter one."""
    with open(name, "rb") as file:
        return file.read(HEAD)


def check_whole(name: str, kind: str) -> None:
    """Check that a video file is as long as its container states.

    MP4 and MOV state the size of every box, Matroska and WebM of every element, AVI of every RIFF chunk. A
    file written in pieces (a fragmented MP4 or a Matroska segment of unknown size) counts as complete if it
    ends between two pieces.

    Args:
      name: path of the file.
      kind: the result of :func:`video_kind`.

    Raises:
      UserError: bytes are missing, or (Matroska) an element is followed by something that is not an element.
    """
    walk = {"mov": _boxes_end, "matroska": _elements_end, "avi": _riff_end}[kind]
    size = os.path.getsize(name)
    with open(name, "rb") as file:
        end = walk(file, size)
    if end > size:
        raise UserError(
            f"Video {name!r} is cut short: its container goes on to byte {end}, but the file has {size}; "
            "copy or download it again."
        )
    if end < size and kind == "matroska":
        raise UserError(
            f"Video {name!r} is damaged at byte {end} of {size}, where no Matroska element begins; "
            "copy or download it again."
        )


def _boxes_end(file: BinaryIO, size: int) -> int:
    """End of the boxes of an MP4; ``size`` if they end earlier or run to the end of the file."""
    position = 0
    while position + 16 <= size:
        file.seek(position)
        length, box, long = struct.unpack(">I4sQ", file.read(16))
        length = long if length == 1 else length
        if box not in _BOXES or length < 8:  # it runs to the end of the file, or is junk after the last box
            return size
        position += length
    return max(position, size)


def _riff_end(file: BinaryIO, size: int) -> int:
    """End of the RIFF chunks of an AVI; a file over 1 GB has several."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        tag, length = struct.unpack("<4sI", file.read(8))
        if tag != b"RIFF" or length in (0, 0xFFFFFFFF):  # a writer that could not seek back states no length
            return size
        if position + 8 + length > size:
            return position + 8 + length
        position += 8 + length + length % 2
    return size


def _elements_end(file: BinaryIO, size: int) -> int:
    """End of the elements of a Matroska file, entering the segment and its clusters.

    If less than ``size``, no element begins there. A segment or cluster of unknown size ends with the file.
    """
    position, end = 0, size
    while position < min(end, size):
        file.seek(position)
        header = file.read(12)
        try:
            first = 8 - header[0].bit_length()  # leading zeros of a byte: how many more bytes follow it
            second = 8 - header[first + 1].bit_length()
        except IndexError:
            return size + 1  # truncated within this header
        if first > 3 or second > 7:
            return position
        if len(header) < first + second + 2:
            return size + 1
        name = int.from_bytes(header[: first + 1])
        length = int.from_bytes(header[first + 1 : first + second + 2]) & ((1 << 7 * (second + 1)) - 1)
        unknown = length == (1 << 7 * (second + 1)) - 1
        if unknown and name not in _ENTERED:
            return position
        position += first + second + 2
        if unknown:
            continue
        if position + length > size:
            return position + length
        if name == _SEGMENT:
            end = position + length
        if name not in _ENTERED:
            position += length
    return max(end, size)


def animation_delays(name: str) -> list[int]:
    """How long each picture of a GIF or WEBP is shown, in milliseconds; empty for a still WEBP.

    Raises:
      UserError: the file ends inside a picture.
    """
    with open(name, "rb") as file:
        data = file.read()
    try:
        return _webp_delays(data) if data[:4] == b"RIFF" else _gif_delays(data)
    except IndexError as error:
        raise UserError(
            f"Video {name!r} is cut short: it ends inside a picture; copy or download it again."
        ) from error


def _gif_delays(data: bytes) -> list[int]:
    def after_blocks(position: int) -> int:
        while data[position]:
            position += 1 + data[position]
        return position + 1

    def colours(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    delays, delay = [], 0
    position = 13 + colours(data[10])
    # The end mark may be missing: the pictures before it are whole. Other bytes between blocks are skipped.
    while position < len(data) and (mark := data[position]) != 0x3B:
        if mark == 0x21:  # an extension; a graphic control describes the picture that follows
            if data[position + 1] == 0xF9:
                delay = 10 * int.from_bytes(data[position + 4 : position + 6], "little")
            position = after_blocks(position + 2)
        elif mark == 0x2C:
            position = after_blocks(position + 11 + colours(data[position + 9]))
            delays.append(delay)
            delay = 0
        else:
            position += 1
    return delays


def _webp_delays(data: bytes) -> list[int]:
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data) + 1:  # some writers leave out the byte that makes the last chunk's length even
        raise IndexError(end)
    delays, position = [], 12
    while position + 8 <= end:
        name, length = struct.unpack_from("<4sI", data, position)
        if name == b"ANMF":
            delays.append(int.from_bytes(data[position + 20 : position + 23], "little"))
        position += 8 + length + length % 2
        if position > len(data) + 1:
            raise IndexError(position)
    return delays
