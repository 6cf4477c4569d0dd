"""scikit-learn's handwritten digits: a fixed train/test split, augmented and ready to draw."""

import dataclasses
import functools

import numpy as np
import PIL.Image

from gaze_jax.corpora import bundled

NATIVE = 8
"""Side in pixels of the original digit images."""

VARIANTS = 12
"""Number of distorted copies per digit image from which augmentation chooses."""

_SPLIT_SEED = 20_260_101  # not the run's seed: the split must be the same in every run
_INK = 0.25  # minimum alpha of an ink pixel


@dataclasses.dataclass(frozen=True, eq=False)
class Glyphs:
    """Digit images of one split.

    Attributes:
      alpha: float32 [N, V, side, side], opacity in 0..1; V variants of each of N digit images.
      ink: int32 [N, V, 4], (x0, y0, x1, y1) of the ink inside the square, x1 and y1 exclusive.
      index: int32 [N], index of the image in scikit-learn's data.
      of_digit: for each digit 0..9, the indices n of its images.
    """

    alpha: np.ndarray
    ink: np.ndarray
    index: np.ndarray
    of_digit: tuple[np.ndarray, ...]


@functools.cache
def _originals() -> tuple[np.ndarray, np.ndarray]:
    """The images, uint8 [1797, 8, 8] in 0..255, and their labels, int64 [1797]."""
    images, labels = bundled.digits()
    return np.round(images * (255 / 16)).astype(np.uint8), labels


def split_indices(split: str, test_fraction: float) -> np.ndarray:
    """Sorted indices of the digit images of "train" or "test": disjoint, stratified, fixed."""
    _, labels = _originals()
    rng = np.random.Generator(np.random.PCG64(_SPLIT_SEED))
    chosen = []
    for digit in range(10):
        order = rng.permutation(np.nonzero(labels == digit)[0])
        cut = round(len(order) * test_fraction)
        chosen.append(order[:cut] if split == "test" else order[cut:])
    return np.sort(np.concatenate(chosen))


def _distortion(rng: np.random.Generator, scale: float) -> np.ndarray:
    """2x2 map from output to input offsets: small rotation, shear and unequal scaling."""
    angle, shear = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.15, 0.15)
    sides = scale * rng.uniform(0.92, 1.04, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return turn @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag(1 / sides)


def _draw(image: PIL.Image.Image, matrix: np.ndarray, side: int) -> np.ndarray:
    """Resample an 8x8 image about its centre into float32 [side, side]."""
    a = matrix * (NATIVE / side)
    offset = NATIVE / 2 - a @ (np.array([side, side]) / 2)
    coefficients = (a[0, 0], a[0, 1], offset[0], a[1, 0], a[1, 1], offset[1])
    drawn = image.transform(
        (side, side), PIL.Image.Transform.AFFINE, coefficients, PIL.Image.Resampling.BICUBIC
    )
    return np.asarray(drawn, np.float32) / 255


def ink_boxes(alpha: np.ndarray) -> np.ndarray:
    """(x0, y0, x1, y1) of the pixels above the ink threshold, int32 [..., 4] for alpha [..., side, side]."""
    marked = alpha > _INK
    side = alpha.shape[-1]
    columns, rows = np.asarray(marked.any(axis=-2)), np.asarray(marked.any(axis=-1))
    corners = (
        columns.argmax(axis=-1),
        rows.argmax(axis=-1),
        side - columns[..., ::-1].argmax(axis=-1),
        side - rows[..., ::-1].argmax(axis=-1),
    )
    return np.stack(corners, axis=-1).astype(np.int32)


@functools.lru_cache(maxsize=8)
def glyphs(split: str, test_fraction: float, side: int, augment: bool) -> Glyphs:
    """Digit images of a split, drawn with sides of ``side`` pixels.

    Args:
      split: "train" or "test".
      test_fraction: fraction of each digit's images held out for "test".
      side: side in pixels; at 8 without augmentation the originals are used unchanged.
      augment: distort each image in :data:`VARIANTS` ways.
    """
    images, labels = _originals()
    index = split_indices(split, test_fraction)
    rng = np.random.Generator(np.random.PCG64(_SPLIT_SEED + 1))
    variants = []
    for n in index:
        image = PIL.Image.fromarray(images[n])
        if augment:
            matrices = [_distortion(rng, rng.uniform(0.85, 1.0)) for _ in range(VARIANTS)]
        else:
            matrices = [np.eye(2)]
        variants.append([_draw(image, matrix, side) for matrix in matrices])
    alpha = np.asarray(variants, np.float32)
    of_digit = tuple(np.nonzero(labels[index] == digit)[0] for digit in range(10))
    return Glyphs(alpha, ink_boxes(alpha), index.astype(np.int32), of_digit)
