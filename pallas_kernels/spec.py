"""Static choices and integer metadata shared by the attention ops.

Axis letters: B batch, T queries, S text-stream keys, R regions, P token slots per region, J selection
capacity, K kv heads, G query heads per kv head, H = K * G, D head dim, L layers.
"""

import dataclasses

import jax

SELECT_PER = ("head", "kv_head")
VISUAL_DTYPES = (None, "int8")


@dataclasses.dataclass(frozen=True)
class GazeSpec:
    """Static choices that an implementation may specialise on; hashable, so a valid static jit argument.

    Attributes:
      scale: multiplies the logits (usually ``head_dim ** -0.5``); it never changes a selection.
      select_per: "head": a selection per query head (Hs = H); "kv_head": one per kv head (Hs = K).
      query_block: maximum number of queries whose logits ``gaze_prefill`` may hold at once.
      local: most queries see few of the keys, such as those of one view: ``gaze_prefill`` of "xla" then
        computes blocks of few queries and keys and skips those that nobody sees, on every device. It changes
        no value.
      visual_dtype: how ``gaze_decode`` stores the visual cache: None keeps the dtype; "int8" adds a float32
        scale per token, kv head and side (K, V); see :mod:`pallas_kernels.quantize`.
      interpret: run Pallas kernels in JAX's interpreter. It needs no accelerator, fills scratch with
        NaN, rejects out-of-bounds reads and detects races. Slow; for tests.
    """

    scale: float
    select_per: str = "head"
    query_block: int = 512
    local: bool = False
    visual_dtype: str | None = None
    interpret: bool = False

    def __post_init__(self) -> None:
        if self.select_per not in SELECT_PER:
            raise ValueError(f"GazeSpec.select_per={self.select_per!r} must be one of {SELECT_PER}.")
        if self.query_block < 1:
            raise ValueError(f"GazeSpec.query_block={self.query_block} must be at least 1.")
        if self.visual_dtype not in VISUAL_DTYPES:
            raise ValueError(f"GazeSpec.visual_dtype={self.visual_dtype!r} must be one of {VISUAL_DTYPES}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Windows:
    """What each query may see, as inclusive intervals of ``order`` within its own segment.

    A query that sees no key (padding, for example) outputs 0.

    Attributes:
      segment: int32 [B, T] packed sample that the query belongs to; -1 for padding, which sees nothing.
      visual_lo, visual_hi: int32 [B, T] interval of the visible visual tokens.
      text_lo, text_hi: int32 [B, T] interval of the visible text-stream tokens.
      routed: bool [B, T]: the query attends to its selected regions only.
    """

    segment: jax.Array
    visual_lo: jax.Array
    visual_hi: jax.Array
    text_lo: jax.Array
    text_hi: jax.Array
    routed: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyPlaces:
    """Positions of the keys in their sequences (``order``); empty slots and padding have order -1.

    Attributes:
      visual_order: int32 [B, R, P].
      region_segment: int32 [B, R].
      text_order: int32 [B, S].
      text_segment: int32 [B, S].
    """

    visual_order: jax.Array
    region_segment: jax.Array
    text_order: jax.Array
    text_segment: jax.Array
