"""The union of a kv head's selections, against Python sets."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.gaze_decode import plan

_union = jax.jit(plan.union, static_argnums=(1, 2, 3))


def _expected(picks, regions):
    """Region -> the heads that list it, for one kv head's [G or 1, J] lists."""
    found = {}
    for head, row in enumerate(picks):
        for region in row:
            if 0 <= region < regions:
                found.setdefault(int(region), set()).add(head)
    return dict(sorted(found.items()))


@given(
    st.integers(0, 2**32 - 1),
    # Few shapes, as each compiles: (G, lists, J, R).
    st.sampled_from([(1, 1, 3, 5), (4, 4, 9, 5), (4, 1, 4, 12), (7, 7, 1, 1), (15, 15, 5, 12)]),
)
def test_equals_sets(seed, shape):
    """Regions, heads and count for random lists with -1 and duplicates, J above and below R."""
    group, lists, capacity, regions = shape
    rng = np.random.default_rng(seed)
    picks = rng.integers(-1, regions, size=(2, 3, lists, capacity))
    got = jax.tree.map(
        np.asarray, _union(jnp.asarray(picks.reshape(2, -1, capacity), jnp.int32), 3, group, regions)
    )
    width = min(lists * capacity, regions)
    assert got.regions.shape == got.heads.shape == (2, 3, width)
    for b in range(2):
        for k in range(3):
            expected = _expected(picks[b, k], regions)
            pad = [-1] * (width - len(expected))
            assert got.count[b, k] == len(expected)
            assert got.regions[b, k].tolist() == [*expected, *pad]
            everyone = (1 << group) - 1
            bits = [everyone if lists == 1 else sum(1 << h for h in hs) for hs in expected.values()]
            assert got.heads[b, k].tolist() == [*bits, *[0] * len(pad)]


def test_everything_is_the_union_of_full_lists():
    """Dense attention's plan equals listing all regions, in any order."""
    indices = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[::-1], (2, 8, 6))
    got, expected = plan.union(indices, 2, 4, 6), plan.everything(2, 2, 4, 6)
    chex.assert_trees_all_equal(got, expected, strict=True)


def test_too_many_heads_are_refused():
    """16 heads per kv head would overflow the running sum of a long list."""
    with pytest.raises(NotImplementedError, match="at most 15 query heads per kv head, not 16"):
        plan.union(jnp.zeros((1, 16, 1), jnp.int32), 1, 16, 4)
