"""The two token streams that enter the decoder.

The processor permutes visual tokens once into *region-major* order and stores the position of each in the
sequence. Everything else (text, newlines, context tokens) is in the second stream, the text stream. The
keys of every layer are then contiguous per region, and no layer permutes anything.

Axis letters, used in every shape of this project::

    B batch        T queries            S keys of the text stream   F views
    R regions      P slots per region   J capacity of a selection    C context tokens per view
    K kv heads     G query heads per kv head (H = K * G)             D head dim
    M model width  L layers             V vocabulary                 N tokens of both streams (R * P + S)
    E width of a descriptor             Hs selectors, H or K         W tower tokens pooled into one
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Shaped

from gaze_jax.core.types import AnyArray, Array

IGNORE = -100
"""Target of a token that is not trained on."""

EMPTY = -1
"""Marks an unused slot in ``visual_src`` and in segment and view ids."""

NEWLINE = -1
"""In ``pool_indices``: the token is the newline embedding, not a tower token."""


class Kind(enum.IntEnum):
    """Kind of a text-stream token."""

    PAD = 0
    TEXT = 1
    NEWLINE = 2
    CONTEXT = 3


POOL_FIELDS = ("pool_indices", "pool_weights")
"""Optional fields of :class:`Streams`, present when visual tokens are pooled."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
    """One batch of token streams; every field is int32 except ``pool_weights``.

    ``order`` is a token's index in the spliced sequence of its own sample (it restarts at 0 in every
    segment); masks are made from it. ``positions`` are used for RoPE only. The order in which regions, slots
    and text-stream tokens are *stored* has no meaning.

    Attributes:
      visual_src: [B, R, P] index into the row's visual tokens in the order of the views; -1 marks an empty
        slot. Without ``pool_indices`` these are the tower's tokens, flattened over images.
      visual_order: [B, R, P] index in the spliced sequence; -1 in empty slots.
      visual_positions: [B, R, P] RoPE position; 0 in empty slots.
      visual_view: [B, R, P] view (image view or frame) of the token, unique within the row; -1 if empty.
      region_segment: [B, R] packed sample the region belongs to; -1 for an empty region.
      tokens: [B, S] vocabulary id of text, index 0..C-1 of a context token, 0 for newline and padding.
      kind: [B, S] one of :class:`Kind`.
      text_order: [B, S] index in the spliced sequence; -1 for padding.
      text_positions: [B, S] RoPE position; 0 for padding.
      text_segment: [B, S] packed sample the token belongs to; -1 for padding.
      text_view: [B, S] view of a context token or of a newline inside a view; -1 otherwise.
      targets: [B, S] the text token that follows *in order*, or -100. Already shifted: a trainer
        compares ``logits[:, s]`` with ``targets[:, s]``.
      pool_indices, pool_weights: [B, R, P, W]; each visual token is the sum of W tower tokens with these
        float32 weights (``regions.pool_to_regions``). None if visual tokens are not pooled.
    """

    visual_src: Int32[AnyArray, "B R P"]
    visual_order: Int32[AnyArray, "B R P"]
    visual_positions: Int32[AnyArray, "B R P"]
    visual_view: Int32[AnyArray, "B R P"]
    region_segment: Int32[AnyArray, "B R"]
    tokens: Int32[AnyArray, "B S"]
    kind: Int32[AnyArray, "B S"]
    text_order: Int32[AnyArray, "B S"]
    text_positions: Int32[AnyArray, "B S"]
    text_segment: Int32[AnyArray, "B S"]
    text_view: Int32[AnyArray, "B S"]
    targets: Int32[AnyArray, "B S"]
    pool_indices: Int32[AnyArray, "B R P W"] | None = None
    pool_weights: Float32[AnyArray, "B R P W"] | None = None

    @classmethod
    def from_batch(
        cls, batch: Mapping[str, Shaped[Array, "..."]] | Mapping[str, Shaped[np.ndarray, "..."]]
    ) -> "Streams":
        """Take this class's fields out of a batch of named arrays.

        Raises:
          KeyError: a field other than :data:`POOL_FIELDS` is missing from ``batch``.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        wanted = [name for name in names if name in batch or name not in POOL_FIELDS]
        return cls(**{name: cast(AnyArray, batch[name]) for name in wanted})

    @property
    def visual_valid(self) -> Bool[Array, "B R P"]:
        """[B, R, P] bool: the slot holds a token."""
        return jnp.asarray(self.visual_src) >= 0

    def without_context(self) -> "Streams":
        """The streams of the same samples for a model without context tokens.

        The slots of context tokens become padding, and the positions of what follows them close the gap.
        """
        context = jnp.asarray(self.kind) == Kind.CONTEXT

        def closed(
            positions: Int32[AnyArray, "B N"], order: Int32[AnyArray, "B N"], segment: Int32[AnyArray, "B N"]
        ) -> Int32[Array, "B N"]:
            before = (
                context[:, None, :]
                & (segment[:, :, None] == self.text_segment[:, None, :])
                & (self.text_order[:, None, :] < order[:, :, None])
            )
            return positions - jnp.sum(before, axis=-1, dtype=jnp.int32)

        batch, regions, slots = self.visual_src.shape
        visual = closed(
            self.visual_positions.reshape(batch, -1),
            self.visual_order.reshape(batch, -1),
            jnp.repeat(self.region_segment, slots, axis=1),
        )

        def emptied(field: Int32[AnyArray, "B S"], value: int) -> Int32[Array, "B S"]:
            return jnp.where(context, jnp.int32(value), field)

        return dataclasses.replace(
            self,
            visual_positions=visual.reshape(batch, regions, slots),
            tokens=emptied(self.tokens, 0),
            kind=emptied(self.kind, Kind.PAD),
            text_order=emptied(self.text_order, EMPTY),
            text_positions=emptied(closed(self.text_positions, self.text_order, self.text_segment), 0),
            text_segment=emptied(self.text_segment, EMPTY),
            text_view=emptied(self.text_view, EMPTY),
            targets=emptied(self.targets, IGNORE),
        )


def text_streams(tokens: Int[AnyArray, "B S"], valid: Bool[AnyArray, "B S"]) -> Streams:
    """Text-only streams, one sample per row.

    Args:
      tokens: int32 [B, S].
      valid: bool [B, S]; False marks padding, anywhere in the row.
    """
    tokens, valid = jnp.asarray(tokens, jnp.int32), jnp.asarray(valid)
    batch = tokens.shape[0]
    order = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    no_view = jnp.full(tokens.shape, EMPTY, jnp.int32)
    no_regions = jnp.zeros((batch, 0, 1), jnp.int32)
    return Streams(
        visual_src=no_regions,
        visual_order=no_regions,
        visual_positions=no_regions,
        visual_view=no_regions,
        region_segment=no_regions[:, :, 0],
        tokens=jnp.where(valid, tokens, 0),
        kind=jnp.where(valid, jnp.int32(Kind.TEXT), jnp.int32(Kind.PAD)),
        text_order=jnp.where(valid, order, EMPTY),
        text_positions=jnp.where(valid, order, 0),
        text_segment=jnp.where(valid, 0, EMPTY),
        text_view=no_view,
        targets=jnp.full(tokens.shape, IGNORE, jnp.int32),
    )
