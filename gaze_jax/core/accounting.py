"""What attention costs: keys attended, bytes read by a decoding step, and FLOPs, all by formula.

*Entries* are the valid keys attended, a mean over heads if their selections differ. *Reads* are the bytes of
the slots read from memory: the padding slots of a selected region are read too, and a region that several
query heads of one kv head select is read once, so the union over the group counts. Both are for one query
of one layer. Evaluation, benchmarks and documentation take their numbers from this module.

Axis letters as in :mod:`gaze_jax.core.streams`; Hs is H or K, as in :mod:`gaze_jax.core.routing`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int

from gaze_jax.core.regions import descriptor_width
from gaze_jax.core.streams import Kind
from gaze_jax.core.types import AnyArray, Array

Amount = Float[AnyArray, "*#lead"] | float
"""One number, or one for each query."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
    """Valid keys attended by one query in one layer; each float32 [...]."""

    visual: Float32[AnyArray, "*#lead"]
    newline: Float32[AnyArray, "*#lead"]
    context: Float32[AnyArray, "*#lead"]
    text: Float32[AnyArray, "*#lead"]

    @property
    def total(self) -> Float32[AnyArray, "*#lead"]:
        """All kinds together: the length of the softmax."""
        return self.visual + self.newline + self.context + self.text


@dataclasses.dataclass(frozen=True)
class Reads:
    """Bytes read by one decoding step in one layer, over all kv heads.

    Attributes:
      descriptors: descriptors of every region; 0 under dense attention.
      visual: keys and values of every slot of the selected regions.
      text_stream: keys and values of the text stream.
    """

    descriptors: Amount
    visual: Amount
    text_stream: Amount

    @property
    def total(self) -> Amount:
        """All bytes together."""
        return self.descriptors + self.visual + self.text_stream


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating point operations of one query in one layer (a multiply-add is two)."""

    attention: Amount
    routing: Amount

    @property
    def total(self) -> Amount:
        """Attention and routing."""
        return self.attention + self.routing


def mask_from_indices(indices: Int[AnyArray, "*lead J"], num_regions: int) -> Bool[Array, "*lead R"]:
    """int32 [..., J] to bool [..., R]: -1 is ignored and a region listed twice counts once."""
    return jnp.any(indices[..., None] == jnp.arange(num_regions, dtype=jnp.int32), axis=-2)


def _selection(
    selected: Bool[AnyArray, "*lead R"] | None, indices: Int[AnyArray, "*lead J"] | None, num_regions: int
) -> Bool[AnyArray, "*lead R"] | None:
    if selected is not None and indices is not None:
        raise ValueError(
            "accounting takes selected or indices, not both; leave both out for dense attention."
        )
    return selected if indices is None else mask_from_indices(indices, num_regions)


def entries(
    valid: Bool[AnyArray, "*#lead R P"],
    text_seen: Bool[AnyArray, "*#lead S"],
    kind: Int[AnyArray, "*#lead S"],
    *,
    selected: Bool[AnyArray, "*#lead Hs R"] | None = None,
    indices: Int[AnyArray, "*#lead Hs J"] | None = None,
) -> Entries:
    """Count the keys that routed queries attend to.

    Leading axes broadcast: a decoding step has selections [L, B, Hs, J] and ``valid`` [B, R, P]. With
    selections for all tokens of a batch, [L, B, S, Hs, R], pass ``valid[:, None]``.

    Args:
      valid: bool [..., R, P], slots that hold a token the query may see.
      text_seen: bool [..., S], text-stream keys that the query sees.
      kind: int32 [..., S], values of :class:`gaze_jax.core.streams.Kind`.
      selected: bool [..., Hs, R], the selection as a mask.
      indices: int32 [..., Hs, J], the selection as indices, -1 in unused slots. Give ``selected`` or
        ``indices``, not both; neither means dense attention.

    Raises:
      ValueError: both ``selected`` and ``indices`` are given.
    """
    tokens = jnp.sum(valid, axis=-1, dtype=jnp.int32)
    chosen = _selection(selected, indices, tokens.shape[-1])
    if chosen is None:
        visual = jnp.sum(tokens, axis=-1).astype(jnp.float32)
    else:
        per_head = jnp.sum(jnp.where(chosen, tokens[..., None, :], 0), axis=-1)
        visual = jnp.mean(per_head.astype(jnp.float32), axis=-1)

    def count(wanted: Kind) -> Float32[Array, "*lead"]:
        return jnp.sum(text_seen & (kind == wanted), axis=-1, dtype=jnp.int32).astype(jnp.float32)

    return Entries(visual, count(Kind.NEWLINE), count(Kind.CONTEXT), count(Kind.TEXT))


def union_over_group(selected: Bool[AnyArray, "*lead Hs R"], kv_heads: int) -> Float32[Array, "*lead K"]:
    """Regions that each kv head must read for its query heads: bool [..., Hs, R] to float32 [..., K]."""
    heads, regions = selected.shape[-2:]
    if heads % kv_heads:
        raise ValueError(f"{heads} selections are not a multiple of {kv_heads} kv heads.")
    grouped = selected.reshape(*selected.shape[:-2], kv_heads, heads // kv_heads, regions)
    return jnp.sum(jnp.any(grouped, axis=-2), axis=-1, dtype=jnp.int32).astype(jnp.float32)


def reads(
    valid: Bool[AnyArray, "*#lead R P"],
    text_seen: Bool[AnyArray, "*#lead S"],
    *,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    selected: Bool[AnyArray, "*#lead Hs R"] | None = None,
    indices: Int[AnyArray, "*#lead Hs J"] | None = None,
    descriptor: str = "mean",
) -> Reads:
    """Bytes that decoding steps must read, given what they selected.

    Args:
      valid, text_seen, selected, indices: as in :func:`entries`.
      kv_heads: K.
      head_dim: D.
      itemsize: bytes per cached element.
      descriptor: as in :func:`decode_floor`.

    Returns:
      float32 [...] each; the mean union in :func:`decode_floor` gives the same total.
    """
    regions, slots = valid.shape[-2:]
    chosen = _selection(selected, indices, regions)
    text_stream = jnp.sum(text_seen, axis=-1, dtype=jnp.int32).astype(jnp.float32)
    if chosen is None:
        floor = decode_floor(kv_heads, head_dim, itemsize, None, slots, regions, text_stream)
    else:
        union = jnp.mean(union_over_group(chosen, kv_heads), axis=-1)
        floor = decode_floor(
            kv_heads, head_dim, itemsize, regions, slots, union, text_stream, descriptor=descriptor
        )
    return floor


def decode_floor(
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    regions: int | None,
    slots: int,
    union: Amount,
    text_stream: Amount,
    *,
    descriptor: str = "mean",
) -> Reads:
    """The fewest bytes that one decoding step of one layer can read: K * (bER + 2bDPU + 2bDS).

    Args:
      kv_heads: K.
      head_dim: D.
      itemsize: b, bytes per cached element.
      regions: R, whose descriptors are read; None for dense attention, which reads none.
      slots: P.
      union: U, regions read per kv head (a mean over kv heads); R under dense attention.
      text_stream: S, text-stream keys, context tokens included.
      descriptor: one of :data:`gaze_jax.core.regions.DESCRIPTORS`; sets the width E.
    """
    vector = kv_heads * itemsize * head_dim
    width = descriptor_width(descriptor, head_dim)
    return Reads(
        descriptors=float(kv_heads * itemsize * width * (regions or 0)),
        visual=2.0 * vector * slots * union,
        text_stream=2.0 * vector * text_stream,
    )


def attention_flops(
    heads: int,
    head_dim: int,
    attended: Amount,
    *,
    regions: int = 0,
    kv_heads: int | None = None,
    descriptor: str = "mean",
) -> Flops:
    """Operations of one query in one layer: q . k and weight * v for each entry, q . descriptor per region.

    Args:
      heads: H.
      head_dim: D.
      attended: entries of all kinds.
      regions: R, the regions scored; 0 for dense attention.
      kv_heads: K for select_per "kv_head", which sums a group's queries and scores once; None for "head".
      descriptor: one of :data:`gaze_jax.core.regions.DESCRIPTORS`.
    """
    width = descriptor_width(descriptor, head_dim)
    if kv_heads is None:
        routing = 2.0 * heads * width * regions
    else:
        routing = (2.0 * kv_heads * regions + (heads - kv_heads)) * width if regions else 0.0
    return Flops(attention=4.0 * heads * head_dim * attended, routing=routing)
