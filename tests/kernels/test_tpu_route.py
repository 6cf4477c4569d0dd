"""Routing in the call of the TPU kernels, interpreted: against scores and selection by core.routing."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core import routing
from pallas_kernels.gaze_decode import api, tpu_lists, tpu_select
from tests.helpers import cases
from tests.helpers.routed import close, expected
from tests.kernels.decode_values import long


def routed(case, *selecting, capacity):
    """A :class:`Routed`, by the TPU kernels."""
    options = {"spec": cases.runnable(case.spec), "implementation": "tpu"}
    kept = (case.q, api.pack(case.k, case.v, **options), case.text_k, case.text_v, case.layer)
    seen = (case.visual_seen, case.text_seen)
    return api.route_and_decode(*kept, *seen, case.q, *selecting, capacity=capacity, **options)


def problem(*, seed=0, capacity=4, **sizes):
    """A case, and what selects: of few whole numbers, so scores are exact and tie; hidden regions."""
    case = cases.decode(seed=seed, capacity=capacity, **sizes)
    rng = np.random.default_rng(seed)
    batch = case.q.shape[0]
    regions = case.k.shape[3]
    q = rng.integers(-2, 3, size=case.q.shape) * (np.arange(case.q.shape[-1]) < 2)
    q = jnp.asarray(q, case.q.dtype)
    shape = (*case.k.shape[:4], case.q.shape[-1])
    descriptors = jnp.asarray(rng.integers(-2, 3, size=shape), case.q.dtype)
    budget = jnp.asarray(rng.integers(0, capacity + 2, size=batch), jnp.int32)
    visible = jnp.asarray(rng.random((batch, regions)) < 0.8)
    order = jnp.asarray(np.stack([rng.permutation(regions) for _ in range(batch)]), jnp.int32)
    return dataclasses.replace(case, q=q), (descriptors, budget, visible, order)


def same(case, selecting, capacity):
    """Equal indices; scores, output and log-sum-exp within rounding. Returns the indices."""
    got, wanted = (
        jax.jit(functools.partial(run, capacity=capacity))(case, *selecting) for run in (routed, expected)
    )
    cases.no_races(got)
    return close(got, wanted, case.q.dtype)


@pytest.mark.parametrize(
    ("select_per", "kind", "dim", "group"),
    [
        ("kv_head", "int8", 128, 3),
        *(
            long(*rest)
            for rest in itertools.product(
                ("head", "kv_head"), ("float32", "bfloat16", "int8"), (64, 128), (1, 2, 8)
            )
        ),
    ],
)
def test_routing_in_the_call_equals_routing_before_it(select_per, kind, dim, group):
    """Ties, hidden regions, an odd number of regions in several chunks, four rows of a core."""
    dtype = jnp.float32 if kind == "float32" else jnp.bfloat16
    sizes = {"regions": 37, "slots": 9, "dim": dim, "group": group, "layers": 2, "kv_heads": 4}
    case, (descriptors, _, *rest) = problem(seed=3, capacity=21, select_per=select_per, dtype=dtype, **sizes)
    selecting = (descriptors, jnp.asarray([18, 30], jnp.int32), *rest)
    spec = dataclasses.replace(case.spec, visual_dtype="int8" if kind == "int8" else None)
    indices = same(dataclasses.replace(case, spec=spec), selecting, 21)
    assert (indices >= 0).sum(-1).max() > 16, "more than a chunk"


@pytest.mark.parametrize("select_per", ["head", long("kv_head")])
def test_scores_that_are_no_numbers_and_budgets_of_any_size(select_per, monkeypatch):
    """NaN below every number, -0.0 and 0.0; budgets 0, negative and more than visible; nothing visible.

    Regions are in three tiles, and so are the lists.
    """
    monkeypatch.setattr(tpu_lists, "tile_of", lambda selectors, regions: 128)
    case, selecting = problem(seed=4, size=5, regions=300, slots=2, capacity=160, select_per=select_per)
    descriptors, _, visible, order = selecting
    unknown = np.random.default_rng(0).random(descriptors.shape[1:4]) < 0.4
    descriptors = jnp.where(unknown[..., None], jnp.nan, 0.0 * descriptors)
    budget = jnp.asarray([0, -3, 1000, 40, 150], jnp.int32)
    visible = visible.at[3].set(False)
    case = dataclasses.replace(case, q=jnp.where(case.q == 0, -0.0, case.q))
    selecting = (descriptors, budget, visible, order)
    indices = same_with_nan(case, selecting, 160)
    used = (indices >= 0).sum(-1)
    assert (
        (used[:2] == 0).all() and (used[2] == 160).all() and (used[3] == 0).all() and (used[4] == 150).all()
    )


def same_with_nan(case, selecting, capacity):
    """:func:`same` where scores are NaN."""
    got, wanted = (
        jax.jit(functools.partial(run, capacity=capacity))(case, *selecting) for run in (routed, expected)
    )
    cases.no_races(got)
    for mine, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5, equal_nan=True)
    np.testing.assert_array_equal(got[2], wanted[2])
    return np.asarray(got[2])


@pytest.mark.parametrize("select_per", ["head", long("kv_head")])
def test_the_lists_are_what_the_indices_say(select_per, monkeypatch):
    """Each kv head's union in storage order, with a bit per query head and per slot that counts; 3 tiles."""
    monkeypatch.setattr(tpu_lists, "tile_of", lambda selectors, regions: 128)
    case, selecting = problem(seed=5, regions=300, slots=36, capacity=50, select_per=select_per, group=3)
    kv_heads, group, regions = 2, 3, 300
    static = tpu_lists.selecting(kv_heads, group, regions, 50, selecting[0], case.spec)
    _, _, indices, _ = jax.jit(lambda case, *a: expected(case, *a, capacity=50))(case, *selecting)
    listed = jax.jit(
        lambda indices, seen: tpu_lists.named_by(
            indices, seen, kv_heads, group, spec=cases.runnable(case.spec)
        )
    )(indices, case.visual_seen)
    indices = np.asarray(indices).reshape(2, kv_heads, -1, 50)
    for b, head in np.ndindex(2, kv_heads):
        ids, side = np.asarray(listed.ids[b, head, 0]), np.asarray(listed.side[b, head])
        wanted = sorted(set(indices[b, head].ravel()) - {-1})
        count = ids[-1]
        assert ids[:count].tolist() == wanted and (ids[count:-1] == -1).all()
        for place, region in enumerate(wanted):
            lists = np.flatnonzero((indices[b, head] == region).any(-1))
            assert side[0, place] == (sum(1 << g for g in lists) if select_per == "head" else 7)
            words = side[1:3, place].view(np.uint32)
            slots = [bool(words[slot // 32] >> (slot % 32) & 1) for slot in range(36)]
            assert slots == np.asarray(case.visual_seen[b, region]).tolist()
        assert (side[0, count:] == 0).all()
    assert static.union == (150 if select_per == "head" else 50)


@pytest.mark.parametrize("select_per", [long("head"), long("kv_head")])
def test_without_regions_the_text_stream_is_read(select_per):
    case, selecting = problem(regions=0, select_per=select_per)
    got = jax.jit(lambda case, *a: routed(case, *a, capacity=4))(case, *selecting)
    wanted = jax.jit(lambda case: routed_text(case))(case)
    np.testing.assert_allclose(got.out, wanted, rtol=2e-5, atol=2e-5)
    selectors = 4 if select_per == "head" else 2
    assert got.scores.shape == (2, selectors, 0) and (np.asarray(got.indices) == -1).all()
    assert got.indices.shape == (2, selectors, 4)


def routed_text(case):
    """What the reference gives without regions."""
    packed = api.pack(case.k, case.v, spec=case.spec, implementation="reference")
    arguments = (case.q, packed, case.text_k, case.text_v, case.layer, None, case.visual_seen, case.text_seen)
    return api.gaze_decode(*arguments, spec=case.spec, implementation="reference")


@pytest.mark.long
def test_routing_under_vmap():
    """Several queries of one cache: a loop of calls."""
    case, selecting = problem(seed=1, capacity=3)
    queries = jnp.stack([case.q, -case.q])

    def run(q):
        return routed(dataclasses.replace(case, q=q), *selecting, capacity=3)

    mapped, plain = jax.jit(jax.vmap(run))(queries), [jax.jit(run)(q) for q in queries]
    for got, *wanted in zip(mapped, *plain, strict=True):
        np.testing.assert_allclose(got, np.stack(wanted), rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused():
    """16 query heads per kv head, and lists that are longer than scalar memory."""
    case, selecting = problem(group=16)
    with pytest.raises(NotImplementedError, match="at most 15 query heads per kv head, not 16"):
        jax.eval_shape(lambda: routed(case, *selecting, capacity=4))
    case, selecting = problem(regions=32_001, slots=1, layers=1, dim=2, size=1, capacity=32_001)
    with pytest.raises(NotImplementedError, match="at most 32000 regions per kv head in scalar memory, not"):
        jax.eval_shape(lambda: routed(case, *selecting, capacity=32_001))


@pytest.mark.parametrize("static", [(8, 4, 29_128), (8, 4, 128), (1, 1, 1), (2, 7, 555)])
def test_a_tile_is_a_power_of_two_registers(static):
    kv_heads, group, regions = static
    for selectors in (kv_heads, kv_heads * group):
        tile = tpu_lists.tile_of(selectors, regions)
        assert tile % 128 == 0 and tile & (tile - 1) == 0
        assert tile == 128 or (tile < 2 * regions and tile * max(8, selectors) <= 8 * 8 * 128)


def test_a_key_is_in_the_order_of_its_score():
    """unseen < NaN < -inf < ... < -0.0 = 0.0 < ... < inf, as ``core.routing`` has it."""
    scores = jnp.asarray([np.nan, -np.inf, -3.0, -1e-30, -0.0, 0.0, 1e-30, 2.0, np.inf], jnp.float32)
    keys = tpu_select.sortable(scores, jnp.ones(9, bool))
    np.testing.assert_array_equal(keys, routing.sortable(scores, jnp.ones(9, bool)))
    assert (np.diff(np.asarray(keys, np.int64)) > 0).sum() == 7 and keys[4] == keys[5]
    assert (tpu_select.sortable(scores, jnp.zeros(9, bool)) == routing.UNSEEN).all()
