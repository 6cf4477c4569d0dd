"""What queries select: arrays that may change from call to call, and static settings.

Axis letters as in :mod:`gaze_jax.core.streams`; Hs is the number of selectors, see
:mod:`gaze_jax.core.routing`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Int32, Num

from gaze_jax.core.budget import ALL_REGIONS, Keep
from gaze_jax.core.routing import Routing
from gaze_jax.core.types import AnyArray, Array


@dataclasses.dataclass(frozen=True)
class SelectionSpec:
    """The static part of a selection: a new value compiles a new program.

    Attributes:
      routing: where region scores come from.
      capacity: J, the most regions that a decoding query reads; None allows all R. Prefill has no capacity.
      return_trace: also return what each query selected. Prefill returns scores and selections; decoding also
        returns the attention to every region, which reads every key.
      return_entries: prefill also returns how many visual keys each query attends to, without keeping what
        it selected.
    """

    routing: Routing = Routing()
    capacity: int | None = None
    return_trace: bool = False
    return_entries: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """The traced part of a selection. ``Selection()`` is dense attention.

    Shapes have a leading axis L, or broadcast to it. T is 1 in decoding.

    Attributes:
      budget: top_k, the regions that each query selects: int32 broadcastable to [L, B, T], or a fraction
        (:class:`gaze_jax.core.budget.Keep`), whose arrays have that shape. None is dense attention.
      bias: float32 broadcastable to [L, B, R], see :func:`gaze_jax.core.routing.steer`. Needs a budget and
        strategy "descriptor".
      forced: int32 broadcastable to [L, B, T, Hs, J], the regions of strategy "forced".
      full_layers: bool [L], layers that read every region and ignore the budget.
    """

    budget: Int[AnyArray, "..."] | int | Keep | None = None
    bias: Float[AnyArray, "..."] | None = None
    forced: Int[AnyArray, "..."] | None = None
    full_layers: Bool[AnyArray, " L"] | Bool[AnyArray, ""] | None = None

    def check(self, routing: Routing) -> None:
        """Refuse a combination that would be ignored.

        Raises:
          ValueError: steering without a budget, a bias with another strategy than "descriptor", or forced
            regions without strategy "forced" or the reverse.
        """
        if self.budget is None and (self.forced is not None or routing.strategy == "forced"):
            raise ValueError(
                "Forced regions need a budget: dense attention (budget=None) reads every region."
            )
        if self.budget is None and self.bias is not None:
            raise ValueError("A bias needs a budget: dense attention (budget=None) reads every region.")
        if self.bias is not None and routing.strategy != "descriptor":
            raise ValueError(
                f"A bias steers the scores of descriptors, not Routing(strategy={routing.strategy!r})."
            )
        if (self.forced is not None) != (routing.strategy == "forced"):
            raise ValueError(
                "forced regions and Routing(strategy='forced') go together: give both or neither."
            )

    def over_layers(self, layers: int) -> "Selection":
        """The same selection with an axis L of ``layers`` on every array, ready for a scan.

        A full layer gets a budget of every region, so prefill needs no special case for it.

        Raises:
          TypeError: a count or a forced region is not an integer.
        """
        budget, full = self.budget, self.full_layers
        if isinstance(budget, Keep):
            fraction = _with_layers(jnp.asarray(budget.fraction, jnp.float32), layers, 2)
            most = _with_layers(_integers(budget.most), layers, 2)
            if full is not None:
                fraction = jnp.where(full[:, None, None], 1.0, fraction)
                most = jnp.where(full[:, None, None], ALL_REGIONS, most)
            budget = Keep(fraction, most)
        elif budget is not None:
            budget = _with_layers(_integers(budget), layers, 2)
            budget = budget if full is None else jnp.where(full[:, None, None], ALL_REGIONS, budget)
        return Selection(
            budget=budget,
            bias=None if self.bias is None else _with_layers(jnp.asarray(self.bias, jnp.float32), layers, 2),
            forced=None if self.forced is None else _with_layers(_integers(self.forced), layers, 4),
            full_layers=full,
        )


def _integers(value: Num[AnyArray, "*shape"] | int) -> Int32[Array, "*shape"]:
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(
            f"Budgets and forced regions must be integers, got {value.dtype}; core.budget.Keep is a budget "
            "as a fraction."
        )
    return value.astype(jnp.int32)


def _with_layers(value: Num[Array, "..."], layers: int, trailing: int) -> Num[Array, "{layers} ..."]:
    """``value`` with a layer axis before its ``trailing`` axes; missing axes become 1."""
    if value.ndim <= trailing:
        value = value.reshape((1,) * (trailing + 1 - value.ndim) + value.shape)
    return jnp.broadcast_to(value, (layers, *value.shape[1:]))
