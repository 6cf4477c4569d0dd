"""What a call that scores, selects and attends returns."""

from typing import NamedTuple

import jax


class Routed(NamedTuple):
    """What :func:`pallas_kernels.gaze_decode.api.route_and_decode` returns.

    Attributes:
      out: [B, H, D].
      lse: float32 [B, H].
      indices: int32 [B, Hs, J] the regions that were read, best first; -1 in unused slots.
      scores: float32 [B, Hs, R] of every region.
    """

    out: jax.Array
    lse: jax.Array
    indices: jax.Array
    scores: jax.Array
