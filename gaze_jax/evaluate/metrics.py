"""Metrics: accuracy of free-running answers with confidence intervals, and routing accuracy."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.special

from gaze_jax.core.layout import VisualLayout
from gaze_jax.core.streams import IGNORE


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A mean of per-sample scores in [0, 1].

    Attributes:
      acc: the mean.
      ci: 95 % confidence interval.
      samples: number of samples.
    """

    acc: float
    ci: tuple[float, float]
    samples: int


def wilson(mean: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion; unlike the normal interval it has a width at 0 and 1.

    Args:
      mean: the proportion, in [0, 1].
      count: number of independent samples.
      z: standard normal quantile; 1.96 gives 95 %.

    Raises:
      ValueError: ``count`` is less than 1.
    """
    if count < 1:
        raise ValueError("An interval needs at least one sample.")
    centre = mean + z * z / (2 * count)
    half = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def token_scores(tokens: np.ndarray, answers: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """The fraction of each sample's counted answer tokens that were generated at the right position.

    Args:
      tokens: int [N, A], generated tokens.
      answers: int [N, A], expected tokens, -100 beyond the end.
      counted: bool [N, A], tokens that carry the answer (digits, not separators).

    Returns:
      float [N].
    """
    counted = counted & (answers != IGNORE)
    right = (tokens == answers) & counted
    return right.sum(axis=1) / np.maximum(counted.sum(axis=1), 1)


def accuracy(scores: np.ndarray) -> Accuracy:
    """Mean and interval of per-sample scores [N].

    The interval counts samples, not tokens, because tokens of one image are not independent. For scores
    between 0 and 1 it is therefore wider than necessary.
    """
    mean = float(np.mean(scores))
    return Accuracy(mean, wilson(mean, len(scores)), len(scores))


def student_interval(
    values: Sequence[float], lowest: float = -math.inf, highest: float = math.inf
) -> tuple[float, float] | None:
    """95 % interval of a mean over independent samples by Student's t, clipped to the possible values.

    Args:
      values: one per sample.
      lowest, highest: limits of the mean.

    Returns:
      The interval; None for a single sample, which has no variance.
    """
    count = len(values)
    if count < 2:
        return None
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(scipy.special.stdtrit(count - 1, 0.975)) * deviation / math.sqrt(count)
    return max(mean - half, lowest), min(mean + half, highest)


def target_regions(boxes: np.ndarray, layout: VisualLayout) -> np.ndarray:
    """The region that covers most of each box.

    Args:
      boxes: float [..., 4], (x0, y0, x1, y1) in pixels of the tower's input; -1 for no box.
      layout: the tower's grid and its regions.

    Returns:
      int [...]: index of the region in the view's partition; -1 where there is no box.
    """
    table = layout.table
    patch = layout.patch_size
    tokens = np.arange(layout.tokens)
    x0, y0 = tokens % layout.grid * patch, tokens // layout.grid * patch

    def overlap(low: np.ndarray, high: np.ndarray, start: np.ndarray) -> np.ndarray:
        return np.clip(
            np.minimum(high[..., None], start + patch) - np.maximum(low[..., None], start), 0, None
        )

    area = overlap(boxes[..., 0], boxes[..., 2], x0) * overlap(boxes[..., 1], boxes[..., 3], y0)
    per_region = np.where(table >= 0, area[..., np.maximum(table, 0)], 0).sum(axis=-1)
    return np.where(per_region.max(axis=-1) > 0, per_region.argmax(axis=-1), -1)


def routing_hits(selected: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count how often the query that emits a token had selected the token's region, per layer.

    Args:
      selected: bool [A, L, N, Hs, R].
      targets: int [N, A] from :func:`target_regions`; -1 is not counted.

    Returns:
      float [L, N], each sample's hits (a mean over heads, summed over its counted tokens), and int [N], its
      number of counted tokens.
    """
    at = np.maximum(targets, 0).T[:, None, :, None, None]
    hit = np.take_along_axis(selected, at, axis=-1)[..., 0].mean(axis=-1)  # [A, L, N]
    counted = targets >= 0
    return np.where(counted.T[:, None, :], hit, 0.0).sum(axis=0), counted.sum(axis=1)


def best_layer(hits: np.ndarray, counts: np.ndarray) -> dict[str, float | int | list[float]]:
    """Choose the best layer on the even samples and report its hit rate on the odd ones.

    Args:
      hits, counts: [L, N] and [N] from :func:`routing_hits`; N is at least 2.

    Returns:
      "best": the chosen layer's hits per counted token on the odd samples; "layer": its index; "per_layer":
      the same rate for every layer.
    """

    def hit_rate(half: slice) -> np.ndarray:
        return hits[:, half].sum(axis=1) / counts[half].sum()

    chosen = int(np.argmax(hit_rate(slice(0, None, 2))))
    held_out = hit_rate(slice(1, None, 2))
    return {"best": float(held_out[chosen]), "layer": chosen, "per_layer": [float(h) for h in held_out]}
