"""Pixels of views: resized, padded and cut into tiles as uint8, to keep queued data small.

Sizes are (height, width). Resizing is Pillow's bicubic filter on 8 bits, as in SigLIP's and both models'
processors; other libraries' bicubic filters differ by whole grey levels.
"""

import math

import numpy as np
import PIL.Image

from gaze_jax.core.pixels import LEVELS

Size = tuple[int, int]
Picture = np.ndarray | PIL.Image.Image
"""An image, uint8 [height, width, 3], or of Pillow's mode RGB, which is resized without a copy of it."""

BLACK = 0
GREY = 127
"""int(0.5 * 255): the mean of SigLIP's normalisation, truncated to 8 bits."""

STRIP_PIXELS = 4_000_000
"""Pixels that :func:`resize_on_square` pads at a time; a frame of 1920x1080 is one strip."""


def size_of(image: Picture) -> Size:
    """(height, width) of an image."""
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    return image.shape[0], image.shape[1]


def check_image(image: Picture, name: str) -> Size:
    """(height, width) of an image; ``name`` is the subject of the error message.

    Raises:
      ValueError: the image is not uint8 [height, width, 3] or RGB, or has no pixels.
    """
    if isinstance(image, PIL.Image.Image) and image.mode == "RGB" and 0 not in image.size:
        return size_of(image)
    if isinstance(image, PIL.Image.Image):
        raise ValueError(
            f"{name} must be RGB with at least one pixel; this is Pillow's {image.mode} "
            f"{image.height}x{image.width}."
        )
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{name} must be a uint8 array [height, width, 3], not a {type(image).__name__}.")
    shape = image.shape
    if image.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ValueError(
            f"{name} must be uint8 [height, width, 3] with at least one pixel; this is {image.dtype} "
            f"{list(shape)}."
        )
    return size_of(image)


def normalise(images: np.ndarray) -> np.ndarray:
    """uint8 of any shape to float32 in [-1, 1] as for SigLIP: x / 255, then mean and deviation 0.5.

    Bit-identical to transformers' processors without torchvision.

    Raises:
      ValueError: not uint8.
    """
    if images.dtype != np.uint8:
        raise ValueError(f"Only uint8 pixels can be normalised; these are {images.dtype}.")
    return np.take(LEVELS, images)


def resize(image: Picture, size: Size) -> np.ndarray:
    """An image as uint8 [*size, 3], ignoring aspect ratio; an array itself if it has that size."""
    if not isinstance(image, PIL.Image.Image):
        if size_of(image) == size:
            return image
        image = PIL.Image.fromarray(image)
    return np.asarray(image.resize(size[::-1], PIL.Image.Resampling.BICUBIC))


def pad(image: np.ndarray, size: Size, colour: int) -> np.ndarray:
    """Centre the image in uint8 [*size, 3] of one grey; an odd pixel of padding is below or to the right.

    The image itself if it has that size.
    """
    if image.shape[:2] == size:
        return image
    height, width = image.shape[:2]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    padded = np.full((*size, 3), colour, np.uint8)
    padded[top : top + height, left : left + width] = image
    return padded


def resize_on_square(image: Picture, side: int, colour: int) -> np.ndarray:
    """Pad an image to a square and resize it to uint8 [side, side, 3], without building the square.

    The result is bit-identical. Pillow resizes rows first, then columns, with 8 bits in between, so rows of
    padding need no resizing. The square of a long strip would fill the memory.
    """
    image = np.asarray(image)
    longer = max(image.shape[:2])
    step = max(1, STRIP_PIXELS // longer)
    strips = [image[top : top + step] for top in range(0, len(image), step)]
    rows = [resize(pad(strip, (len(strip), longer), colour), (len(strip), side)) for strip in strips]
    return resize(pad(np.concatenate(rows), (longer, side), colour), (side, side))


def best_canvas(size: Size, canvases: tuple[Size, ...]) -> Size:
    """The canvas that shows the most pixels of an image; among equals, the one with the least unused area.

    Remaining ties go to the first canvas. This is the rule of LLaVA-NeXT's "anyres".
    """
    height, width = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        # A canvas larger than the image adds no detail.
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - canvas[0] * canvas[1]

    return max(canvases, key=merit)


def fitted(size: Size, canvas: Size) -> Size:
    """Size of an image scaled to fit ``canvas``, aspect ratio kept; rounded up, so at least one pixel."""
    height, width = size
    scale_y, scale_x = canvas[0] / height, canvas[1] / width
    if scale_x < scale_y:
        return min(math.ceil(height * scale_x), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * scale_y), canvas[1])


def cut_tiles(image: Picture, canvas: Size, side: int, colour: int) -> np.ndarray:
    """Scale and centre the image on ``canvas``; cut it into tiles uint8 [n, side, side, 3], row by row."""
    padded = pad(resize(image, fitted(size_of(image), canvas)), canvas, colour)
    rows, columns = canvas[0] // side, canvas[1] // side
    tiles = padded.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return tiles.copy().reshape(rows * columns, side, side, 3)
