"""Routing in the GPU kernels: scores, selection, list and attention in one call, interpreted and lowered.

Interpreted, the tensor cores' products are plain ones, an element per thread is written as a whole row, and
layouts vanish; searches, copies, indices, barriers and masks are the kernels' own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.mosaic import gpu as mgpu

from gaze_jax.core import routing
from pallas_kernels import GazeSpec
from pallas_kernels.dispatch import compile_for
from pallas_kernels.gaze_decode import api, gpu_merge, gpu_scores, gpu_select, gpu_step
from pallas_kernels.gaze_decode.gpu_kernel import Shape, Tiles
from tests.helpers import cases
from tests.helpers.routed import close, expected
from tests.kernels.decode_values import long

pytestmark = pytest.mark.usefixtures("_no_races")


@pytest.fixture
def _no_races():
    """Fails a test in which two accesses were ordered by nothing but luck."""
    yield
    races = gpu_callbacks._races  # None until a kernel has been interpreted
    assert races is None or not races.races_found


def problem(seed, **sizes):
    """A case, and what selects: whole numbers, so that scores are exact and many tie; NaN in some of them."""
    case = cases.decode(seed=seed, **sizes)
    rng = np.random.default_rng(seed)
    batch, _, dim = case.q.shape
    lead, regions = case.k.shape[:3], case.k.shape[3]
    q = jnp.asarray(rng.integers(-2, 3, size=case.q.shape), case.q.dtype)
    descriptors = rng.integers(-2, 3, size=(*lead, regions, dim)).astype(np.float32)
    descriptors[..., rng.random(regions) < 0.2, 0] = np.nan
    budget = jnp.asarray([regions // 3, 0, regions + 2, 1][:batch], jnp.int32)
    visible = jnp.asarray(rng.random((batch, regions)) < 0.8)
    order = jnp.asarray(np.stack([rng.permutation(regions) for _ in range(batch)]), jnp.int32)
    return dataclasses.replace(case, q=q), (jnp.asarray(descriptors, case.q.dtype), budget, visible, order)


def routed(case, descriptors, budget, visible, order, *, capacity, step=False):
    """By the GPU kernels; with ``step`` what depends on the step alone is made before."""
    options = {"spec": cases.runnable(case.spec), "implementation": "gpu"}
    packed = api.pack(case.k, case.v, **options)
    seen = (case.visual_seen, case.text_seen)
    masks = api.masks(packed, *seen, visible, order, **options) if step else None
    arguments = (case.q, packed, case.text_k, case.text_v, case.layer, *seen, case.q)
    selecting = (descriptors, budget, visible, order)
    return api.route_and_decode(*arguments, *selecting, capacity=capacity, step=masks, **options)


def same(case, selecting, capacity, step=False):
    """All four results of both."""
    both = (functools.partial(routed, step=step), expected)
    got, wanted = (jax.jit(functools.partial(run, capacity=capacity))(case, *selecting) for run in both)
    close(got, wanted, case.q.dtype)


def int8(case):
    return dataclasses.replace(case, spec=dataclasses.replace(case.spec, visual_dtype="int8"))


@pytest.mark.parametrize(
    ("select_per", "sizes", "capacity", "kind"),
    [
        # Two tiles of scores, the second moved back; ties, NaN, hidden regions, budgets 0, some, all.
        ("head", {"size": 3, "kv_heads": 1, "group": 3, "regions": 70, "slots": 3}, 40, "float32"),
        ("kv_head", {"group": 3, "regions": 9}, 9, "int8"),
        long("kv_head", {"size": 3, "regions": 70, "slots": 3}, 40, "bfloat16"),
        long("head", {"regions": 9}, 4, "int8"),
        long("head", {"regions": 65, "slots": 70, "dim": 64, "text": 150}, 70, "bfloat16"),
        *(long("head", {"group": g, "regions": 6}, 3, "float32") for g in range(1, 9)),
        *(long("kv_head", {"group": g, "regions": 6}, 3, "float32") for g in range(1, 9)),
    ],
)
def test_routing_in_the_call_equals_routing_before_it(select_per, sizes, capacity, kind):
    """The same indices, scores, output and log-sum-exp."""
    dtype = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
    case, selecting = problem(3, select_per=select_per, dtype=dtype, **sizes)
    # int8 rounds in every implementation alike.
    same(int8(case) if kind == "int8" else case, selecting, capacity, step=kind == "int8")


@pytest.mark.long
def test_twenty_shapes():
    rng = np.random.default_rng(0)
    for seed in range(20):
        sizes = {
            "layers": int(rng.integers(1, 4)),
            "size": int(rng.integers(1, 4)),
            "kv_heads": int(rng.integers(1, 4)),
            "group": int(rng.integers(1, 10)),
            "regions": int(rng.integers(1, 140)),
            "slots": int(rng.integers(1, 40)),
            "text": int(rng.integers(0, 300)),
            "dim": int(rng.integers(1, 129)),
            "select_per": ("head", "kv_head")[seed % 2],
            "dtype": (jnp.float32, jnp.bfloat16)[seed // 2 % 2],
        }
        same(*problem(seed, **sizes), int(rng.integers(1, sizes["regions"] + 3)), step=bool(seed % 3))


@pytest.mark.long
def test_under_vmap():
    """Several queries of one cache."""
    case, selecting = problem(1)
    queries = jnp.stack([case.q, case.q[::-1], -case.q])

    def run(q):
        return routed(dataclasses.replace(case, q=q), *selecting, capacity=3)

    got, one = jax.jit(jax.vmap(run))(queries), [jax.jit(run)(q) for q in queries]
    for mapped, each in zip(got, jax.tree.map(lambda *a: jnp.stack(a), *one), strict=True):
        np.testing.assert_allclose(mapped, each, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("text", [0, long(11)])
def test_no_region(text):
    """R = 0: nothing to score; the text stream alone, or nothing at all."""
    case, selecting = problem(0, regions=0, text=text)
    same(case, selecting, 2)


def _lists(scores, visible, budget, order, capacity):
    """What the kernels of the selection list, from scores float32 [B, K, G, R]."""
    regions = scores.shape[-1]
    ranks = gpu_step._ranks(visible, order)
    own, shift = regions, gpu_scores.moved(regions)
    if shift:
        own = regions + shift - gpu_scores.TILE
    # The places that repeat a region hold its score again, and those behind the last anything.
    placed = jnp.concatenate([scores[..., :own], scores[..., own - shift :]], axis=-1)
    behind = gpu_scores.places(regions) - placed.shape[-1]
    placed = jnp.pad(placed, [(0, 0)] * 3 + [(0, behind)], constant_values=jnp.nan)
    group, cuts = scores.shape[2], None
    if group > 1:
        cuts = gpu_select.cuts_of(placed, ranks, budget, regions, group, capacity, interpret=True)
    return gpu_select.listed(placed, ranks, cuts, budget, regions, capacity, interpret=True)


@pytest.mark.parametrize(
    ("regions", "group", "kept"),
    [(100, 3, False), long(200, 1, True), long(1500, 2, True), long(9000, 2, False)],
)
def test_lists_are_those_of_the_mask(regions, group, kept, monkeypatch):
    """Infinite, NaN and both zeros among the scores; one tile of places or several, kept or read again."""
    if not kept:
        monkeypatch.setattr(gpu_select, "_MOST", 0)
    rng = np.random.default_rng(regions)
    values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1e-40, -3e38], np.float32)
    # Each value is a ninth of the scores: the cuts fall on 1, on a zero, and among NaN; by J, too.
    budget = jnp.asarray([regions // 5, regions * 2 // 5, regions * 43 // 50, -3, regions], jnp.int32)
    batch, kv_heads, capacity = len(budget), 1, regions * 9 // 10
    shape = (batch, kv_heads, group, regions)
    scores = np.where(rng.random(shape) < 0.95, rng.choice(values, shape), rng.normal(size=shape))
    scores = jnp.asarray(scores, jnp.float32)
    visible = jnp.asarray(rng.random((batch, regions)) < 0.95)
    order = jnp.asarray(np.stack([rng.permutation(regions) for _ in range(batch)]), jnp.int32)
    found = jax.jit(_lists, static_argnums=4)(scores, visible, budget, order, capacity)

    flat = scores.reshape(batch, 1, group, regions)
    most = jnp.minimum(budget, capacity)[:, None]
    mask = np.asarray(routing.select_mask(flat, visible[:, None, None], most, order))[:, 0]
    for b in range(batch):
        count = int(found.length[b, 0])
        bits = (mask[b] << np.arange(group)[:, None]).sum(0)
        listed = np.asarray(found.regions[b, 0, :count])
        np.testing.assert_array_equal(listed, np.flatnonzero(bits))
        if group > 1:
            np.testing.assert_array_equal(found.heads[b, 0, :count], bits[listed])


def test_masks_of_a_step():
    """A bit per slot of each piece and per text-stream key, the last key, and the rank of each place."""
    rng = np.random.default_rng(0)
    batch, regions, slots, text = 2, 70, 66, 65
    visual_seen, text_seen = rng.random((batch, regions, slots)) < 0.5, rng.random((batch, text)) < 0.5
    text_seen[0, -1], text_seen[1] = True, False
    visible = rng.random((batch, regions)) < 0.7
    order = np.stack([rng.permutation(regions) for _ in range(batch)])
    found = gpu_step.masks(*map(jnp.asarray, (visual_seen, text_seen, visible, order)), (2, 33))

    def bits(words):
        return (np.asarray(words)[..., None] >> np.arange(32) & 1).astype(bool).reshape(*words.shape[:-1], -1)

    slots_seen = bits(found.words).reshape(batch, regions, 2, 64)
    np.testing.assert_array_equal(slots_seen[..., :33].reshape(visual_seen.shape), visual_seen)
    assert not slots_seen[..., 33:].any()
    np.testing.assert_array_equal(bits(found.text_words)[:, :text], text_seen)
    assert not bits(found.text_words)[:, text:].any()
    np.testing.assert_array_equal(found.text_length, [65, 0])
    # Two tiles of 64 places, the second moved back by 58; 1,024 places in all.
    ranks = np.where(visible, np.argsort(order, axis=1), -1)
    places = np.concatenate([ranks[:, :64], np.full((batch, 58), -1), ranks[:, 64:]], axis=1)
    np.testing.assert_array_equal(found.ranks[:, :128], places)
    assert found.ranks.shape == (batch, 1024) and (np.asarray(found.ranks[:, 128:]) == -1).all()


def test_seventy_splits_are_joined():
    """More than a tile of 64: the softmax over all; a head whose splits see nothing is 0, and NaN spreads."""
    splits, group, heads, stored, dim = 70, 3, 8, 72, 64
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 1, heads, stored, dim)).astype(np.float32)
    tops = rng.normal(size=(2, 1, stored, heads)).astype(np.float32)
    totals = rng.random((2, 1, stored, heads)).astype(np.float32)
    tops[:, :, :, 1], totals[:, :, :, 1], values[:, :, 1] = -np.inf, 0, 0
    tops[:, :, 5, 0], totals[:, :, 5, 0], values[:, :, 0, 5] = -np.inf, 0, 0
    values[1, 0, 2, 69, 3] = np.inf
    weights = np.exp2(np.where(np.isfinite(tops), tops, -np.inf))[:, :, :splits, :group]
    total = (weights * totals[:, :, :splits, :group]).sum(2)
    with np.errstate(invalid="ignore", divide="ignore"):
        wanted = np.einsum("BKSG,BKGSD->BKGD", weights, values[:, :, :group, :splits].astype(np.float64))
        wanted = np.where(total[..., None] == 0, 0, wanted / total[..., None])
        lse = np.log(total)
    values[:, :, :, splits:], tops[:, :, splits:], totals[:, :, splits:] = (np.nan,) * 3  # never written
    shape = Shape(64, dim, 5, 1, Tiles(1, 1, 1), splits, group, 1, 1, 1, 1.0)
    for together in (False, True):
        join = functools.partial(gpu_merge.merge, shape, together=together, interpret=True)
        out, got = jax.jit(lambda *a, join=join: join(a, jnp.float32))(values, tops, totals)
        if together:
            wanted[1] = np.nan
        np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got, lse, rtol=1e-5, atol=1e-6)


def _lower(*, group, dim, width, dtype, select_per, int8=False, regions=300, vmapped=False):
    """StableHLO with the Mosaic kernels of a routed call for sm_90 in it."""
    layers, batch, kv_heads, slots, text = 2, 2, 2, 36, 300
    spec = GazeSpec(scale=1.0, select_per=select_per, visual_dtype="int8" if int8 else None)

    def call(q, k, *rest):
        packed = api.pack(k, k, spec=spec, implementation="gpu")
        return api.route_and_decode(q, packed, *rest, capacity=40, spec=spec, implementation="gpu").out

    lead = (3,) if vmapped else ()
    array = functools.partial(lambda dtype, *shape: jax.ShapeDtypeStruct((*lead, *shape), dtype))
    stream = array(dtype, layers, batch, kv_heads, text, dim)
    with compile_for("gpu"):
        traced = jax.jit(jax.vmap(call) if vmapped else call).trace(
            array(dtype, batch, kv_heads * group, dim),
            array(dtype, layers, batch, kv_heads, regions, slots, dim),
            stream,
            stream,
            array(jnp.int32),
            array(jnp.bool_, batch, regions, slots),
            array(jnp.bool_, batch, text),
            array(dtype, batch, kv_heads * group, width),
            array(dtype, layers, batch, kv_heads, regions, width),
            array(jnp.int32, batch),
            array(jnp.bool_, batch, regions),
            array(jnp.int32, batch, regions),
        )
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "sizes",
    [
        {"group": 7, "dim": 64, "width": 64, "dtype": jnp.bfloat16, "select_per": "head", "int8": True},
        long({"group": 4, "dim": 128, "width": 256, "dtype": jnp.float32, "select_per": "kv_head"}),
        long({"group": 4, "dim": 128, "width": 128, "dtype": jnp.bfloat16, "select_per": "kv_head"}),
        long({"group": 8, "dim": 64, "width": 192, "dtype": jnp.float32, "select_per": "head"}),
        long({"group": 1, "dim": 80, "width": 80, "dtype": jnp.bfloat16, "select_per": "head"}),
        long(
            {"group": 4, "dim": 64, "width": 64, "dtype": jnp.bfloat16, "select_per": "head", "vmapped": True}
        ),
        *(
            long({"group": 2, "dim": 64, "width": 64, "dtype": jnp.bfloat16, "select_per": per, "regions": r})
            for r in (2_000, 29_184, 70_000)
            for per in ("head", "kv_head")
        ),
    ],
)
def test_lowers_for_cuda(sizes, monkeypatch):
    """Layouts, copies and shared memory are legal on sm_90, and no order of numbers has lost its sign.

    Mosaic GPU takes the sign of a ``where`` of integers from its first choice or from the condition, and
    compares as unsigned what has none; the interpreter does not.
    """

    def signed(name):
        original = getattr(mgpu.FragmentedArray, name)

        def method(self, other):
            assert self.is_signed is not False, f"{name} of numbers without a sign"
            return original(self, other)

        monkeypatch.setattr(mgpu.FragmentedArray, name, method)

    for name in ("__lt__", "__le__", "__gt__", "__ge__", "max", "min"):
        signed(name)
    kernels = 4 if sizes["select_per"] == "kv_head" or sizes["group"] == 1 else 5
    assert _lower(**sizes).count("@mosaic_gpu_v2") == kernels


def test_what_cannot_be_routed_is_refused():
    """float16, and 16 query heads per kv head."""
    common = {"dim": 64, "width": 64, "select_per": "kv_head"}
    with pytest.raises(NotImplementedError, match="keeps bfloat16, float32 and int8, not float16"):
        _lower(group=2, dtype=jnp.float16, **common)
    with pytest.raises(NotImplementedError, match="at most 15 query heads per kv head, not 16"):
        _lower(group=16, dtype=jnp.bfloat16, **common)
