"""How an answer looks at what it is shown, chosen when it runs."""

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

    Values are traced: only a budget of another bucket, or a field that was empty before, is another program.

    Attributes:
      top_k: regions per query; None: what the model is configured for, or all regions if they are fewer.
      keep: the budget as a fraction of the regions in sight, in place of ``top_k``.
      dense: attend to everything, whatever the model is configured for.
      full_layers: layers that attend to everything.
      look_at: boxes to look into.

    Raises:
      UserError: a number is out of range, or fields that exclude each other.
    """

    top_k: int | None = None
    keep: float | None = None
    dense: bool = False
    full_layers: tuple[int, ...] = ()
    look_at: tuple[LookAt, ...] = ()

    def __post_init__(self) -> None:
        # Their types tell a count from a fraction, further on.
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
        """A count, a fraction, or None for dense attention.

        Raises:
          UserError: something is to be selected by a model that attends densely.
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
    """What a session's rows may select.

    Args:
      engine: of the rows.
      gaze_options: of each row, with the same dense layers.
      budgets: of each row, all counts or all fractions; None is dense attention.
      views: of each row.
      layers: L of the model.

    Raises:
      UserError: a layer that the model has not, or a box outside of everything.
    """
    if budgets is None:
        return Selection()
    more = engine.batch - len(gaze_options)  # rows that nobody listens to
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
    """Refuse options that one row cannot have, before anything is computed.

    Args:
      gaze: the options.
      views: of the row.
      layers: L of the model.
      regions: R of all that the row shows; None if more is to come.

    Raises:
      UserError: ``top_k`` is larger than R, a layer that the model does not have, or a box outside of
        everything.
    """
    if gaze.top_k is not None and regions and gaze.top_k > regions:
        raise UserError(f"top_k={gaze.top_k} must be between 1 and {regions}, the regions of what is shown.")
    _full_layers(gaze, layers)
    if gaze.look_at:
        bias_of(gaze.look_at, views, layers, 1 + max((int(u.regions.max()) for u in views), default=-1))


def _full_layers(gaze: GazeOptions, layers: int) -> np.ndarray | None:
    """bool [L], layers that read every region."""
    chosen = gaze.full_layers
    if not chosen:
        return None
    if min(chosen) < 0 or max(chosen) >= layers:
        raise UserError(f"full_layers={chosen} must be between 0 and {layers - 1}, the model's last.")
    return np.isin(np.arange(layers), chosen)


def most(budgets: Sequence[int | float] | None, capacity: int) -> int | None:
    """J: the bucket of the largest budget of a session with so many regions; None is all of them."""
    if budgets is None or capacity == 0:
        return None
    # Fractions rounded up: what is rounded is the number of regions in sight, of which no query has more.
    counts = (math.ceil(budget * capacity) if isinstance(budget, float) else budget for budget in budgets)
    return min(bucket(max(counts)), capacity)


def counted(budget: int | float, regions: int) -> int:
    """Regions that a query selects of so many in sight, where ``budget`` is a count or a fraction."""
    if isinstance(budget, float):  # in float32, as the device rounds
        budget = round(float(np.float32(budget) * np.float32(regions)))
    return max(1, min(budget, regions))
