"""The progressive schedule: start dense, end at the target fraction of regions.

The paper reports worse results with sparse routing from the first step. A fraction is annealed rather than a
count, so that a 16-region image and a 555-region video can share a batch.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Float, Float32

from gaze_jax.core.types import Array


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Fraction of the regions to keep, as a function of training progress.

    Attributes:
      dense_until: progress in [0, 1] up to which every region is kept.
      sparse_from: progress from which the final fraction is kept. Between the two the fraction falls
        geometrically: equal steps halve the number of regions.
    """

    dense_until: float = 0.1
    sparse_from: float = 0.6

    def __post_init__(self) -> None:
        if not 0.0 <= self.dense_until <= self.sparse_from <= 1.0:
            raise ValueError(
                f"Schedule needs 0 <= dense_until <= sparse_from <= 1, got dense_until={self.dense_until} "
                f"and sparse_from={self.sparse_from}."
            )

    def keep(self, progress: Float[Array, ""] | float, final: float) -> Float32[Array, ""]:
        """Fraction kept at ``progress`` (0 at the first step, 1 at the last); float32 scalar."""
        progress = jnp.asarray(progress, jnp.float32)
        span = max(self.sparse_from - self.dense_until, 1e-9)
        ramp = jnp.clip((progress - self.dense_until) / span, 0.0, 1.0)
        # A schedule without a ramp is already sparse at `sparse_from`.
        ramp = jnp.where(progress >= self.sparse_from, 1.0, ramp)
        return jnp.exp(ramp * jnp.log(jnp.float32(final)))
