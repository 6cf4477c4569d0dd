"""Where region scores come from: descriptors, a keyed hash, or the caller."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core import masks, regions, routing
from tests.helpers import cases, oracle

B, T, K, R, D = 2, 5, 2, 6, 16

# As programs: one for every operation takes three times as long to compile.
descriptor_scores = jax.jit(routing.descriptor_scores, static_argnames="select_per")
oracle_scores = jax.jit(routing.oracle_scores, static_argnames=("scale", "select_per", "query_block"))
forced_scores = jax.jit(routing.forced_scores, static_argnums=1)
query_features = jax.jit(routing.query_features, static_argnums=1)
select_mask = jax.jit(routing.select_mask)
select_indices = jax.jit(routing.select_indices, static_argnums=3)
mean_keys, minmax_keys = jax.jit(regions.mean_keys), jax.jit(regions.minmax_keys)
visible_keys = jax.jit(masks.visible_keys)


def _queries_and_keys(group, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, T, K * group, D)).astype(np.float32)
    keys = rng.normal(size=(B, K, R, 4, D)).astype(np.float32)
    return jnp.asarray(q, dtype), jnp.asarray(keys, dtype)


@pytest.mark.parametrize("group", [1, 4, 5, 7, 8])
@pytest.mark.parametrize("select_per", ["head", "kv_head"])
def test_edge_12_descriptor_scores_map_query_heads_to_their_kv_head(group, select_per):
    """Head h scores with kv head h // G; "kv_head" is the sum of its heads' scores (any G)."""
    q, keys = _queries_and_keys(group)
    descriptors = mean_keys(keys, jnp.ones((B, R, 4), bool))
    got = np.asarray(descriptor_scores(q, descriptors, select_per=select_per))
    q64, d64 = np.asarray(q, np.float64), np.asarray(descriptors, np.float64)
    expected = np.stack(
        [np.einsum("btd,brd->btr", q64[:, :, h], d64[:, h // group]) for h in range(K * group)], 2
    )
    if select_per == "kv_head":
        expected = expected.reshape(B, T, K, group, R).sum(3)
    assert got.dtype == np.float32 and got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_a_descriptor_score_is_the_regions_mean_logit():
    """q . mean(k) equals the mean of the region's logits, for every head."""
    q, keys = _queries_and_keys(4)
    got = descriptor_scores(q, mean_keys(keys, jnp.ones((B, R, 4), bool)), select_per="head")
    logits = np.einsum("btkgd,bkrpd->btkgrp", np.asarray(q, np.float64).reshape(B, T, K, 4, D), keys)
    np.testing.assert_allclose(got, logits.mean(-1).reshape(B, T, 4 * K, R), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("select_per", ["head", "kv_head"])
def test_minmax_scores_are_the_sum_of_each_channels_larger_product(select_per):
    """sum_d max(q_d * min_d, q_d * max_d), one channel at a time; "kv_head" adds its heads' bounds."""
    q, keys = _queries_and_keys(3)
    box = minmax_keys(keys, jnp.ones((B, R, 4), bool))
    got = descriptor_scores(query_features(q, "minmax"), box, select_per=select_per)
    q64, box64 = np.asarray(q, np.float64), np.asarray(box, np.float64)
    expected = np.zeros((B, T, K * 3, R))
    for b, t, h, r in np.ndindex(*expected.shape):
        low, high = box64[b, h // 3, r, :D], box64[b, h // 3, r, D:]
        expected[b, t, h, r] = sum(max(q64[b, t, h, d] * low[d], q64[b, t, h, d] * high[d]) for d in range(D))
    if select_per == "kv_head":
        expected = expected.reshape(B, T, K, 3, R).sum(3)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_minmax_score_bounds_every_logit_of_its_region(seed, scale):
    """q . k <= score for every valid key, and the bound is reached by a region of one key."""
    q, keys = _queries_and_keys(2, seed=seed)
    keys = keys * scale
    valid = np.random.default_rng(seed).random((B, R, 4)) < 0.7
    valid[:, 0] = np.arange(4) == 1
    box = minmax_keys(jnp.where(valid[:, None, :, :, None], keys, jnp.nan), jnp.asarray(valid))
    scores = descriptor_scores(query_features(q, "minmax"), box, select_per="head")
    logits = np.einsum("btkgd,bkrpd->btkgrp", np.asarray(q, np.float64).reshape(B, T, K, 2, D), keys)
    largest = np.where(valid[:, None, None, None], logits, -np.inf).max(-1).reshape(B, T, 2 * K, R)
    assert (np.asarray(scores) >= largest - 2e-5 * scale).all()
    np.testing.assert_allclose(scores[..., 0], largest[..., 0], rtol=2e-5, atol=2e-5 * scale)


@pytest.mark.parametrize("select_per", ["head", "kv_head"])
def test_edge_11_bf16_inputs_are_scored_in_float32(select_per):
    """bf16 queries and descriptors: scores are those of the same values in float32, and float32."""
    q, keys = _queries_and_keys(4, jnp.bfloat16)
    descriptors = mean_keys(keys, jnp.ones((B, R, 4), bool))
    got = descriptor_scores(q, descriptors, select_per=select_per)
    assert got.dtype == jnp.float32
    wide = descriptor_scores(q.astype(jnp.float32), descriptors.astype(jnp.float32), select_per=select_per)
    np.testing.assert_allclose(got, wide, rtol=1e-6, atol=1e-6)


def test_edge_11_selection_overlap_of_bf16_caches_is_counted():
    """A bf16 cache may flip regions at the cut; the overlap with float32 stays above 95 %."""
    group, count, top_k = 4, 64, 8
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(B, T, K * group, D)), jnp.float32)
    descriptors = jnp.asarray(rng.normal(size=(B, K, count, D)), jnp.float32)
    picks = []
    for dtype in (jnp.float32, jnp.bfloat16):
        scores = descriptor_scores(q.astype(dtype), descriptors.astype(dtype), select_per="head")
        permutation = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (B, count))
        picks.append(np.asarray(select_mask(scores, jnp.ones_like(scores, bool), top_k, permutation)))
    overlap = (picks[0] & picks[1]).sum() / picks[0].sum()
    assert picks[0].sum() == B * T * K * group * top_k
    assert 0.95 < overlap <= 1.0, f"overlap {overlap:.4f}"


def test_edge_16_the_softmax_scale_never_reaches_the_scores():
    """Scores are q . d without a scale: scaling q by 2 doubles them and selects the same regions."""
    q, keys = _queries_and_keys(4)
    descriptors = mean_keys(keys, jnp.ones((B, R, 4), bool))
    once, twice = (descriptor_scores(q * s, descriptors, select_per="head") for s in (1, 2))
    np.testing.assert_array_equal(np.asarray(once) * 2, twice)
    permutation = jnp.broadcast_to(jnp.arange(R, dtype=jnp.int32), (B, R))
    masks = [select_mask(s, jnp.ones_like(s, bool), 2, permutation) for s in (once, twice)]
    np.testing.assert_array_equal(*masks)


def _mass(case):
    """float64 [B, T, H, R]: the softmax of every query over what it sees, summed over each region."""
    q, visual_k, _, text_k, _ = (np.asarray(a).astype(np.float64) for a in case.arrays())
    group, (regions_, slots) = q.shape[2] // visual_k.shape[1], visual_k.shape[2:4]
    out = np.zeros((*q.shape[:3], regions_))
    for b, t, h in np.ndindex(*q.shape[:3]):
        visual, dense = oracle.prefill_seen(case.queries, case.places, None, b, t, h)
        weights = np.zeros(regions_ * slots + len(dense))
        seen = np.concatenate([visual.ravel(), dense])
        keys = np.concatenate([visual_k[b, h // group].reshape(-1, q.shape[-1]), text_k[b, h // group]])
        weights[seen] = np.exp(keys[seen] @ q[b, t, h] * case.spec.scale)
        if seen.any():
            weights /= weights.sum()
        out[b, t, h] = weights[: regions_ * slots].reshape(regions_, slots).sum(1)
    return out


@pytest.mark.parametrize(
    ("select_per", "block"),
    [pytest.param("head", 512, marks=pytest.mark.long), ("kv_head", 512), ("head", 7)],
)
def test_oracle_scores_are_the_softmax_mass_of_dense_attention(select_per, block):
    """Against a softmax written out, over packed, padded and shuffled rows; NaN in empty slots stays out."""
    case = cases.prefill(cases.rows())
    # From order 0 or from below: order -1 is no key.
    low = {name: getattr(case.queries, name) - 1 for name in ("visual_lo", "text_lo")}
    below = dataclasses.replace(case.queries, **{n: jnp.where(v < 0, v, v + 1) for n, v in low.items()})
    visual_seen, text_seen = visible_keys(below, case.places)
    empty = np.asarray(case.places.visual_order) < 0
    got = oracle_scores(
        case.q,
        jnp.where(empty[:, None, :, :, None], jnp.nan, case.visual_k),
        case.text_k,
        visual_seen,
        text_seen,
        scale=case.spec.scale,
        select_per=select_per,
        query_block=block,
    )
    expected = _mass(case)
    if select_per == "kv_head":
        expected = expected.reshape(*expected.shape[:2], 2, 2, -1).sum(3)
    assert got.dtype == jnp.float32 and not np.isnan(got).any()
    np.testing.assert_allclose(np.exp(got), expected, rtol=2e-5, atol=1e-7)


def test_small_oracle_masses_stay_distinct():
    """Regions that all lie 200 below the largest logit are still ranked."""
    keys = jnp.array([0.0, -200.0, -201.0, -202.0]).reshape(1, 1, 4, 1, 1)
    got = oracle_scores(
        jnp.ones((1, 1, 1, 1)),
        keys,
        jnp.zeros((1, 1, 0, 1)),
        jnp.ones((1, 1, 4, 1), bool),
        jnp.ones((1, 1, 0), bool),
        scale=1.0,
        select_per="head",
        query_block=1,
    )
    np.testing.assert_allclose(got[0, 0, 0], [0, -200, -201, -202])


random_scores = jax.jit(routing.random_scores, static_argnums=(0, 4))
NAMES = {
    "sample": jnp.array([[7], [8]], jnp.int32),
    "order": jnp.arange(10, 10 + T, dtype=jnp.int32)[None] + jnp.array([[0], [3]], jnp.int32),
    "layer": jnp.int32(2),
    "region_first": jnp.arange(0, 4 * R, 4, dtype=jnp.int32)[None] + jnp.zeros((B, 1), jnp.int32),
}


def _random(seed=0, heads=4, **changes):
    names = NAMES | changes
    scores = random_scores(
        seed, names["sample"], names["order"], names["layer"], heads, names["region_first"]
    )
    return np.asarray(scores)


def test_random_scores_are_keyed_by_every_name():
    """Seed, sample, order, layer, head and region each change the score; the same names give the same."""
    base = _random()
    assert base.shape == (B, T, 4, R) and base.dtype == np.float32
    np.testing.assert_array_equal(base, _random())
    for changed in (
        _random(seed=1),
        _random(seed=-1),
        _random(sample=NAMES["sample"] + 1),
        _random(order=NAMES["order"] + 1),
        _random(layer=NAMES["layer"] + 1),
        _random(region_first=NAMES["region_first"] + 1),
    ):
        assert (changed != base).mean() > 0.99
    assert len(np.unique(base)) == base.size, "heads and regions differ too"


def test_random_scores_do_not_depend_on_storage_batch_or_number_of_queries():
    """A query's scores are the same alone, decoded, in another batch, and with regions stored otherwise."""
    base = _random()
    alone = random_scores(
        0, NAMES["sample"][1:], NAMES["order"][1:, 3:4], NAMES["layer"], 4, NAMES["region_first"][1:]
    )
    np.testing.assert_array_equal(alone[0, 0], base[1, 3])
    moved = np.random.default_rng(0).permutation(R)
    np.testing.assert_array_equal(_random(region_first=NAMES["region_first"][:, moved]), base[..., moved])
    np.testing.assert_array_equal(_random(heads=2), base[:, :, :2])
    per_query = jnp.broadcast_to(NAMES["sample"], (B, T))
    np.testing.assert_array_equal(_random(sample=per_query), base)


def test_random_scores_are_uniform():
    """Mean 1/2, variance 1/12, inside [0, 1), no two orders correlated: 40,000 draws."""
    order = jnp.arange(100, dtype=jnp.int32)[None]
    first = jnp.arange(100, dtype=jnp.int32)[None]
    scores = np.asarray(random_scores(3, jnp.int32(0), order, jnp.int32(0), 4, first))[0]
    assert scores.min() >= 0 and scores.max() < 1
    assert abs(scores.mean() - 0.5) < 0.01 and abs(scores.var() - 1 / 12) < 0.003
    neighbours = np.corrcoef(scores[:-1].ravel(), scores[1:].ravel())[0, 1]
    diagonal = np.corrcoef(scores[:-1, :, :-1].ravel(), scores[1:, :, 1:].ravel())[0, 1]
    assert abs(neighbours) < 0.03 and abs(diagonal) < 0.03


def _forced(rows):
    scores, listed = forced_scores(jnp.asarray(rows, jnp.int32)[None, None, None], R)
    return np.asarray(scores)[0, 0, 0], np.asarray(listed)[0, 0, 0]


def test_edge_07_forced_regions_with_duplicates_and_minus_one():
    """Exactly the listed regions are eligible, the first mention decides the rank, -1 names nothing."""
    scores, listed = _forced([4, -1, 2, 4, -1, 2, 0])
    assert np.flatnonzero(listed).tolist() == [0, 2, 4]
    assert scores[4] > scores[2] > scores[0]
    _, listed = _forced([-1, -1])
    assert not listed.any()
    _, listed = _forced([R, R + 5])
    assert not listed.any(), "an index beyond R names no region"


@pytest.mark.parametrize(("top_k", "expected"), [(1, [4]), (2, [4, 2]), (9, [4, 2, 0])])
def test_forced_selection_keeps_the_first_listed(top_k, expected):
    """A budget below the list's length keeps its head; a larger one adds nothing that is not listed."""
    scores, listed = forced_scores(jnp.array([[[[4, -1, 2, 4, 0]]]], jnp.int32), R)
    permutation = jnp.arange(R, dtype=jnp.int32)[None]
    indices = select_indices(scores, listed, top_k, R, permutation)[0, 0, 0]
    assert indices.tolist() == expected + [-1] * (R - len(expected))
    mask = select_mask(scores, listed, top_k, permutation)[0, 0, 0]
    assert np.flatnonzero(mask).tolist() == sorted(expected)


def test_an_unknown_strategy_raises():
    """Routing refuses a name that it does not know and says which it does."""
    with pytest.raises(ValueError, match=r"Routing.strategy='oracle\?' must be one of \('descriptor', 'ora"):
        routing.Routing("oracle?")


@pytest.mark.parametrize("select_per", ["head", "kv_head"])
def test_edge_15_scores_and_indices_sharded_over_kv_heads_equal_unsharded(select_per):
    """Heads split over two devices: bitwise the same scores, the same indices, and split as asked."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",))
    q, keys = _queries_and_keys(4)
    descriptors = mean_keys(keys, jnp.ones((B, R, 4), bool))
    permutation = jnp.broadcast_to(jnp.arange(R, dtype=jnp.int32), (B, R))

    def route(q, descriptors):
        scores = routing.descriptor_scores(q, descriptors, select_per=select_per)
        return routing.select_indices(scores, jnp.ones_like(scores, bool), 3, 3, permutation)

    expected = jax.jit(route)(q, descriptors)
    heads = jax.sharding.NamedSharding(mesh, jax.P(None, None, "tensor"))
    kv = jax.sharding.NamedSharding(mesh, jax.P(None, "tensor"))
    got = jax.jit(route, out_shardings=heads)(jax.device_put(q, heads), jax.device_put(descriptors, kv))
    np.testing.assert_array_equal(got, expected)
    assert got.sharding.is_equivalent_to(heads, got.ndim)
