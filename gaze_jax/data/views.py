"""Images and frames to views."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import PIL.Image

from gaze_jax.core.layout import VisualLayout


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """One unit."""

    images: np.ndarray
    taps: np.ndarray
    weights: np.ndarray
    newlines: bool
    corners: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Views:
    """The units of an image or a video."""

    units: tuple[View, ...]
    end_newline: bool


_TABLE = ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)


def normalise(images: np.ndarray) -> np.ndarray:
    """To [-1, 1]."""
    return _TABLE[images]


def _square(layout: VisualLayout, image: np.ndarray) -> View:
    size, grid = layout.image_size, layout.grid
    pixels = image
    if image.shape[:2] != (size, size):
        pixels = np.asarray(PIL.Image.fromarray(image).resize((size, size), PIL.Image.Resampling.BICUBIC))
    taps = np.zeros((grid, grid, 4), np.int32)
    taps[..., 0] = np.arange(grid * grid).reshape(grid, grid)
    weights = np.zeros((grid, grid, 4), np.float32)
    weights[..., 0] = 1
    return View(pixels[None], taps, weights, False, (0.0, 0.0, float(image.shape[1]), float(image.shape[0])))


def image_views(layout: VisualLayout, image: np.ndarray, *, alone: bool) -> Views:
    """Views of an image."""
    return Views((_square(layout, image),), False)


def video_views(layout: VisualLayout, frames: Iterable[np.ndarray]) -> Views:
    """Views of a video."""
    return Views(tuple(_square(layout, frame) for frame in frames), False)
