"""Cutting grids into regions, moving tokens there and back, and describing regions by mean keys."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core import regions

grids = st.tuples(st.integers(1, 30), st.integers(1, 30)).flatmap(
    lambda grid: st.tuples(st.just(grid), st.tuples(st.integers(1, grid[0]), st.integers(1, grid[1])))
)


@hypothesis.given(grids)
def test_partition_covers_every_token_once_in_balanced_rectangles(case):
    """Every token is in exactly one region; regions are rectangles; sides differ by at most one token."""
    (height, width), (r_h, r_w) = case
    slots = regions.partition(height, width, (r_h, r_w))
    assert slots.dtype == np.int32
    assert sorted(slots[slots >= 0].tolist()) == list(range(height * width))
    assert len(slots) == -(-height // r_h) * -(-width // r_w)
    sides = []
    for region in slots:
        tokens = region[region >= 0]
        assert (region[: len(tokens)] == tokens).all(), "valid slots come first"
        rows, cols = np.unique(tokens // width), np.unique(tokens % width)
        expected = (rows[:, None] * width + cols).ravel()
        assert tokens.tolist() == expected.tolist(), "a rectangle, in raster order"
        assert np.ptp(rows) == len(rows) - 1 and np.ptp(cols) == len(cols) - 1
        sides.append((len(rows), len(cols)))
    heights, widths = np.array(sides).T
    assert np.ptp(heights) <= 1 and np.ptp(widths) <= 1
    assert heights.max() <= r_h and widths.max() <= r_w
    assert slots.shape[1] == heights.max() * widths.max()
    firsts = slots[:, 0]
    assert (np.lexsort((firsts % width, firsts // width)) == np.arange(len(slots))).all(), "raster order"


def test_partition_of_27_by_6_has_no_sliver():
    """27 tokens by 6 make 6, 6, 5, 5, 5 and not 6, 6, 6, 6, 3."""
    assert regions.balanced_sides(27, 6) == [6, 6, 5, 5, 5]
    slots = regions.partition(27, 27, (6, 6))
    assert (slots >= 0).sum(1).min() == 25
    assert regions.slot_fill(slots) == pytest.approx(729 / (25 * 36))


def test_partition_of_the_papers_grids():
    """24x24 by 6x6 makes 16 regions of 36; 32x32 by 8x8 makes 16 of 64; both are full."""
    for side, region in ((24, 6), (32, 8)):
        slots = regions.partition(side, side, (region, region))
        assert slots.shape == (16, region**2)
        assert regions.slot_fill(slots) == 1.0


@pytest.mark.parametrize(
    ("grid", "region", "match"),
    [
        ((4, 4), (5, 1), "Region 5x1 must be at least 1x1 and fit the 4x4 token grid"),
        ((4, 4), (1, 5), "Region 1x5"),
        ((4, 4), (0, 1), "Region 0x1"),
        ((0, 4), (1, 1), "Token grid 0x4"),
    ],
)
def test_partition_says_what_does_not_fit(grid, region, match):
    """A region larger than the grid, or not positive, raises one sentence with both sizes."""
    with pytest.raises(ValueError, match=match):
        regions.partition(*grid, region)


@pytest.mark.parametrize(
    ("height", "width", "region"), [(5, 5, (2, 2)), (1, 7, (1, 3)), (6, 4, (4, 4)), (3, 2, (1, 1))]
)
def test_region_major_round_trip(height, width, region):
    """from_regions(to_regions(x)) == x; empty slots are 0 and storage order does not matter."""
    slots = regions.partition(height, width, region)
    rng = np.random.default_rng(height)
    slots = rng.permuted(slots[rng.permutation(len(slots))], axis=1)
    features = rng.normal(size=(2, height * width, 3)).astype(np.float32)
    src = jnp.asarray(np.stack([slots, slots[::-1]]))
    moved = regions.to_regions(jnp.asarray(features), src)
    assert moved.shape == (*src.shape, 3)
    assert (np.asarray(moved)[np.asarray(src) < 0] == 0).all()
    assert (np.asarray(moved)[1, 0, 0] == (features[1, slots[-1, 0]] if slots[-1, 0] >= 0 else 0)).all()
    np.testing.assert_array_equal(regions.from_regions(moved, src, height * width), features)


def test_from_regions_ignores_what_empty_slots_hold():
    """NaN in an empty slot does not come back, and absent tokens are 0."""
    src = jnp.array([[[2, -1], [0, -1]]], jnp.int32)
    values = jnp.array([[[[1.0], [jnp.nan]], [[2.0], [jnp.nan]]]])
    back = regions.from_regions(values, src, 4)
    assert np.asarray(back)[0, :, 0].tolist() == [2.0, 0.0, 1.0, 0.0]


def _keys(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_edge_04_mean_of_partial_regions_counts_valid_tokens_only():
    """Regions of 4, 3, 1 and 0 valid tokens: the mean divides by those; NaN in the tail stays out."""
    keys = _keys((2, 3, 4, 4, 8))
    valid = np.arange(4) < np.array([[4, 3, 1, 0], [1, 4, 0, 2]])[:, :, None]
    poisoned = np.where(valid[:, None, :, :, None], keys, np.nan)
    got = np.asarray(regions.mean_keys(jnp.asarray(poisoned), jnp.asarray(valid)))
    for b, k, r in np.ndindex(2, 3, 4):
        mine = keys[b, k, r][valid[b, r]].astype(np.float64)
        expected = mine.mean(0) if len(mine) else np.zeros(8)
        np.testing.assert_allclose(got[b, k, r], expected, rtol=2e-6, atol=1e-7)


def test_edge_04_gradient_of_the_mean_ignores_empty_slots():
    """d mean / d key is 1 / count on valid slots and exactly 0 on the NaN in empty ones."""
    valid = jnp.array([[[True, True, True, False]]])
    keys = jnp.where(valid[:, None, :, :, None], 1.0, jnp.nan) * jnp.ones((1, 1, 1, 4, 2))
    grad = np.asarray(jax.grad(lambda k: regions.mean_keys(k, valid).sum())(keys))
    np.testing.assert_allclose(grad[0, 0, 0, :3], 1 / 3, rtol=1e-6)
    assert (grad[0, 0, 0, 3] == 0).all()


def test_mean_keys_accumulates_bf16_in_float32():
    """256 + 255 ones: a bfloat16 sum would stick at 256 (mean 1.0); float32 gives 1.996."""
    keys = np.ones((1, 1, 1, 256, 1), np.float32)
    keys[0, 0, 0, 0] = 256
    got = regions.mean_keys(jnp.asarray(keys, jnp.bfloat16), jnp.ones((1, 1, 256), bool))
    assert got.dtype == jnp.bfloat16
    assert float(got[0, 0, 0, 0]) == float(jnp.bfloat16(511 / 256))


def _minmax_by_loop(keys, valid):
    """One channel of one region at a time."""
    out = np.zeros((*keys.shape[:3], 2 * keys.shape[-1]), keys.dtype)
    for b, k, r, d in np.ndindex(*keys.shape[:3], keys.shape[-1]):
        mine = [keys[b, k, r, p, d] for p in range(keys.shape[3]) if valid[b, r, p]]
        if mine:
            out[b, k, r, d], out[b, k, r, keys.shape[-1] + d] = min(mine), max(mine)
    return out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_edge_04_minmax_of_partial_regions_is_of_valid_tokens_only(dtype):
    """Regions of 4, 3, 1 and 0 valid tokens: extremes of those alone, exact; NaN in the tail stays out."""
    keys = np.asarray(jnp.asarray(_keys((2, 3, 4, 4, 8)), dtype))
    valid = np.arange(4) < np.array([[4, 3, 1, 0], [1, 4, 0, 2]])[:, :, None]
    poisoned = np.where(valid[:, None, :, :, None], keys, np.array(np.nan, keys.dtype))
    got = regions.minmax_keys(jnp.asarray(poisoned), jnp.asarray(valid))
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got), _minmax_by_loop(keys, valid))


@pytest.mark.parametrize(("descriptor", "width"), [("mean", 8), ("minmax", 16)])
def test_a_descriptor_is_as_wide_as_it_says(descriptor, width):
    """``descriptor_width`` is the last axis of ``describe``; the table of names is complete."""
    keys, valid = _keys((1, 2, 3, 4, 8)), np.ones((1, 3, 4), bool)
    described = regions.describe(jnp.asarray(keys), jnp.asarray(valid), descriptor)
    assert described.shape == (1, 2, 3, width)
    assert regions.descriptor_width(descriptor, 8) == width
    assert set(regions.DESCRIPTORS) == {"mean", "minmax"}


def test_q_dot_mean_is_the_mean_logit():
    """q . mean(k) equals the mean of q . k over the region's valid tokens."""
    keys, q = _keys((1, 2, 5, 6, 16)), _keys((16,), 1)
    valid = np.random.default_rng(2).random((1, 5, 6)) < 0.6
    valid[:, :, 0] = True
    means = np.asarray(regions.mean_keys(jnp.asarray(keys), jnp.asarray(valid)))
    logits = keys.astype(np.float64) @ q
    for k, r in np.ndindex(2, 5):
        np.testing.assert_allclose(
            means[0, k, r] @ q, logits[0, k, r][valid[0, r]].mean(), rtol=2e-5, atol=2e-6
        )


def test_edge_14_incremental_descriptors_equal_a_full_recompute():
    """Regions appended one view at a time have, bit for bit, the descriptors of all regions together."""
    keys, valid = _keys((1, 2, 9, 4, 8)), np.random.default_rng(1).random((1, 9, 4)) < 0.7
    together = np.asarray(regions.mean_keys(jnp.asarray(keys), jnp.asarray(valid)))
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        part = regions.mean_keys(jnp.asarray(keys[:, :, start:stop]), jnp.asarray(valid[:, start:stop]))
        np.testing.assert_array_equal(part, together[:, :, start:stop])


def test_region_span():
    """First and last order of valid tokens, in any slot order; -1 for an empty region."""
    order = jnp.array([[[5, -1, 3], [-1, -1, -1], [0, 9, 4]]], jnp.int32)
    first, last = regions.region_span(order)
    assert np.asarray(first).tolist() == [[3, -1, 0]]
    assert np.asarray(last).tolist() == [[5, -1, 9]]
