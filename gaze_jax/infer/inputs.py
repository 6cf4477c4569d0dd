"""Media as people have them in Python: paths, bytes, open files, Pillow's images, arrays."""

import os
from collections.abc import Sequence
from typing import BinaryIO, cast

import numpy as np
import PIL.Image

from gaze_jax.data.sample import Frames
from gaze_jax.errors import UserError
from gaze_jax.media.images import check_pixels, decode_image, read_image, reading_pictures, upright_rgb
from gaze_jax.media.video import FrameSampling, decode_video, open_video

Picture = str | os.PathLike[str] | bytes | BinaryIO | PIL.Image.Image | np.ndarray
Film = str | os.PathLike[str] | bytes | BinaryIO | Frames | Sequence[Picture]


def as_image(source: Picture, name: str) -> np.ndarray:
    """uint8 [height, width, 3] of an image, by the rule of :func:`gaze_jax.media.images.upright_rgb`.

    Arrays are returned as they are; the processor checks them.

    Args:
      source: a path, the content of a file, a file opened for reading bytes, an image of Pillow, or an array.
      name: names the image in messages, such as "images[0]".

    Raises:
      UserError: it is nothing of these, or cannot be decoded.
    """
    if isinstance(source, np.ndarray):
        return source
    if isinstance(source, str | os.PathLike):
        return read_image(source)
    if isinstance(source, PIL.Image.Image):
        with reading_pictures(name, "Image", b""):
            check_pixels(name, "Image", *source.size)
            return upright_rgb(source.copy())  # decoding would change the caller's
    data = _content(source, name)
    if data is None:
        raise UserError(
            f"{name} is a {type(source).__name__}; give a path, bytes, an open file, an image of Pillow, or "
            "a uint8 array [height, width, 3]."
        )
    return decode_image(data, name)


def as_video(source: Film, sampling: FrameSampling, name: str) -> Frames:
    """The sampled frames of a video, or the frames as they are given.

    Args:
      source: a path of a file or of a folder of frames, the content of a file, a file opened for reading
        bytes, a clip or array of frames, or a list of frames of which each may be any image.
      sampling: which frames to take of a file.
      name: names the video in messages, such as "videos[0]".

    Raises:
      UserError: it is nothing of these, or cannot be decoded.
    """
    if isinstance(source, str | os.PathLike):
        return open_video(source, sampling)
    data = _content(source, name)
    if data is not None:
        return decode_video(data, sampling, name)
    if isinstance(source, list | tuple):
        return [as_image(frame, f"{name}[{number}]") for number, frame in enumerate(source)]
    if hasattr(source, "__len__") and hasattr(source, "__iter__") and not isinstance(source, dict | set):
        return cast(Frames, source)
    raise UserError(
        f"{name} is a {type(source).__name__}; give a path, bytes, an open file, or frames: a uint8 array "
        "[frames, height, width, 3] or a list of images."
    )


def _content(source: object, name: str) -> bytes | None:
    """The bytes of a file that is given as such or open; None if ``source`` is neither."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    read = getattr(source, "read", None)
    if read is None:
        return None
    data = read()
    if not isinstance(data, bytes):
        raise UserError(f"{name} is a file opened as text; open it with mode 'rb'.")
    return data
