"""Invariant 4 for sequences that are split over devices: values and selections are those of one."""

import contextlib
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core.regions import describe
from gaze_jax.core.routing import Routing
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import Streams
from gaze_jax.data.dealing import collected, dealt, dealt_batch
from gaze_jax.errors import UserError
from gaze_jax.models import DUMMY, MLLM, context
from gaze_jax.models.cache import Cache, constrained, decode_spec
from gaze_jax.parallel import rules
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from pallas_kernels.gaze_decode import api
from tests.helpers import models

FOUR = MeshConfig(data=2, context=4)
MIXED = MeshConfig(data=1, fsdp=2, tensor=2, context=2)


@contextlib.contextmanager
def on(mesh):
    """Programs run on a mesh of the eight devices."""
    with jax.set_mesh(make_mesh(mesh)), nn.logical_axis_rules(rules.flax_rules()):
        yield


def split(streams, ranks):
    """The streams, dealt to the ranks; storage order means nothing, so one device may use them too."""
    fields = {name: np.asarray(a) for name, a in vars(streams).items() if a is not None}
    return jax.tree.map(jnp.asarray, Streams(**dealt_batch(fields, ranks)))


def toy(ranks):
    images, streams = models.toy()
    return images, split(streams, ranks)


@pytest.mark.parametrize("mesh", [FOUR, MIXED], ids=str)
@pytest.mark.parametrize("top_k", [3, None])
def test_forward(mesh, top_k):
    """Logits, scores and selections of every layer; three images do not divide among the ranks."""
    images, streams = toy(mesh.context)
    run = models.forward(DUMMY, collect=True)
    budget = None if top_k is None else jnp.array([[1], [top_k]], jnp.int32)
    expected, expected_out = run(models.parameters(DUMMY), images, streams, budget)
    with on(mesh):
        got, out = run(models.parameters(DUMMY), images, streams, budget)
    models.close(got, expected, 1e-5)
    assert set(out) == set(expected_out)
    if top_k is not None:
        np.testing.assert_array_equal(out["selected"], expected_out["selected"])
        assert np.asarray(out["selected"]).any()
        tokens = jax.P(None, ("data", "fsdp"), "context", "tensor")
        wanted = jax.sharding.NamedSharding(make_mesh(mesh), tokens)
        assert out["selected"].sharding.is_equivalent_to(wanted, 5)


@pytest.mark.parametrize("mesh", [FOUR, pytest.param(MIXED, marks=pytest.mark.long)], ids=str)
def test_gradients(mesh):
    """Loss and gradients of everything but the tower, with queries sent in several blocks."""
    config = models.changed(DUMMY, gaze={"query_block": 8})
    images, streams = toy(mesh.context)
    run = models.gradients(config)
    top_k = jnp.int32(2)
    loss, expected = run(models.parameters(config), images, streams, top_k)
    with on(mesh):
        got_loss, got = run(models.parameters(config), images, streams, top_k)
    models.close(got_loss, loss, 1e-5)
    flat, theirs = jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected)
    for (path, mine), other in zip(flat, theirs, strict=True):
        scale = max(float(np.abs(other).max()), 1e-6)
        np.testing.assert_allclose(mine, other, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))


@functools.cache
def _programs(config, route, capacity, trace):
    """Jitted prefill and decoding step."""
    model = MLLM(config)

    def prefill(variables, images, streams, selection):
        spec = SelectionSpec(route)
        passed = model.apply(variables, images, streams, selection, spec, free_slots=8, method="prefill")
        return constrained(passed[1])

    def decode(variables, tokens, order, cache, write_index, selection):
        position = dataclasses.replace(models.step(order, 0), write_index=write_index)
        spec = SelectionSpec(route, capacity, return_trace=trace)
        return model.apply(variables, tokens, order, cache, position, selection, spec, method="decode")

    return jax.jit(prefill), jax.jit(decode)


def steps(
    mesh, selection, *, ranks, config=DUMMY, route=Routing(), capacity=4, trace=False, ties=False, count=2
):
    """Prefill, then ``count`` decoding steps: the logits and outputs of each, and the last cache."""
    images, streams = toy(ranks)
    prefill, decode = _programs(config, route, capacity, trace)
    variables, size = models.parameters(config), streams.tokens.shape[1]
    variables = models.indifferent(variables) if ties else variables
    found = []
    with on(mesh) if mesh else contextlib.nullcontext():
        cache = prefill(variables, images, streams, selection)
        for number in range(count):
            order = jnp.max(streams.text_order, axis=1) + 1 + number
            tokens = jnp.array([1, 2]) + number
            logits, cache, out = decode(variables, tokens, order, cache, jnp.int32(size + number), selection)
            found.append((logits, out))
    return found, cache


def same(found, expected):
    """Logits within rounding, equal regions, and every other output that both have."""
    for (got, out), (wanted, wanted_out) in zip(found, expected, strict=True):
        models.close(got, wanted, 1e-5)
        assert set(out) - set(wanted_out) <= {"rank_regions", "rank_passes"}
        for name, value in wanted_out.items():
            if name in ("indices", "selected"):
                np.testing.assert_array_equal(out[name], value, err_msg=name)
            else:
                models.close(out[name], value, 1e-5)


@pytest.mark.parametrize("mesh", [FOUR, MIXED], ids=str)
def test_prefill_and_decode(mesh):
    """One and three of 18 regions per query: values, indices, traces, and how the cache is split."""
    selection = Selection(jnp.array([[1], [3]], jnp.int32))
    expected, _ = steps(None, selection, ranks=mesh.context, trace=True)
    found, cache = steps(mesh, selection, ranks=mesh.context, trace=True)
    same(found, expected)
    assert (np.asarray(found[0][1]["indices"]) >= 0).any()
    # Whoever has which regions, together they read as many as a selector selects at most.
    counts = np.asarray(found[0][1]["rank_regions"])
    assert counts.shape == (DUMMY.decoder.depth, 2, mesh.context)
    stack = jax.P(None, ("data", "fsdp"), "tensor", "context")
    for a in (cache.text_k, cache.descriptors):
        assert a.sharding.is_equivalent_to(jax.sharding.NamedSharding(make_mesh(mesh), stack), a.ndim)
    for a in jax.tree.leaves(cache.visual):
        # The stacked array of "native"; the layers of "xla", where no library is built.
        layer = stack if a.ndim == 6 else jax.P(("data", "fsdp"), "tensor", "context")
        assert a.sharding.is_equivalent_to(jax.sharding.NamedSharding(make_mesh(mesh), layer), a.ndim)


@pytest.mark.parametrize(
    ("options", "selection"),
    [
        ({}, Selection()),
        ({}, Selection(jnp.int32(4), bias=jnp.linspace(-9, 9, 18)[None])),
        ({"ties": True}, Selection(jnp.int32(3))),
        ({"capacity": 20}, Selection(jnp.int32(20), full_layers=jnp.array([True, False, False]))),
        ({"route": Routing("random", 3)}, Selection(jnp.int32(2))),
        ({"config": models.changed(DUMMY, gaze={"select_per": "kv_head"})}, Selection(jnp.int32(2))),
        ({"config": models.changed(DUMMY, gaze={"visual_dtype": "int8"})}, Selection(jnp.int32(2))),
        ({"config": models.changed(DUMMY, gaze={"descriptor": "minmax"})}, Selection(jnp.int32(2))),
    ],
    ids=["dense", "bias", "ties", "full layers", "random", "kv_head", "int8", "minmax"],
)
def test_every_kind_of_selection(options, selection):
    expected, _ = steps(None, selection, ranks=2, **options)
    found, _ = steps(MIXED, selection, ranks=2, **options)
    same(found, expected)


@pytest.mark.parametrize("mesh", [FOUR], ids=str)
def test_all_selected_regions_on_one_rank(mesh, monkeypatch):
    """The worst case: as many passes as it takes, counted, and the values of one device."""
    monkeypatch.setattr(context, "per_pass", lambda capacity, regions: 2)
    regions = toy(mesh.context)[1].visual_src.shape[1]
    each = regions // mesh.context
    # The last rank's regions.
    forced = jnp.arange(regions - each, regions, dtype=jnp.int32)[None, None, None]
    selection = Selection(jnp.int32(each), forced=forced)
    options = {"ranks": mesh.context, "route": Routing("forced"), "capacity": each}
    expected, _ = steps(None, selection, **options)
    found, _ = steps(mesh, selection, **options)
    same(found, expected)
    out = found[0][1]
    visible = int((np.asarray(out["indices"]) >= 0).sum(-1).max())
    assert visible > 2, "it takes more than one pass"
    np.testing.assert_array_equal(out["rank_regions"].max((0, 1)), [0, 0, 0, visible])
    np.testing.assert_array_equal(out["rank_passes"].max((0, 1)), [1, 1, 1, -(-visible // 2)])


def test_oracle_and_offload_need_all_keys_in_one_place():
    with pytest.raises(UserError, match=r"mesh.context=4 splits; use it with mesh.context=1"):
        steps(FOUR, Selection(jnp.int32(2)), ranks=4, route=Routing("oracle"))
    config = models.changed(DUMMY, gaze={"decode_implementation": "offload"})
    with pytest.raises(UserError, match=r"mesh.context=4 splits it; use one of the two"):
        steps(FOUR, Selection(jnp.int32(2)), ranks=4, config=config)


def test_a_video_of_65536_tokens():
    """Two layers, 4,096 regions on eight ranks, a tenth selected: as on one device, and evenly shared."""
    config = models.changed(DUMMY, decoder={"depth": 2}, gaze={"context_tokens": 0})
    regions, slots, kept = 4096, 16, 410
    kv_heads, dim = config.decoder.num_kv_heads, config.decoder.head_dim
    rng = np.random.default_rng(0)
    # Frames change slowly, so that what a query selects is near in time.
    drift = np.cumsum(rng.normal(size=(2, 1, kv_heads, regions, 1, dim)), axis=3) / 40
    keys = drift + rng.normal(size=(2, 1, kv_heads, regions, slots, dim)) / 4
    values = rng.normal(size=keys.shape)
    order = dealt(np.arange(regions * slots, dtype=np.int32).reshape(1, regions, slots), 1, 8)
    k, v = (jnp.asarray(dealt(a, 3, 8), jnp.float32) for a in (keys, values))
    text = jnp.asarray(rng.normal(size=(2, 1, kv_heads, 16, dim)), jnp.float32)
    begun = np.full((1, 16), -1, np.int32)

    def build(k, v):
        packed = api.pack(
            k, v, spec=decode_spec(config.gaze, dim), implementation=config.gaze.decode_implementation
        )
        valid = jnp.ones((1, regions, slots), bool)
        described = jnp.stack([describe(layer, valid, "mean") for layer in k])
        return constrained(Cache(packed, described, text, text, jnp.asarray(order), jnp.asarray(begun)))

    _, decode = _programs(config, Routing(), kept, False)
    found = []
    for mesh in (None, MeshConfig(data=1, context=8)):
        with on(mesh) if mesh else contextlib.nullcontext():
            cache = jax.jit(build)(k, v)
            at = jnp.array([regions * slots])
            step = (jnp.array([1]), at, cache, jnp.int32(0), Selection(jnp.int32(kept)))
            logits, _, out = decode(models.parameters(config), *step)
        found.append((logits, out))
    same(found[1:], found[:1])
    counts, passes = (np.asarray(found[1][1][name]) for name in ("rank_regions", "rank_passes"))
    assert counts.max() <= 1.2 * kept / 8 and (passes == 1).all()


@pytest.mark.parametrize(
    ("capacity", "regions", "expected"), [(416, 512, 26 + 11), (416, 30, 30), (16, 512, 1 + 2), (1, 512, 1)]
)
def test_regions_per_pass(monkeypatch, capacity, regions, expected):
    """A sixteenth of the capacity and two standard deviations, but no more than there are."""
    monkeypatch.setattr(context, "ranks", lambda: 16)
    assert context.per_pass(capacity, regions) == expected


def test_dealing():
    """Every fourth region is on the same rank, padding is where it belongs, and it can be undone."""
    values = np.arange(10)[None]
    found = dealt(values, 1, 4, fill=-1)
    assert found.tolist() == [[0, 4, 8, 1, 5, 9, 2, 6, -1, 3, 7, -1]]
    np.testing.assert_array_equal(collected(found, 1, 4)[:, :10], values)
    assert dealt(values, 1, 1) is values
