"""The shared suite of ``gaze_decode``, one subclass per implementation, and what XLA reads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import GazeSpec, dispatch, gaze_decode
from pallas_kernels.gaze_decode import api, tuning
from tests.helpers import cases, native_library, oracle
from tests.kernels.decode_suite import DecodeSuite, InterpretedDecodeSuite
from tests.kernels.decode_values import call, long


class TestReference(DecodeSuite):
    """The oracle itself, against float64 loops in numpy."""

    implementation = "reference"
    shards_heads = False  # one flat vmap over rows and heads
    # TestXla and TestOffload have the other sizes, and are compared with this.
    left = ("test_edge_12_group_sizes[4-kv_head]", "test_edge_12_group_sizes[5-head]")
    left += ("test_edge_12_group_sizes[8-head]", "test_odd_sizes[sizes1]", "test_odd_sizes[sizes3]")

    def expected(self, case):
        return oracle.decode(case)


class TestXla(DecodeSuite):
    """Plain XLA, on whatever backend runs the tests."""

    implementation = "xla"
    shards_heads = jax.default_backend() != "cpu"  # a CPU's loop is not split


class TestNative(DecodeSuite):
    """The C++ library, compiled beside its sources."""

    implementation = "native"
    shards_heads = False  # XLA does not partition a library's function

    @pytest.fixture(autouse=True)
    def _built(self):
        native_library.needed()


class TestTpu(InterpretedDecodeSuite):
    """The TPU kernel, interpreted with race detection, NaN scratch and bounds checks (or on a TPU)."""

    implementation = "tpu"
    shards_heads = False  # a Mosaic kernel is partitioned by shard_map, not by the compiler

    @pytest.fixture(autouse=True)
    def _small_tiles(self, monkeypatch):
        """Chunks of 8 regions, tiles of 16 text-stream keys: toy sizes have several, the last one partial."""
        monkeypatch.setattr(tuning, "sizes", lambda *_: {"chunk_bytes": 1, "text_tile": 16})

    # An empty text stream is one whether regions are listed or not; edge 12 has lists per kv head.
    left = ("test_edge_03_no_text_stream[None]", "test_values[0-kv_head]")

    @pytest.mark.parametrize(
        "names", [("k", "v"), long(("q",)), long(("layer",))], ids=["cache", "query", "layer"]
    )
    def test_vmap_over_one_argument(self, names):
        super().test_vmap_over_one_argument(names)


class TestOffload(DecodeSuite):
    """Regions in host memory, fetched by number."""

    implementation = "offload"
    shards_heads = False
    # What is fetched goes through the arithmetic of TestXla.
    left = ("test_edge_01_the_order_of_the_list_does_not_matter", "test_edge_13_odd_capacities")
    left += ("test_edge_03_no_region_or_one[0-None]", "test_edge_03_no_region_or_one[1-2]")
    left += ("test_edge_16_the_scale_changes_the_output", "test_large_logits", "test_odd_sizes[sizes0]")
    left += ("test_odd_sizes[sizes1]", "test_odd_sizes[sizes3]", "test_edge_17_twice_is_bitwise_equal")
    left += ("test_appended_equals_packed_at_once[7-5-float32]", "test_edge_12_group_sizes[8-head]")

    @pytest.mark.parametrize(
        ("group", "select_per"),
        [
            *((7, "kv_head"), (8, "head")),
            *(long(group, per) for group in (1, 4, 5) for per in ("head", "kv_head")),
            *(long(7, "head"), long(8, "kv_head")),
        ],
    )
    def test_edge_12_group_sizes(self, group, select_per):  # what is fetched goes through XLA's arithmetic
        super().test_edge_12_group_sizes(group, select_per)


class TestXlaElsewhere(DecodeSuite):
    """As an accelerator gets it: one tile, and products in the dtype of the query."""

    implementation = "xla"
    # TestXla has the same layout, and the same in front of the arithmetic.
    left = ("test_append_writes_in_place", "test_appended_equals_packed_at_once", "test_unpack_inverts_pack")
    left += ("test_edge_01_the_order_of_the_list_does_not_matter", "test_edge_13_odd_capacities")
    left += ("test_vmap", "test_vmap_of_a_growing_cache", "test_vmap_over_one_argument", "test_odd_sizes")
    left += ("test_edge_16_the_scale_changes_the_output", "test_edge_17_twice_is_bitwise_equal")
    left += ("test_edge_12_group_sizes[4-kv_head]", "test_edge_12_group_sizes[5-head]")
    left += ("test_edge_12_group_sizes[8-head]",)

    @pytest.fixture(autouse=True)
    def _as_for_an_accelerator(self):
        with dispatch.compile_for("gpu"):
            yield

    def run(self, case):
        return _elsewhere(case)


@jax.jit
def _elsewhere(case):
    return call(case, "xla")


def test_the_two_forms_of_xla_differ():
    """A CPU goes through the selections in a loop, in the branch of a layer; elsewhere there is neither."""
    case = cases.decode(regions=20)
    program = str(jax.make_jaxpr(lambda case: call(case, "xla"))(case))
    assert "scan[" in program and "cond[" in program
    with dispatch.compile_for("gpu"):
        program = str(jax.make_jaxpr(lambda case: call(case, "xla"))(case))
    assert "scan[" not in program and "cond[" not in program


@pytest.mark.parametrize(
    ("select_per", "capacity", "sliced"),
    [("head", 3, False), ("head", 4, True), ("kv_head", 6, False), ("kv_head", 7, True)],
)
def test_xla_reads_each_region_once_where_gathering_would_read_more(select_per, capacity, sliced):
    """G = 2 lists of half the regions or more, or one that can hold all 7: no gather from the cache."""
    case = cases.decode(select_per=select_per, capacity=capacity)
    with dispatch.compile_for("gpu"):
        program = jax.make_jaxpr(lambda case: call(case, "xla"))(case)
    big = [
        e for e in _equations(program.jaxpr) if e.invars and e.invars[0].aval.shape[1:] == case.k.shape[1:]
    ]
    names = {e.primitive.name for e in big}
    assert ("dynamic_slice" in names) == sliced and ("gather" in names) != sliced, names


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for one in value if isinstance(value, tuple) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def test_an_int8_cache_is_int8():
    """Less than half the bytes of bfloat16 in a real head dim, scales included; and what it unpacks to."""
    case = cases.decode(dim=128, dtype=jnp.bfloat16)
    spec = GazeSpec(1.0, visual_dtype="int8")
    packed = api.pack(case.k, case.v, spec=spec, implementation="xla")
    plain = api.pack(case.k, case.v, spec=GazeSpec(1.0), implementation="xla")
    sizes = [sum(a.nbytes for a in jax.tree.leaves(tree)) for tree in (packed, plain)]
    assert sizes[0] == sizes[1] * (128 + 4) / 256
    wide = api.pack(case.k.astype(jnp.float32), case.v, spec=GazeSpec(1.0), implementation="xla")
    assert sizes[0] < sum(a.nbytes for a in jax.tree.leaves(wide)) / 2
    k, v = api.unpack(packed, spec=spec, implementation="xla")
    for got, expected in ((k, case.k), (v, case.v)):
        expected = np.asarray(expected, np.float32)
        assert got.dtype == jnp.float32
        assert np.abs(np.asarray(got) - expected).max() <= np.abs(expected).max() / 254 * 1.001


@pytest.mark.parametrize("select_per", ["head", "kv_head"])
def test_xla_holds_only_selected_regions(select_per):
    """8 of 1,024 regions: temporaries stay below a tenth of one layer's keys, so no layer is sliced out."""
    layers, kv, group, regions, slots, dense, dim, capacity = 3, 2, 2, 1024, 16, 8, 16, 8

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    spec = GazeSpec(scale=1.0, select_per=select_per)
    keys = array(jnp.float32, layers, 1, kv, regions, slots, dim)
    cache = jax.eval_shape(lambda k: api.pack(k, k, spec=spec, implementation="xla"), keys)
    dense_cache = array(jnp.float32, layers, 1, kv, dense, dim)
    heads = kv * group if select_per == "head" else kv
    compiled = (
        jax.jit(
            lambda q, cache, dk, dv, layer, indices, seen, text_seen: gaze_decode(
                q, cache, dk, dv, layer, indices, seen, text_seen, spec=spec, implementation="xla"
            )
        )
        .lower(
            array(jnp.float32, 1, kv * group, dim),
            cache,
            dense_cache,
            dense_cache,
            array(jnp.int32),
            array(jnp.int32, 1, heads, capacity),
            array(jnp.bool_, 1, regions, slots),
            array(jnp.bool_, 1, dense),
        )
        .compile()
    )
    layer_keys = 4 * kv * regions * slots * dim
    assert compiled.memory_analysis().temp_size_in_bytes < layer_keys / 10


@pytest.mark.parametrize(
    ("select_per", "capacity", "kind"),
    [
        ("head", 3, "float32"),
        ("head", 3, "int8"),
        ("kv_head", 3, "bfloat16"),
        *(long("head", 3, "bfloat16"), long("kv_head", 3, "float32"), long("kv_head", 3, "int8")),
        *(long("kv_head", None, kind) for kind in ("float32", "bfloat16", "int8")),
    ],
)
def test_offloaded_has_the_bits_of_resident(select_per, capacity, kind):
    """3 of 20 regions per list, or all, in every layer; the cache is in host memory, the result is not."""
    dtype = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
    case = cases.decode(select_per=select_per, capacity=capacity, regions=20, dtype=dtype)
    spec = dataclasses.replace(case.spec, visual_dtype="int8" if kind == "int8" else None)

    @functools.partial(jax.jit, static_argnums=1)
    def every_layer(case, implementation):
        packed = api.pack(case.k, case.v, spec=spec, implementation=implementation)
        rest = (case.indices, case.visual_seen, case.text_seen)

        def one(layer):
            arguments = (case.q, packed, case.text_k, case.text_v, layer, *rest)
            return gaze_decode(*arguments, spec=spec, implementation=implementation)

        return packed, jax.lax.map(one, jnp.arange(3, dtype=jnp.int32))

    packed, found = every_layer(case, "offload")
    assert packed.rows.sharding.memory_kind == "pinned_host" and found.sharding.memory_kind == "device"
    np.testing.assert_array_equal(found, every_layer(case, "xla")[1])
    assert (found[0] != found[1]).any() and (found[1] != found[2]).any()


@pytest.mark.parametrize("axis", [long(0), 1])
def test_an_offloaded_cache_stays_on_the_host_under_vmap(axis):
    """Three caches by two queries each, vmap in vmap: the plain values, and only what is read moves."""
    pair = [cases.decode(seed=seed, regions=64) for seed in (0, 1, 2)]
    case, queries = pair[0], jnp.stack([one.q for one in pair[:2]])
    options = {"spec": case.spec, "implementation": "offload"}
    packs = [api.pack(one.k, one.v, **options) for one in pair]
    caches = jax.tree.map(lambda *a: jax.device_put(jnp.stack(a, axis), jax.memory.Space.Host), *packs)
    rest = (case.text_k, case.text_v, case.layer, case.indices, case.visual_seen, case.text_seen)

    def every_pair(queries, caches):
        inner = jax.vmap(lambda q, packed: gaze_decode(q, packed, *rest, **options), in_axes=(0, None))
        return jax.vmap(inner, in_axes=(None, axis))(queries, caches)

    assert caches.rows.sharding.memory_kind == "pinned_host"
    got = jax.jit(every_pair)(queries, caches)
    for i, cache in enumerate(pair):
        for q, one in zip(queries, got[i], strict=True):
            plain = call(dataclasses.replace(case, q=q, k=cache.k, v=cache.v), "reference")
            np.testing.assert_allclose(one, plain, rtol=2e-5, atol=2e-5)
    made = [v.aval for e in _equations(jax.make_jaxpr(every_pair)(queries, caches).jaxpr) for v in e.outvars]
    here = [aval.size for aval in made if aval.memory_space != jax.memory.Space.Host]
    assert max(here) < packs[0].rows.size / 3, "one of three layers"


def test_gradients():
    """The reference's equal central differences of the float64 loops; the others' equal the reference's."""
    case = cases.decode(layers=2, size=1, kv_heads=1, regions=3, slots=2, text=3, dim=2, capacity=2)
    cotangent = np.random.default_rng(9).normal(size=case.q.shape)

    def gradients(implementation, names):
        def loss(some):
            return jnp.sum(call(dataclasses.replace(case, **some), implementation) * cotangent.astype("f"))

        return jax.jit(jax.grad(loss))({name: getattr(case, name) for name in names})

    def numeric(name):
        def loss(x):
            return np.sum(oracle.decode(dataclasses.replace(case, **{name: x})) * cotangent)

        return oracle.numeric_gradient(loss, np.asarray(getattr(case, name)))

    text = ("q", "text_k", "text_v")
    exact = gradients("reference", (*text, "k", "v"))
    for name, found in exact.items():
        expected = numeric(name)
        assert np.abs(expected).max() > 0.01, name
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)
    for implementation, names in (("xla", (*text, "k", "v")), ("offload", text)):
        for name, found in gradients(implementation, names).items():
            np.testing.assert_allclose(found, exact[name], rtol=2e-5, atol=2e-5, err_msg=name)
