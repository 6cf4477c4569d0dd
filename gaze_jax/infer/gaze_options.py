"""Run-time gaze options: budgets, full layers and steering."""

import dataclasses
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gaze_jax.core.budget import ALL_REGIONS, Keep
from gaze_jax.core.selection import Selection
from gaze_jax.data.placement import PlacedView
from gaze_jax.errors import UserError
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.programs import bucket
from gaze_jax.infer.steer import LookAt, bias_of

Budget = int | float | tuple[int, ...]
"""Regions per query: a count, a fraction of the visible regions, or a count for each layer."""

_SMALLEST = 8
"""The smallest capacity, if there are that many regions, so that small budgets share one program."""


@dataclasses.dataclass(frozen=True)
class GazeOptions:
    """Which regions a query may select.

    Values are traced, so they compile nothing: docs/inference.md lists the programs that there are.

    Attributes:
      top_k: regions per query, or a sequence of such numbers, one for each layer, which becomes a tuple; None
        means the configured number, or all regions if there are fewer.
      keep: the budget as a fraction of the visible regions, instead of ``top_k``.
      dense: attend to everything, regardless of the model's configuration.
      full_layers: layers that attend to everything.
      look_at: boxes that steer the selection.

    Raises:
      UserError: a number is out of range, or two fields exclude each other.
    """

    top_k: int | Sequence[int] | None = None
    keep: float | None = None
    dense: bool = False
    full_layers: tuple[int, ...] = ()
    look_at: tuple[LookAt, ...] = ()

    def __post_init__(self) -> None:
        # Later code tells a count from a fraction by its type, so convert NumPy's numbers here.
        object.__setattr__(self, "top_k", _counts(self.top_k))
        try:
            object.__setattr__(self, "keep", None if self.keep is None else float(self.keep))
        except (TypeError, ValueError) as error:
            raise UserError(f"keep={self.keep!r} must be a number, a fraction of the regions.") from error
        if self.counts and min(self.counts) < 1:
            raise UserError(f"top_k={_written(self.top_k)} must be at least 1; dense attends to everything.")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UserError(f"keep={self.keep} must be above 0 and at most 1, a fraction of the regions.")
        if self.top_k is not None and self.keep is not None:
            raise UserError("top_k and keep are both budgets; give one of them.")
        chosen = [name for name in ("top_k", "keep", "full_layers", "look_at") if getattr(self, name)]
        if self.dense and chosen:
            raise UserError(f"{chosen[0]} has no effect with dense, which selects nothing; drop one of them.")

    @property
    def counts(self) -> tuple[int, ...]:
        """``top_k`` as a tuple: one number, one for each layer, or none."""
        return counts_of(self.top_k)

    def budget(self, configured: int | None) -> Budget | None:
        """The budget: a count, a count per layer, a fraction, or None for dense attention.

        Args:
          configured: the model's own ``top_k``.

        Raises:
          UserError: steering or full layers are set but attention is dense.
        """
        if self.dense:
            return None
        assert self.top_k is None or isinstance(self.top_k, int | tuple), "made so above"
        found = self.keep if self.keep is not None else self.top_k if self.top_k is not None else configured
        if found is None and (self.full_layers or self.look_at):
            raise UserError(
                "This checkpoint attends densely, so there is nothing to steer; give top_k or keep."
            )
        return found


def join(
    engine: Engine,
    gaze_options: Sequence[GazeOptions],
    budgets: Sequence[Budget] | None,
    views: Sequence[tuple[PlacedView, ...]],
    layers: int,
) -> Selection:
    """The :class:`Selection` of an engine's rows.

    Its arrays are the same for counts and fractions, and with and without boxes. Only full layers make
    another program of decoding.

    Args:
      engine: the engine.
      gaze_options: one per row, all with the same ``full_layers``.
      budgets: one per row; None means dense attention.
      views: the views of each row.
      layers: L, the model's number of layers.

    Raises:
      UserError: a layer does not exist, or a box overlaps no view.
    """
    if budgets is None:
        return Selection()
    more = engine.batch - len(gaze_options)  # rows that fill up the batch
    full_layers = _full_layers(gaze_options[0], layers)
    regions = 1 + max((int(view.regions.max()) for of_row in views for view in of_row), default=-1)
    rows = [bias_of(gaze.look_at, of, layers, regions) for gaze, of in zip(gaze_options, views)]
    fraction = np.ones((layers, engine.batch, 1), np.float32)
    most = np.full((layers, engine.batch, 1), ALL_REGIONS, np.int32)
    for row, budget in enumerate([*budgets, *[budgets[0]] * more]):
        if isinstance(budget, float):
            fraction[:, row] = budget
        else:
            most[:, row, 0] = budget
    return Selection(
        budget=Keep(jnp.asarray(fraction), jnp.asarray(most)),
        bias=jnp.asarray(np.stack(rows + [rows[0]] * more, axis=1)),
        full_layers=None if full_layers is None else jnp.asarray(full_layers),
    )


def check(gaze: GazeOptions, views: Sequence[PlacedView], layers: int, *, regions: int | None = None) -> None:
    """Check the options of one row before anything is computed.

    Args:
      gaze: the options.
      views: the row's views.
      layers: L, the model's number of layers.
      regions: R, the row's number of regions; None if more media will follow.

    Raises:
      UserError: ``top_k`` is larger than R or has another length than L, a layer does not exist, or a box
        overlaps no view.
    """
    if regions and max(gaze.counts, default=0) > regions:
        raise UserError(
            f"top_k={_written(gaze.top_k)} must be between 1 and {regions}, the regions of what is shown."
        )
    check_layers(gaze, layers)
    if gaze.look_at:
        bias_of(gaze.look_at, views, layers, 1 + max((int(u.regions.max()) for u in views), default=-1))


def check_layers(gaze: GazeOptions, layers: int) -> None:
    """Check the options against L, the model's number of layers.

    Raises:
      UserError: ``top_k`` has another length, or a layer does not exist.
    """
    if isinstance(gaze.top_k, tuple) and len(gaze.top_k) != layers:
        raise UserError(
            f"top_k={_written(gaze.top_k)} is for {len(gaze.top_k)} layers but the model has {layers}; give "
            "a number for each, or one for all."
        )
    _full_layers(gaze, layers)


def _full_layers(gaze: GazeOptions, layers: int) -> np.ndarray | None:
    """bool [L], the layers that read every region; None if there are none."""
    chosen = gaze.full_layers
    if not chosen:
        return None
    if min(chosen) < 0 or max(chosen) >= layers:
        raise UserError(f"full_layers={chosen} must be between 0 and {layers - 1}, the model's last.")
    return np.isin(np.arange(layers), chosen)


def selection_capacity(budgets: Sequence[Budget] | None, capacity: int) -> int | None:
    """J: the bucket of the largest budget in a cache of ``capacity`` regions; None means all of them."""
    if budgets is None or capacity == 0:
        return None
    # Rounded up: the device rounds a fraction of the visible regions, which are at most ``capacity``.
    counts = [
        math.ceil(budget * capacity) if isinstance(budget, float) else max(counts_of(budget))
        for budget in budgets
    ]
    return min(bucket(max(_SMALLEST, *counts)), capacity)


def budget_count(budget: Budget, regions: int) -> int | tuple[int, ...]:
    """The number of regions that a query selects from ``regions`` visible ones, at least 1; or per layer."""
    if isinstance(budget, tuple):
        return tuple(max(1, min(count, regions)) for count in budget)
    if isinstance(budget, float):  # in float32, to round as the device does
        budget = round(float(np.float32(budget) * np.float32(regions)))
    return max(1, min(budget, regions))


def counts_of(top_k: int | Sequence[int] | None) -> tuple[int, ...]:
    """A count, a sequence of counts or None as a tuple."""
    return () if top_k is None else (top_k,) if isinstance(top_k, int) else tuple(top_k)


def _counts(top_k: Any) -> int | tuple[int, ...] | None:
    """``top_k`` with NumPy's numbers and arrays converted."""
    if top_k is None:
        return None
    try:
        if not isinstance(top_k, Iterable) or getattr(top_k, "ndim", 1) == 0:
            return operator.index(top_k)
        if found := tuple(operator.index(count) for count in top_k):
            return found
        raise TypeError("no number")
    except TypeError as error:
        raise UserError(
            f"top_k={top_k!r} must be a whole number, or one for each layer; keep is a fraction."
        ) from error


def _written(top_k: int | Sequence[int] | None) -> str:
    """``top_k`` as a flag takes it."""
    return ",".join(map(str, counts_of(top_k)))
