"""Run-time gaze options: budgets, full layers and steering."""

import dataclasses
import math
import operator
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from gaze_jax.core.routing import Keep
from gaze_jax.core.selection import Selection
from gaze_jax.data.placement import PlacedView
from gaze_jax.errors import UserError
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.programs import bucket
from gaze_jax.infer.steer import LookAt, bias_of


@dataclasses.dataclass(frozen=True)
class GazeOptions:
    """Which regions a query may select.

    Values are traced: only a budget in another bucket, or setting a field that was empty, compiles again.

    Attributes:
      top_k: regions per query; None means the configured number, or all regions if there are fewer.
      keep: the budget as a fraction of the visible regions, instead of ``top_k``.
      dense: attend to everything, regardless of the model's configuration.
      full_layers: layers that attend to everything.
      look_at: boxes that steer the selection.

    Raises:
      UserError: a number is out of range, or two fields exclude each other.
    """

    top_k: int | None = None
    keep: float | None = None
    dense: bool = False
    full_layers: tuple[int, ...] = ()
    look_at: tuple[LookAt, ...] = ()

    def __post_init__(self) -> None:
        # Later code tells a count from a fraction by its type, so convert NumPy's numbers here.
        try:
            object.__setattr__(self, "top_k", None if self.top_k is None else operator.index(self.top_k))
        except TypeError as error:
            raise UserError(f"top_k={self.top_k!r} must be a whole number; keep is a fraction.") from error
        try:
            object.__setattr__(self, "keep", None if self.keep is None else float(self.keep))
        except (TypeError, ValueError) as error:
            raise UserError(f"keep={self.keep!r} must be a number, a fraction of the regions.") from error
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} must be at least 1; dense attends to everything.")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UserError(f"keep={self.keep} must be above 0 and at most 1, a fraction of the regions.")
        if self.top_k is not None and self.keep is not None:
            raise UserError("top_k and keep are both budgets; give one of them.")
        chosen = [name for name in ("top_k", "keep", "full_layers", "look_at") if getattr(self, name)]
        if self.dense and chosen:
            raise UserError(f"{chosen[0]} has no effect with dense, which selects nothing; drop one of them.")

    def budget(self, configured: int | None) -> int | float | None:
        """The budget: a count, a fraction, or None for dense attention.

        Args:
          configured: the model's own ``top_k``.

        Raises:
          UserError: steering or full layers are set but attention is dense.
        """
        if self.dense:
            return None
        found = self.keep if self.keep is not None else self.top_k if self.top_k is not None else configured
        if found is None and (self.full_layers or self.look_at):
            raise UserError(
                "This checkpoint attends densely, so there is nothing to steer; give top_k or keep."
            )
        return found


def join(
    engine: Engine,
    gaze_options: Sequence[GazeOptions],
    budgets: Sequence[int | float] | None,
    views: Sequence[tuple[PlacedView, ...]],
    layers: int,
) -> Selection:
    """The :class:`Selection` of an engine's rows.

    Args:
      engine: the engine.
      gaze_options: one per row, all with the same ``full_layers``.
      budgets: one per row, all counts or all fractions; None means dense attention.
      views: the views of each row.
      layers: L, the model's number of layers.

    Raises:
      UserError: a layer does not exist, or a box overlaps no view.
    """
    if budgets is None:
        return Selection()
    more = engine.batch - len(gaze_options)  # rows that fill up the batch
    full_layers, bias = _full_layers(gaze_options[0], layers), None
    if any(gaze.look_at for gaze in gaze_options):
        regions = 1 + max((int(view.regions.max()) for of_row in views for view in of_row), default=-1)
        rows = [bias_of(gaze.look_at, of, layers, regions) for gaze, of in zip(gaze_options, views)]
        bias = np.stack(rows + [rows[0]] * more, axis=1)
    budget = np.asarray([*budgets, *[budgets[0]] * more])[None, :, None]
    fraction = budget.dtype.kind == "f"
    budget = budget.astype(np.float32 if fraction else np.int32)
    budget = np.broadcast_to(budget, (layers, engine.batch, 1))
    return Selection(
        budget=Keep(jnp.asarray(budget)) if fraction else jnp.asarray(budget),
        bias=None if bias is None else jnp.asarray(bias),
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
      UserError: ``top_k`` is larger than R, a layer does not exist, or a box overlaps no view.
    """
    if gaze.top_k is not None and regions and gaze.top_k > regions:
        raise UserError(f"top_k={gaze.top_k} must be between 1 and {regions}, the regions of what is shown.")
    _full_layers(gaze, layers)
    if gaze.look_at:
        bias_of(gaze.look_at, views, layers, 1 + max((int(u.regions.max()) for u in views), default=-1))


def _full_layers(gaze: GazeOptions, layers: int) -> np.ndarray | None:
    """bool [L], the layers that read every region; None if there are none."""
    chosen = gaze.full_layers
    if not chosen:
        return None
    if min(chosen) < 0 or max(chosen) >= layers:
        raise UserError(f"full_layers={chosen} must be between 0 and {layers - 1}, the model's last.")
    return np.isin(np.arange(layers), chosen)


def selection_capacity(budgets: Sequence[int | float] | None, capacity: int) -> int | None:
    """J: the bucket of the largest budget in a cache of ``capacity`` regions; None means all of them."""
    if budgets is None or capacity == 0:
        return None
    # Rounded up: the device rounds a fraction of the visible regions, which are at most ``capacity``.
    counts = (math.ceil(budget * capacity) if isinstance(budget, float) else budget for budget in budgets)
    return min(bucket(max(counts)), capacity)


def budget_count(budget: int | float, regions: int) -> int:
    """The number of regions that a query selects from ``regions`` visible ones, at least 1."""
    if isinstance(budget, float):  # in float32, to round as the device does
        budget = round(float(np.float32(budget) * np.float32(regions)))
    return max(1, min(budget, regions))
