"""The digits and photographs that scikit-learn ships, read without importing it: that takes seconds."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import PIL.Image

PHOTOS = ("china.jpg", "flower.jpg")


def _file(*parts: str) -> Path:
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    return Path(spec.origin).with_name("datasets").joinpath(*parts)


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The handwritten digits: float64 [1797, 8, 8] in 0..16, and their labels, int64 [1797]."""
    table = np.loadtxt(_file("data", "digits.csv.gz"), delimiter=",", dtype=np.int64)
    return table[:, :-1].reshape(-1, 8, 8).astype(np.float64), table[:, -1]


def photo(name: str) -> np.ndarray:
    """One of :data:`PHOTOS`, uint8 [427, 640, 3]."""
    with PIL.Image.open(_file("images", name)) as image:
        return np.asarray(image.convert("RGB"))
