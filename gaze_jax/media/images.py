"""Read image files: a few formats, a size limit that is checked before decoding, no network.

Pictures and frames of every kind become RGB by one rule, :func:`upright`.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

import numpy as np
import PIL.Image

from gaze_jax.errors import UserError
from gaze_jax.media.png import may_be_turned, pixels_intact, without_metadata
from gaze_jax.media.probe import HEAD, check_file, read_head, video_kind

T = TypeVar("T")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 100_000_000
"""Maximum width x height to decode; a PNG file of 0.4 MB can have 400 megapixels."""

_ORIENTATION = 0x0112
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> how to make the stored picture upright."""
_SWAPPED = (5, 6, 7, 8)
"""Orientations that swap height and width."""


def check_pixels(name: str, kind: str, width: int, height: int) -> None:
    """Refuse a picture too large to decode; ``kind`` ("Image", "Video") starts the error message.

    Raises:
      UserError: the picture has more than :data:`MAX_PIXELS`.
    """
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{kind} {name!r} has {width}x{height} pixels, more than the limit of {MAX_PIXELS}; "
            "make it smaller."
        )


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture that a viewer shows, of mode RGB: the one rule for images and frames.

    It is turned as its EXIF orientation says. 16-bit grey is scaled to 8 bits. What is transparent shows
    white, whatever colour is stored there. Colour profiles are not applied, as in Pillow's ``convert("RGB")``
    and transformers.

    Raises:
      OSError, SyntaxError, ValueError: the picture cannot be decoded.
    """
    image.load()  # before its metadata: a PNG may have some behind its pixels
    turn = _TURNS.get(_orientation(image))
    turned = image if turn is None else image.transpose(turn)
    if turned.mode.startswith("I"):  # 16 bits: convert() would clip instead of scale
        grey = np.clip(np.asarray(turned, np.int64) >> 8, 0, 255).astype(np.uint8)
        return PIL.Image.fromarray(grey).convert("RGB")
    if turned.has_transparency_data:
        seen = turned.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return turned if turned.mode == "RGB" else turned.convert("RGB")


def upright_rgb(image: PIL.Image.Image) -> np.ndarray:
    """:func:`upright` as uint8 [height, width, 3]."""
    return np.asarray(upright(image))


def _orientation(image: PIL.Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none or what is there cannot be read."""
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:  # each kind of damage to EXIF data raises another type, and the picture is whole
        return 1
    return found if type(found) is int and found in _TURNS else 1


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """:func:`read_picture` as uint8 [height, width, 3]."""
    return np.asarray(read_picture(path))


def read_picture(path: str | os.PathLike[str]) -> PIL.Image.Image:
    """Decode an image file: upright and of mode RGB; the first frame if it is animated.

    Raises:
      UserError: the path is a URL, or the file is missing, empty, a video, not in :data:`FORMATS`, larger
        than :data:`MAX_PIXELS` or damaged. One sentence that names the file.
    """
    name = os.fspath(path)
    check_file(name, "Image")
    with reading_pictures(name, "Image"), open(name, "rb") as file:
        return _decode(file, name, upright)


def check_image(path: str | os.PathLike[str]) -> None:
    """Refuse what :func:`read_image` refuses, in less time and memory.

    All of a file's data are decoded, as a header does not show that pixels are missing. But nothing is
    converted, and the pixels of a JPEG are computed at an eighth of its size.

    Raises:
      UserError: as :func:`read_image`.
    """
    name = os.fspath(path)
    check_file(name, "Image")
    with reading_pictures(name, "Image"), open(name, "rb") as file:
        _decode(file, name, _load_small)


def _load_small(image: PIL.Image.Image) -> None:
    image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
    image.load()


def check_image_data(data: bytes, name: str) -> None:
    """:func:`check_image` of a file's content; ``name`` names it in messages."""
    if not data:
        raise UserError(f"Image {name!r} is empty (0 bytes).")
    with reading_pictures(name, "Image", data[:HEAD]):
        _decode(io.BytesIO(data), name, _load_small)


def decode_image(data: bytes, name: str) -> np.ndarray:
    """:func:`read_image` of a file's content; ``name`` names it in messages."""
    return np.asarray(decode_picture(data, name))


def decode_picture(data: bytes, name: str) -> PIL.Image.Image:
    """:func:`read_picture` of a file's content; ``name`` names it in messages."""
    if not data:
        raise UserError(f"Image {name!r} is empty (0 bytes).")
    with reading_pictures(name, "Image", data[:HEAD]):
        return _decode(io.BytesIO(data), name, upright)


def image_size(file: BinaryIO, name: str) -> tuple[int, int]:
    """(height, width) of what :func:`read_image` gives for a file, mostly without decoding it.

    Damage behind the header is not noticed. ``name`` names the file in messages.

    Raises:
      UserError: as :func:`read_image`, of what a header shows.
    """
    head = file.read(HEAD)
    file.seek(0)
    if not head:
        raise UserError(f"Image {name!r} is empty (0 bytes).")
    with reading_pictures(name, "Image", head), open_picture(file, FORMATS, "Image", name) as image:
        width, height = image.size
        # Pillow decodes a PNG to look for what may stand behind its pixels.
        turned = image.format != "PNG" or may_be_turned(file)
        return (width, height) if turned and _orientation(image) in _SWAPPED else (height, width)


def _decode(file: BinaryIO, name: str, read: Callable[[PIL.Image.Image], T]) -> T:
    """``read`` of the opened picture, without its metadata if these are damaged."""
    found = _decode_leniently(file, name, read)
    if not pixels_intact(file):
        raise UserError(
            f"Image {name!r} is damaged: a checksum of its pixels is wrong; copy or download it again."
        )
    return found


def _decode_leniently(file: BinaryIO, name: str, read: Callable[[PIL.Image.Image], T]) -> T:
    try:
        with open_picture(file, FORMATS, "Image", name) as image:
            return read(image)
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError):
        # The damage, or a limit of Pillow, may concern only the metadata, which nothing here needs.
        file.seek(0)
        pixels = without_metadata(file)
        if pixels is None:
            raise
        with open_picture(pixels, ("PNG",), "Image", name) as image:
            return read(image)


@contextlib.contextmanager
def open_picture(
    file: str | BinaryIO, formats: tuple[str, ...], kind: str, name: str
) -> Iterator[PIL.Image.Image]:
    """Open an image of some ``formats`` and check its size; ``kind`` and ``name`` are for error messages."""
    # Pillow warns of damaged tags that nobody asked for, and of pictures that are large but within our limit.
    with warnings.catch_warnings(action="ignore"), PIL.Image.open(file, formats=formats) as image:
        check_pixels(name, kind, *image.size)
        yield image


@contextlib.contextmanager
def reading_pictures(name: str, kind: str, head: bytes | None = None) -> Iterator[None]:
    """Context for decoding a picture or an animation: Pillow's errors become one-sentence UserErrors.

    Args:
      name: the file's path, for messages, and to look at its beginning if ``head`` is None.
      kind: "Image" or "Video", for messages.
      head: the first bytes of data that is no file.
    """
    try:
        yield
    except UserError:
        raise
    except PIL.Image.DecompressionBombError as error:
        raise UserError(
            f"{kind} {name!r} has more pixels than the limit of {MAX_PIXELS}; make it smaller."
        ) from error
    except PIL.UnidentifiedImageError as error:
        if video_kind(read_head(name) if head is None else head) is not None:
            raise UserError(f"{kind} {name!r} is a video; use --video, or 'video' in a record.") from error
        raise UserError(f"{kind} {name!r} is none of {', '.join(FORMATS)}; convert it to one.") from error
    except (OSError, EOFError, SyntaxError, ValueError) as error:
        raise UserError(f"{kind} {name!r} cannot be decoded ({error}); the file is damaged.") from error
