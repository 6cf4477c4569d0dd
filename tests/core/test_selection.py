"""Selection: stable Top-K by mask and by index, against a sort in plain Python."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core import routing
from gaze_jax.core.budget import Keep, budget_from_keep, count

B, T, H, R = 2, 3, 2, 7
FIRST = np.array([[0, 4, 8, 12, 16, 20, 24], [30, 5, 25, 10, 20, 15, 0]], np.int32)
select_mask = jax.jit(routing.select_mask)
select_indices = jax.jit(routing.select_indices, static_argnums=3)
tie_permutation = jax.jit(routing.tie_permutation)


def by_sorting(scores, visible, top_k, first):
    """Indices per query as a list: highest first, NaN last, ties to the earliest first token."""
    out = np.empty(scores.shape[:-1], object)
    for b, t, h in np.ndindex(*out.shape):

        def rank(r, b=b, t=t, h=h):
            score = scores[b, t, h, r]
            return (np.isnan(score), 0.0 if np.isnan(score) else -score, first[b, r])

        candidates = [r for r in range(scores.shape[-1]) if visible[b, t, h, r]]
        out[b, t, h] = sorted(candidates, key=rank)[: max(int(top_k[b, t]), 0)]
    return out


def select(scores, visible, top_k, first=FIRST, capacity=R):
    """Mask and indices of the implementation, as numpy."""
    permutation = tie_permutation(jnp.asarray(first))
    arrays = jnp.asarray(scores, jnp.float32), jnp.asarray(visible), jnp.asarray(top_k, jnp.int32)
    return (
        np.asarray(select_mask(*arrays, permutation)),
        np.asarray(select_indices(*arrays, capacity, permutation)),
    )


def check(scores, visible, top_k, first=FIRST):
    """Mask and indices both say what sorting says."""
    mask, indices = select(scores, visible, top_k, first)
    expected = by_sorting(np.asarray(scores, np.float32), visible, top_k, first)
    for at in np.ndindex(*expected.shape):
        wanted = expected[at]
        assert np.flatnonzero(mask[at]).tolist() == sorted(wanted), f"mask at {at}"
        assert indices[at].tolist() == wanted + [-1] * (R - len(wanted)), f"indices at {at}"


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    float(np.nextafter(np.float32(1), np.float32(2))),
    np.nan,
    np.inf,
    -np.inf,
    3e-5,
]


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.data())
def test_mask_and_indices_are_the_same_stable_top_k(data):
    """Any mix of ties, signed zeros, NaN, infinities, visibility and budgets, -1 and above R included."""
    size = B * T * H * R
    scores = np.array(data.draw(st.lists(st.sampled_from(SPECIAL), min_size=size, max_size=size)))
    visible = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    top_k = np.array(data.draw(st.lists(st.integers(-1, R + 2), min_size=B * T, max_size=B * T)))
    check(scores.reshape(B, T, H, R), visible.reshape(B, T, H, R), top_k.reshape(B, T))


def _everything(value=0.0):
    return np.full((B, T, H, R), value), np.ones((B, T, H, R), bool)


@pytest.mark.parametrize("value", [0.0, -3.5, np.nan, np.inf, -np.inf])
def test_edge_01_all_equal_scores_go_to_the_first_regions(value):
    """With every score equal the K regions with the earliest first tokens win, wherever stored."""
    scores, visible = _everything(value)
    _, indices = select(scores, visible, np.full((B, T), 3))
    assert indices[0, 0, 0].tolist() == [0, 1, 2, -1, -1, -1, -1]
    assert indices[1, 2, 1].tolist() == [6, 1, 3, -1, -1, -1, -1]
    check(scores, visible, np.full((B, T), 3))


def test_edge_01_a_tie_at_the_cut_goes_to_the_earlier_region():
    """Scores 5 1 1 1 0: K = 2 takes the 5 and the earliest of the ones."""
    scores, visible = _everything()
    scores[...] = [1, 0, 1, 5, 1, 0, 0]
    mask, _ = select(scores, visible, np.full((B, T), 2))
    assert np.flatnonzero(mask[0, 0, 0]).tolist() == [0, 3]
    assert np.flatnonzero(mask[1, 0, 0]).tolist() == [3, 4]  # firsts 30, 25, 20: the last one is earliest


def test_negative_zero_equals_zero():
    """-0.0 and 0.0 tie, so the earlier region wins whichever sign it has."""
    scores, visible = _everything()
    scores[...] = [-0.0, 0.0, -0.0, 0.0, -0.0, 0.0, -0.0]
    _, indices = select(scores, visible, np.full((B, T), 2))
    assert indices[0, 0, 0, :2].tolist() == [0, 1]
    assert indices[1, 0, 0, :2].tolist() == [6, 1]


def test_nan_ranks_below_every_number():
    """NaN of either sign comes after -inf, and before nothing."""
    scores, visible = _everything()
    scores[...] = [np.nan, -np.inf, -np.nan, 1, np.nan, np.nan, np.nan]
    _, indices = select(scores, visible, np.full((B, T), 3))
    assert indices[0, 0, 0].tolist() == [3, 1, 0, -1, -1, -1, -1]
    assert indices[1, 0, 0].tolist() == [3, 1, 6, -1, -1, -1, -1]


def test_fewer_visible_than_top_k_leaves_minus_one():
    """Slots beyond the visible count are -1, and the mask has no more than the visible regions."""
    scores, visible = _everything()
    visible[...] = [False, True, False, False, True, False, False]
    mask, indices = select(scores, visible, np.full((B, T), 5))
    assert indices[0, 0, 0].tolist() == [1, 4, -1, -1, -1, -1, -1]
    assert (mask == visible).all()
    mask, indices = select(scores, visible & False, np.full((B, T), 5))
    assert (indices == -1).all() and not mask.any()


@pytest.mark.parametrize("top_k", [R, R + 1, 10**6, 2**31 - 1])
def test_edge_02_top_k_of_all_regions_or_more_selects_everything(top_k):
    """top_k >= R marks every visible region."""
    scores, visible = _everything(1.0)
    visible[0, :, :, 2] = False
    mask, _ = select(scores, visible, np.full((B, T), top_k))
    assert (mask == visible).all()


@pytest.mark.parametrize("top_k", [0, -1, -(2**31)])
def test_top_k_below_one_selects_nothing(top_k):
    """A budget of 0 or less is an empty selection, not an error and not everything."""
    scores, visible = _everything(np.arange(R))
    mask, indices = select(scores, visible, np.full((B, T), top_k))
    assert not mask.any() and (indices == -1).all()


def test_capacity_bounds_the_budget_and_pads_with_minus_one():
    """J < top_k keeps the best J; J > R pads; J < 1 raises."""
    scores, visible = _everything()
    scores[...] = np.arange(R)
    assert select(scores, visible, np.full((B, T), 5), capacity=2)[1][0, 0, 0].tolist() == [6, 5]
    wide = select(scores, visible, np.full((B, T), 99), capacity=R + 2)[1]
    assert wide[0, 0, 0].tolist() == [6, 5, 4, 3, 2, 1, 0, -1, -1]
    with pytest.raises(ValueError, match="capacity J=0 must be at least 1"):
        select(scores, visible, np.full((B, T), 1), capacity=0)


def test_top_k_is_traced_and_may_differ_per_query():
    """One compiled program serves every budget, and [B, T] budgets apply to their own query."""
    # Fresh functions: programs compiled by other tests do not count.
    mask_of = jax.jit(lambda *args: routing.select_mask(*args))
    indices_of = jax.jit(lambda s, v, k, p: routing.select_indices(s, v, k, R, p))
    scores, visible = (jnp.asarray(a) for a in _everything(1.0))
    scores, permutation = scores.astype(jnp.float32), tie_permutation(jnp.asarray(FIRST))
    for top_k in range(R + 3):
        budget = (jnp.arange(B * T, dtype=jnp.int32).reshape(B, T) + top_k) % (R + 1)
        mask = mask_of(scores, visible, budget, permutation)
        indices = indices_of(scores, visible, budget, permutation)
        assert (np.asarray(mask).sum(-1) == np.asarray(budget)[:, :, None]).all()
        assert ((np.asarray(indices) >= 0).sum(-1) == np.asarray(budget)[:, :, None]).all()
    assert mask_of._cache_size() == 1
    assert indices_of._cache_size() == 1


@hypothesis.given(st.permutations(range(R)), st.integers(0, 5))
def test_storage_order_does_not_change_the_selection(permutation, seed):
    """Regions stored otherwise: the same regions are chosen, ties included."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, (B, T, H, R)).astype(np.float32)
    visible = rng.random((B, T, H, R)) < 0.7
    top_k = rng.integers(1, R, (B, T))
    mask, indices = select(scores, visible, top_k)
    moved = list(permutation)
    mask2, indices2 = select(scores[..., moved], visible[..., moved], top_k, FIRST[:, moved])
    assert (mask2 == mask[..., moved]).all()
    assert (np.where(indices2 >= 0, np.array(moved)[indices2], -1) == indices).all()


def test_edge_10_no_gradient_goes_through_the_selection():
    """The descriptors' scores get a gradient of exactly 0 from anything selected by them."""
    scores, visible = (jnp.asarray(a) for a in _everything(1.0))
    permutation = tie_permutation(jnp.asarray(FIRST))

    def loss(scores):
        mask = select_mask(scores, visible, jnp.full((B, T), 3), permutation)
        picked = select_indices(scores, visible, jnp.full((B, T), 3), 3, permutation)
        return jnp.sum(mask.astype(jnp.float32)) + jnp.sum(picked.astype(jnp.float32))

    grad = jax.jit(jax.grad(loss))(scores.astype(jnp.float32) * jnp.arange(R, dtype=jnp.float32))
    assert (np.asarray(grad) == 0).all()


@pytest.mark.parametrize("regions", [0, 1])
def test_edge_03_no_region_and_a_single_region(regions):
    """R = 0 selects nothing and R = 1 selects the one region, by mask and by index."""
    scores = jnp.zeros((1, 2, 2, regions))
    visible = jnp.ones((1, 2, 1, regions), bool)
    permutation = tie_permutation(jnp.zeros((1, regions), jnp.int32))
    top_k = jnp.ones((1, 1), jnp.int32)
    mask = select_mask(scores, visible, top_k, permutation)
    indices = select_indices(scores, visible, top_k, 2, permutation)
    assert mask.shape == (1, 2, 2, regions) and bool(mask.all())
    assert (np.asarray(indices) == ([-1, -1] if regions == 0 else [0, -1])).all()


def test_edge_17_selection_twice_is_bitwise_equal():
    """The same program on the same scores gives the same bits."""
    rng = np.random.default_rng(0)
    scores, visible = rng.integers(0, 2, (B, T, H, R)), np.ones((B, T, H, R), bool)
    runs = [select(scores, visible, np.full((B, T), 3)) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("keep", "visible", "expected"),
    [(1.0, 7, 7), (0.5, 6, 3), (0.1, 7, 1), (0.0, 7, 1), (0.1, 555, 56), (0.3, 0, 1), (2.0, 3, 6)],
)
def test_budget_from_keep(keep, visible, expected):
    """round(keep * regions in sight), at least 1: a 7-region image and a 555-region video share a setting."""
    budget = budget_from_keep(keep, jnp.full((1, 1), visible, jnp.int32))
    assert budget.dtype == jnp.int32
    assert budget.tolist() == [[expected]]


def test_budget_from_keep_is_per_query():
    """Unequal samples and queries in a batch get unequal budgets from one traced fraction."""
    seen = jnp.array([[4, 8], [20, 0]], jnp.int32)
    assert jax.jit(budget_from_keep)(jnp.float32(0.5), seen).tolist() == [[2, 4], [10, 1]]
    per_sample = budget_from_keep(jnp.array([[0.25], [1.0]]), seen)
    assert per_sample.tolist() == [[1, 2], [20, 1]]


@pytest.mark.parametrize("top_k", [1, 3, R, 99])
def test_a_fraction_of_all_with_a_limit_is_a_count(top_k):
    """The selections are the same, also of a query that sees fewer regions, or none."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(B, T, H, R)).astype(np.float32)
    visible = np.arange(R) < rng.integers(0, R + 1, size=(B, T, 1))
    visible[0, 0] = False
    permutation = tie_permutation(jnp.asarray(FIRST))
    visible_count = jnp.sum(jnp.asarray(visible), axis=-1, dtype=jnp.int32)
    both = count(Keep(jnp.ones(()), jnp.int32(top_k)), visible_count)
    seen = jnp.asarray(visible)[:, :, None]
    for select, more in ((select_mask, ()), (select_indices, (4,))):
        found, wanted = (
            select(scores, seen, budget, *more, permutation) for budget in (both, jnp.int32(top_k))
        )
        np.testing.assert_array_equal(found, wanted)
    assert count(Keep(0.5, 2), jnp.full((1, 1), 7, jnp.int32)).item() == 2
    assert count(Keep(0.1, 2), jnp.full((1, 1), 7, jnp.int32)).item() == 1
