"""Routing: score the regions and select the Top-K, stably and without gradient.

A strategy (:class:`Routing`) says where scores come from; selection is the same code for all. Training
selects by *mask* (one boolean per region), decoding by *index* (J slots to fetch). Both order regions the
same way: highest score first, ties to the region whose first token comes first, NaN below every number,
-0.0 equal to 0.0.

Axis letters as in :mod:`gaze_jax.core.streams`; Hs is H for select_per "head" and K for select_per
"kv_head"; E is the width of a descriptor.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int, Int32, UInt32

from gaze_jax.core.budget import PerQuery
from gaze_jax.core.types import Array
from pallas_kernels.dispatch import target

STRATEGIES = ("descriptor", "oracle", "random", "forced")
UNSEEN = jnp.iinfo(jnp.int32).min
"""What :func:`sortable` gives a region that may not be selected."""

_NAN = UNSEEN + 1


@dataclasses.dataclass(frozen=True)
class Routing:
    """Where a query's region scores come from.

    Attributes:
      strategy: "descriptor": q . descriptor (the paper). "oracle": the softmax mass that dense attention
        gives the region, a reference for the others at the cost of dense attention. "random": a hash of
        seed, sample, order, layer, head and region. "forced": only the regions listed by the caller.
      seed: seed of strategy "random".
    """

    strategy: str = "descriptor"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"Routing.strategy={self.strategy!r} must be one of {STRATEGIES}.")


def heads_per_kv_head(heads: int, kv_heads: int) -> int:
    """G, the query heads per kv head: H / K.

    Raises:
      ValueError: H is not a multiple of K.
    """
    if heads % kv_heads:
        raise ValueError(f"H={heads} query heads are not a multiple of K={kv_heads} kv heads.")
    return heads // kv_heads


def query_features(q: Float[Array, "*lead D"], descriptor: str) -> Float[Array, "*lead E"]:
    """The vector whose dot product with a descriptor is the region's score.

    A "minmax" descriptor bounds every q . k of its region by sum_d max(q_d * min_d, q_d * max_d) (Quest,
    arXiv 2406.10774). The maximum is the first product if q_d is negative and the second if it is positive,
    so the bound is a dot product too.

    Args:
      q: [..., D] post-RoPE queries.
      descriptor: one of :data:`gaze_jax.core.regions.DESCRIPTORS`.

    Returns:
      [..., E] in ``q.dtype``.
    """
    if descriptor == "mean":
        return q
    zero = jnp.zeros((), q.dtype)
    return jnp.concatenate([jnp.minimum(q, zero), jnp.maximum(q, zero)], axis=-1)


def descriptor_scores(
    q: Float[Array, "B T H E"], descriptors: Float[Array, "B K R E"], *, select_per: str
) -> Float32[Array, "B T Hs R"]:
    """Score every region for every query (paper: s = q . d).

    Args:
      q: [B, T, H, E] queries, or their :func:`query_features`.
      descriptors: [B, K, R, E].
      select_per: "head" scores per query head, "kv_head" adds the scores of a kv head's G query heads.

    Returns:
      float32 [B, T, Hs, R].

    Raises:
      ValueError: H is not a multiple of K.
    """
    batch, queries, heads, width = q.shape
    kv_heads = descriptors.shape[1]
    grouped = q.reshape(batch, queries, kv_heads, heads_per_kv_head(heads, kv_heads), width)
    if select_per == "kv_head":
        # The sum of the scores is the score of the summed queries; sum in float32.
        summed = jnp.sum(grouped.astype(jnp.float32), axis=3)
        return jnp.einsum(
            "BTKE,BKRE->BTKR",
            summed,
            descriptors.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
    scores = jnp.einsum(
        "BTKGE,BKRE->BTKGR",
        grouped,
        descriptors,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return scores.reshape(batch, queries, heads, scores.shape[-1])


def steer(
    scores: Float32[Array, "B T Hs R"],
    seen: Bool[Array, "#B #T #Hs R"],
    bias: Float[Array, "#B R"],
    *,
    heads: int,
    dim: int,
) -> tuple[Float32[Array, "B T Hs R"], Bool[Array, "#B #T #Hs R"]]:
    """Steer the selection: make regions more likely to be selected, or exclude them.

    A bias acts as if every logit of the region were higher by that amount, but only in the selection; the
    attention over the selected regions is unchanged.

    Args:
      scores: float32 [B, T, Hs, R] from descriptors.
      seen: bool, broadcastable to ``scores``; the regions that may be selected.
      bias: float32 [B, R] in logits; -inf excludes a region.
      heads: H; each of the Hs selectors sums the scores of H / Hs heads.
      dim: D; a score is sqrt(D) times the region's mean logit.

    Returns:
      The biased scores, and ``seen`` without the excluded regions.
    """
    allowed = bias > -jnp.inf
    scale = dim**0.5 * heads_per_kv_head(heads, scores.shape[2])
    added = jnp.where(allowed, bias, 0.0) * jnp.float32(scale)
    return scores + added[:, None, None, :], seen & allowed[:, None, None, :]


def log_masses(
    q: Float[Array, "B H D"],
    visual_k: Float[Array, "B K R P D"],
    text_k: Float[Array, "B K S D"],
    visual_seen: Bool[Array, "B R P"],
    text_seen: Bool[Array, "B S"],
    *,
    scale: float,
) -> tuple[Float32[Array, "B K G R"], Float32[Array, "B K G"]]:
    """Log of the unnormalised softmax mass of each region and of the text-stream keys.

    Args:
      q: [B, H, D] post-RoPE, one query per row.
      visual_k: [B, K, R, P, D].
      text_k: [B, K, S, D].
      visual_seen: bool [B, R, P], visual keys that count; the others may be NaN.
      text_seen: bool [B, S].
      scale: scale of the logits.

    Returns:
      float32 [B, K, G, R] and [B, K, G]; -inf where no key counts.
    """
    batch, heads, dim = q.shape
    kv_heads = visual_k.shape[1]
    grouped = q.reshape(batch, kv_heads, heads_per_kv_head(heads, kv_heads), dim)
    product = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
    visual = scale * product("BKGD,BKRPD->BKGRP", grouped, visual_k)
    text = scale * product("BKGD,BKSD->BKGS", grouped, text_k)
    visual = jnp.where(visual_seen[:, None, None], visual, -jnp.inf)
    text = jnp.where(text_seen[:, None, None], text, -jnp.inf)
    return jax.nn.logsumexp(visual, axis=-1), jax.nn.logsumexp(text, axis=-1)


def _normalised(
    regions: Float32[Array, "B K G R"], text: Float32[Array, "B K G"]
) -> Float32[Array, "B K G R"]:
    """Log of each region's share of the softmax over these regions and the text-stream keys."""
    total = jnp.logaddexp(jax.nn.logsumexp(regions, axis=-1), text)[..., None]
    return regions - jnp.where(jnp.isfinite(total), total, 0.0)


def attention_shares(
    regions: Float32[Array, "B K G R"], text: Float32[Array, "B K G"], selected: Bool[Array, "B Hs R"] | None
) -> tuple[Float32[Array, "B K*G R"], Float32[Array, "B K*G R"]]:
    """Each region's share of a query's attention, and its share under dense attention.

    Args:
      regions, text: from :func:`log_masses`, which reads every key: only traces do.
      selected: bool [B, Hs, R], the regions that were attended to; None is dense attention.

    Returns:
      Two float32 [B, H, R]: the share of each head's softmax given to each region, and the share that dense
      attention gives it.
    """
    batch, heads = regions.shape[0], regions.shape[1] * regions.shape[2]
    dense = jnp.exp(_normalised(regions, text))
    shares = dense
    if selected is not None:
        chosen = selected.reshape(batch, regions.shape[1], -1, regions.shape[-1])
        shares = jnp.exp(_normalised(jnp.where(chosen, regions, -jnp.inf), text))
    return shares.reshape(batch, heads, -1), dense.reshape(batch, heads, -1)


def oracle_scores(
    q: Float[Array, "B T H D"],
    visual_k: Float[Array, "B K R P D"],
    text_k: Float[Array, "B K S D"],
    visual_seen: Bool[Array, "B T R P"],
    text_seen: Bool[Array, "B T S"],
    *,
    scale: float,
    select_per: str,
    query_block: int,
) -> Float32[Array, "B T Hs R"]:
    """Score every region by the softmax mass of its keys under dense attention.

    Args:
      q: [B, T, H, D] post-RoPE queries.
      visual_k: [B, K, R, P, D].
      text_k: [B, K, S, D].
      visual_seen: bool [B, T, R, P], visual keys that dense attention sees; the others may be NaN.
      text_seen: bool [B, T, S].
      scale: scale of the logits.
      select_per: "head" takes each query head's mass, "kv_head" the sum over a kv head's G query heads, each
        normalised separately.
      query_block: queries whose logits are in memory at once.

    Returns:
      float32 [B, T, Hs, R], the log of the mass, so that small masses stay distinct; -inf where no key is
      seen.
    """
    batch, _, heads, _ = q.shape

    def one(query: tuple[Array, Array, Array]) -> Array:
        q, visual_seen, text_seen = query
        mass = _normalised(*log_masses(q, visual_k, text_k, visual_seen, text_seen, scale=scale))
        if select_per == "kv_head":
            return jax.nn.logsumexp(mass, axis=2)
        return mass.reshape(batch, heads, mass.shape[-1])

    by_query = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (q, visual_seen, text_seen))
    return jnp.moveaxis(jax.lax.map(one, by_query, batch_size=max(1, min(query_block, q.shape[1]))), 0, 1)


def avalanche(x: UInt32[Array, "*lead"]) -> UInt32[Array, "*lead"]:
    """Hash a uint32 with the finaliser of MurmurHash3: every input bit affects every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def random_scores(
    seed: int,
    sample: PerQuery,
    order: Int[Array, "B T"],
    layer: Int[Array, ""] | int,
    heads: int,
    region_first: Int[Array, "B R"],
    first_head: Int[Array, ""] | int = 0,
) -> Float32[Array, "B T {heads} R"]:
    """Scores that depend only on seed, sample, query, layer, head and region.

    They do not change with the rest of the batch, with storage order, or between prefill and decoding.

    Args:
      seed: any integer.
      sample: int32, broadcastable to [B, T].
      order: int32 [B, T] of the queries.
      layer: int32 scalar.
      heads: Hs.
      region_first: int32 [B, R], the order of each region's first token.
      first_head: the number of the first selector, where a device has a part of them.

    Returns:
      float32 [B, T, Hs, R], uniform in [0, 1) on a grid of 2**-24.
    """
    batch, queries = order.shape
    state = avalanche(jnp.uint32(seed & 0xFFFFFFFF) + jnp.uint32(0x9E3779B9))
    identity = (
        jnp.broadcast_to(sample, (batch, queries))[:, :, None, None],
        order[:, :, None, None],
        jnp.asarray(layer, jnp.int32).reshape(1, 1, 1, 1),
        (jnp.arange(heads, dtype=jnp.int32) + first_head)[None, None, :, None],
        region_first[:, None, None, :],
    )
    for value in identity:
        state = avalanche(state ^ avalanche(value.astype(jnp.uint32) + jnp.uint32(0x9E3779B9)))
    return (state >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def forced_scores(
    forced: Int[Array, "B T Hs J"], num_regions: int
) -> tuple[Float32[Array, "B T Hs {num_regions}"], Bool[Array, "B T Hs {num_regions}"]]:
    """Scores that select exactly the listed regions, the first listed highest.

    Args:
      forced: int32 [B, T, Hs, J] region indices, -1 in unused slots; duplicates count once.
      num_regions: R.

    Returns:
      float32 [B, T, Hs, R] scores and bool [B, T, Hs, R], the regions that are listed.
    """
    hits = forced[..., :, None] == jnp.arange(num_regions, dtype=jnp.int32)
    listed = jnp.any(hits, axis=-2)
    place = jnp.argmax(hits, axis=-2)
    return -place.astype(jnp.float32), listed


def sortable(
    scores: Float32[Array, "B T Hs R"], visible: Bool[Array, "#B #T #Hs R"]
) -> Int32[Array, "B T Hs R"]:
    """Map float32 scores to int32 keys of the same order: unseen < NaN < -inf < ... < inf."""
    # -0.0 and 0.0 have different bits but must tie.
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    # Flip the magnitude of negatives so that integer order is float order.
    keys = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    keys = jnp.where(jnp.isnan(scores), _NAN, keys)
    return jnp.where(visible, keys, UNSEEN)


def tie_permutation(region_first: Int[Array, "B R"]) -> Int32[Array, "B R"]:
    """Regions by their first token: int32 [B, R]. Ties are broken in this order, not by storage."""
    return jnp.argsort(region_first, axis=-1, stable=True).astype(jnp.int32)


def _permuted(
    scores: Float32[Array, "B T Hs R"],
    visible: Bool[Array, "#B #T #Hs R"],
    permutation: Int[Array, "B R"],
) -> Int32[Array, "B T Hs R"]:
    keys = sortable(jax.lax.stop_gradient(scores), visible)
    return jnp.take_along_axis(keys, permutation[:, None, None, :], axis=-1)


def _largest(keys: Int32[Array, "B T Hs R"], count: int) -> Int32[Array, "B T Hs {count}"]:
    """Where the largest keys are, the first of equal ones first: after a permutation, the earlier region."""
    if target() != "cpu":
        return jax.lax.top_k(keys, count)[1]
    # XLA's routine for CPUs takes float32, which it compares by its bits, NaN too; int32 it sorts, in ten
    # times the time.
    bits = jnp.where(keys < 0, keys ^ jnp.int32(0x7FFFFFFF), keys)
    return jax.lax.top_k(jax.lax.bitcast_convert_type(bits, jnp.float32), count)[1]


def select_mask(
    scores: Float32[Array, "B T Hs R"],
    visible: Bool[Array, "#B #T #Hs R"],
    top_k: PerQuery,
    permutation: Int[Array, "B R"],
) -> Bool[Array, "B T Hs R"]:
    """The Top-K regions of each query, as a mask.

    Bit by bit it finds the K-th key, then among the keys equal to it the last region by tie order that is
    still chosen. Each bit is one pass that compares and counts; nothing of the size of ``scores`` is sorted
    or gathered.

    Args:
      scores: float32 [B, T, Hs, R].
      visible: bool, broadcastable to [B, T, Hs, R].
      top_k: int32, broadcastable to [B, T]; more than R means all, less than 1 means none.
      permutation: int32 [B, R] from :func:`tie_permutation`.

    Returns:
      bool [B, T, Hs, R] with min(top_k, visible) regions set per query. It carries no gradient.
    """
    batch, queries, heads, regions = scores.shape
    keys = sortable(jax.lax.stop_gradient(scores), visible)
    budget = jnp.broadcast_to(top_k, (batch, queries))[:, :, None, None]
    budget = jnp.broadcast_to(budget, (batch, queries, heads, 1))

    def number(mask: Bool[Array, "B T Hs R"]) -> Int32[Array, "B T Hs 1"]:
        return jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32)

    # The largest key that at least K keys reach. The highest bit, added to the least int32, wraps to 0.
    def raised(step: Array, cut: Array) -> Array:
        higher = cut + (jnp.int32(1) << (31 - step))
        return jnp.where(number(keys >= higher) >= budget, higher, cut)

    cut = jax.lax.fori_loop(0, 32, raised, jnp.full_like(budget, UNSEEN))
    above, ties = keys > cut, keys == cut
    free = budget - number(above)
    place = jnp.argsort(permutation, axis=-1).astype(jnp.int32)[:, None, None, :]
    bits = regions.bit_length()

    # The largest number of places, by tie order, that hold at most as many ties as are free.
    def extended(step: Array, places: Array) -> Array:
        more = places + (jnp.int32(1) << (bits - 1 - step))
        return jnp.where(number(ties & (place < more)) <= free, more, places)

    places = jax.lax.fori_loop(0, bits, extended, jnp.zeros_like(budget))
    return (above | (ties & (place < places))) & (keys > UNSEEN) & (budget >= 1)


def select_indices(
    scores: Float32[Array, "B T Hs R"],
    visible: Bool[Array, "#B #T #Hs R"],
    top_k: PerQuery,
    capacity: int,
    permutation: Int[Array, "B R"],
) -> Int32[Array, "B T Hs {capacity}"]:
    """The Top-K regions of each query, as J slots, best first.

    Args:
      scores, visible, top_k, permutation: as in :func:`select_mask`.
      capacity: J, static; the budget is min(top_k, J).

    Returns:
      int32 [B, T, Hs, J] region indices; -1 in the slots beyond the budget or the visible count.

    Raises:
      ValueError: ``capacity`` is less than 1.
    """
    if capacity < 1:
        raise ValueError(f"Selection capacity J={capacity} must be at least 1.")
    batch, queries, _, regions = scores.shape
    width = min(capacity, regions)
    keys = _permuted(scores, visible, permutation)
    indices = jnp.take_along_axis(
        jnp.broadcast_to(permutation[:, None, None, :], scores.shape), _largest(keys, width), axis=-1
    )
    budget = jnp.broadcast_to(top_k, (batch, queries))[:, :, None, None]
    budget = jnp.minimum(budget, jnp.sum(keys > UNSEEN, axis=-1, keepdims=True, dtype=jnp.int32))
    keep = jnp.arange(width, dtype=jnp.int32) < budget
    indices = jnp.where(keep, indices, -1)
    return jnp.pad(indices, ((0, 0),) * 3 + ((0, capacity - width),), constant_values=-1)
