"""The shared suite of ``gaze_prefill``, one subclass per implementation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import gaze_prefill
from pallas_kernels.dispatch import compile_for
from pallas_kernels.gaze_prefill import tpu, tpu_common
from tests.helpers import cases, oracle
from tests.helpers.streams import PlacedView, Text, sample
from tests.kernels.decode_values import long
from tests.kernels.prefill_suite import PrefillSuite
from tests.kernels.prefill_values import _rows


class TestReference(PrefillSuite):
    """The oracle itself, against float64 loops in numpy."""

    implementation = "reference"
    shards_heads = False  # one flat vmap over batch, queries and heads
    # TestXla has the other sizes, and is compared with this.
    left = ("test_bf16[head]", "test_bf16_where_no_block_divides[kv_head-2]", "test_odd_head_dims[1]")
    left += ("test_edge_12_group_sizes[4-kv_head]", "test_edge_12_group_sizes[5-head]")
    left += ("test_edge_12_group_sizes[8-head]", "test_edge_03_empty_axes[regions]")
    # It has no blocks of queries.
    left += (
        "test_edge_13_query_blocks_with_remainders",
        "test_query_blocks_ignore_unseen_nan_and_equal_dense",
    )

    def expected(self, case):
        return oracle.prefill(case)


class TestXla(PrefillSuite):
    """Plain XLA, on whatever backend runs the tests."""

    implementation = "xla"
    # Blocks of 7 and 49 queries leave a remainder.
    left = ("test_edge_13_query_blocks_with_remainders[1]", "test_bf16[head]")


class TestTpu(PrefillSuite):
    """The Mosaic kernels, interpreted on a CPU: reads out of bounds raise, scratch is NaN, races show."""

    implementation = "tpu"
    shards_heads = False  # the compiler does not partition a Mosaic kernel: it takes a shard_map

    # "all keys" has neither of the two, test_padding_the_keys_changes_nothing one region and more.
    left = ("test_edge_03_empty_axes[text]", "test_edge_03_empty_axes[regions]")
    left += ("test_edge_03_no_region_or_one[one region]", "test_edge_03_one_selected_region")
    left += ("test_edge_12_group_sizes[1-head]",)

    # Small tiles, so that toy sizes have several tiles, blocks and batches, and blocks of every action.
    tiles = tpu.Tiles(queries=32, chunk=64, visits=4, keys=16, open_keys=32, gather_below=0.7)

    @pytest.fixture(autouse=True)
    def _small_tiles(self, monkeypatch):
        monkeypatch.setattr(tpu, "TILES", self.tiles)

    @pytest.fixture(autouse=True)
    def _no_races(self, monkeypatch):
        """Asks every kernel run's race detector; the interpreter itself keeps the last one's only."""
        detectors = []
        original = interpret_pallas_call.RaceDetectionState

        def detector(*args, **kwargs):
            detectors.append(original(*args, **kwargs))
            return detectors[-1]

        monkeypatch.setattr(interpret_pallas_call, "RaceDetectionState", detector)
        yield
        # After an error inside of a kernel the interpreter keeps that kernel's memory.
        pltpu.reset_tpu_interpret_mode_state()
        assert not any(detector.races_found for detector in detectors)

    @pytest.mark.long
    @pytest.mark.parametrize("query_block", [7])  # 1 and 49 make the same tiles
    def test_edge_13_query_blocks_with_remainders(self, query_block):  # 50 queries are a tile and a half
        super().test_edge_13_query_blocks_with_remainders(query_block)

    @pytest.mark.long
    def test_edge_06_a_query_that_sees_nothing_outputs_zero(self):  # test_forward has padding queries
        super().test_edge_06_a_query_that_sees_nothing_outputs_zero()

    @pytest.mark.parametrize("select_per", ["head", long("kv_head")])
    def test_gradients(self, select_per):
        super().test_gradients(select_per)

    @pytest.mark.long
    def test_vmap(self):  # tests/models/test_ops.py has the kernel on a mesh
        super().test_vmap()

    # The interpreter takes seconds for each case: -m long runs those whose paths a neighbour takes.
    @pytest.mark.parametrize(
        ("group", "select_per"),
        [(1, "head"), (7, "kv_head"), long(4, "kv_head"), long(5, "head"), long(8, "head")],
    )
    def test_edge_12_group_sizes(self, group, select_per):
        super().test_edge_12_group_sizes(group, select_per)

    @pytest.mark.parametrize(
        ("scope", "select_per"),
        [("all", "head"), ("view", "kv_head"), long("all", "kv_head"), long("view", "head")],
    )
    def test_forward(self, select_per, scope):
        super().test_forward(select_per, scope)

    @pytest.mark.long
    @pytest.mark.parametrize("select_per", ["head", "kv_head"])
    def test_bf16(self, select_per):  # where no block divides, by default
        super().test_bf16(select_per)

    @pytest.mark.parametrize(("select_per", "group"), [("head", 3), long("kv_head", 2), long(None, 3)])
    def test_bf16_where_no_block_divides(self, select_per, group):
        """Two blocks of two regions for 3, two of 16 keys for 19, two tiles of 32 queries for 37."""
        super().test_bf16_where_no_block_divides(select_per, group)

    @pytest.mark.parametrize("dim", [long(1), 20])
    def test_odd_head_dims(self, dim):
        super().test_odd_head_dims(dim)

    @pytest.mark.long
    def test_gradients_equal_finite_differences(self):  # the reference does, and test_gradients equals it
        super().test_gradients_equal_finite_differences()

    @pytest.mark.long
    def test_query_blocks_ignore_unseen_nan_and_equal_dense(self):  # edge 05, and edge 13 in blocks of 7
        super().test_query_blocks_ignore_unseen_nan_and_equal_dense()

    @pytest.mark.long
    def test_edge_02_selecting_every_region_equals_dense(self):  # both equal the reference
        super().test_edge_02_selecting_every_region_equals_dense()

    @pytest.mark.long
    def test_edge_16_the_scale_changes_the_output(self):  # no case has the scale that follows from D
        super().test_edge_16_the_scale_changes_the_output()

    @pytest.mark.long
    def test_edge_17_twice_is_bitwise_equal(self):  # edges 05, 08 and 09 compare bits of two runs
        super().test_edge_17_twice_is_bitwise_equal()

    @pytest.mark.long  # the other tests' tiles gather some blocks and not others
    def test_gathered_and_direct_blocks_agree(self, monkeypatch):
        """Nothing gathered, and every block that somebody chooses: equal values and gradients to rounding."""
        case = cases.prefill(_rows())
        table, actions = tpu._table, []

        def recorded(*args):
            made = table(*args)
            jax.debug.callback(lambda a: actions.append(np.asarray(a)), made[:, :, :, 0, 0])
            return made

        monkeypatch.setattr(tpu, "_table", recorded)
        found, results = [], []
        for gather_below in (0.0, 2.0):
            patch = dataclasses.replace(self.tiles, gather_below=gather_below, queries=16)
            monkeypatch.setattr(tpu, "TILES", patch)
            actions.clear()
            # Another function each time: the tiles are no part of jit's key.
            results.append(jax.jit(lambda case: _with_gradients(case))(case))
            jax.effects_barrier()
            found.append(set(np.concatenate([a.ravel() for a in actions])))
        assert found == [
            {tpu_common.SKIP, tpu_common.DIRECT},
            {tpu_common.SKIP, tpu_common.GATHER, tpu_common.DIRECT},
        ]
        for mine, theirs in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-6, atol=2e-6)

    @pytest.mark.long  # tests/kernels/test_tpu_aot.py compiles the real tiles
    def test_regions_of_36_at_the_real_tiles(self, monkeypatch):
        """Three regions of 36 in a block of 128, two with missing tokens, D = 64 in bfloat16, G = 7."""
        monkeypatch.setattr(tpu, "TILES", tpu.Tiles())
        case = _text_only(
            cases.prefill(
                [sample([Text(1), PlacedView(12, 12), PlacedView(6, 7), Text(17)], region=(6, 6))],
                kv_heads=1,
                group=7,
                dim=64,
                dtype=jnp.bfloat16,
                select_per="kv_head",
            )
        )
        assert case.visual_k.shape[3] == 36 and (case.places.visual_order < 0).any()
        wide = case.with_arrays(tuple(a.astype(jnp.float32) for a in case.arrays()))
        out, got = jax.jit(_with_gradients)(case)
        expected, exact = jax.jit(lambda case: _with_gradients(case, "reference"))(wide)
        np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2e-2, atol=2e-2)
        for mine, theirs in zip(got, exact, strict=True):
            scale = np.abs(theirs).max()
            np.testing.assert_allclose(mine.astype(jnp.float32), theirs, rtol=4e-2, atol=4e-2 * scale)

    def test_windows_of_the_two_streams_are_independent(self):
        """Random intervals per query and stream, many of them empty: skipping a block loses no key."""
        case, rng = cases.prefill(_rows()), np.random.default_rng(3)
        names = ("visual_lo", "visual_hi", "text_lo", "text_hi")
        ends = {n: jnp.asarray(rng.integers(0, 30, case.queries.segment.shape), jnp.int32) for n in names}
        case = dataclasses.replace(case, queries=dataclasses.replace(case.queries, **ends))
        out, got = self.gradients(case)
        np.testing.assert_allclose(out, self.expected(case), rtol=2e-5, atol=2e-5)
        for mine, theirs in zip(got, self.expected_gradients(case), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)

    @pytest.mark.long
    def test_more_regions_than_one_register_of_facts_holds(self):
        """3,968 regions in 124 blocks of 32: the last ones' bits stand in a second register."""
        regions, rng = 3968, np.random.default_rng(0)
        base = cases.prefill(
            [sample([Text(1), PlacedView(1, regions), Text(4)], region=(1, 1))], kv_heads=1, dim=4
        )
        case = _text_only(base)
        selected = rng.random(case.selected.shape) < 1e-3
        selected[..., -40:] = rng.random((*selected.shape[:-1], 40)) < 0.3
        case = dataclasses.replace(case, selected=jnp.asarray(selected))
        out = jax.jit(lambda case: _with_gradients(case)[0])(case)
        expected = jax.jit(lambda case: _with_gradients(case, "reference")[0])(case)
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)


def _text_only(case):
    """The case with its text-stream queries only, which are the routed ones."""
    start = case.places.visual_order.shape[1] * case.places.visual_order.shape[2]
    return dataclasses.replace(
        case,
        q=case.q[:, start:],
        queries=jax.tree.map(lambda a: a[:, start:], case.queries),
        selected=case.selected[:, start:],
    )


def _with_gradients(case, implementation="tpu"):
    """Output, and gradients of its sum of squares."""

    def forward(arrays):
        return gaze_prefill(
            *arrays,
            case.queries,
            case.places,
            case.selected,
            spec=cases.runnable(case.spec),
            implementation=implementation,
        )

    out, pull = jax.vjp(forward, case.arrays())
    return out, pull(out)[0]


def _shapes(jaxpr, found):
    for equation in jaxpr.eqns:
        found += [v.aval for v in equation.outvars if hasattr(v.aval, "shape")]
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                _shapes(inner, found)
    return found


def _large(query_block, queries=1024):
    """Abstract arguments of 1,024 queries over 64 regions of 16."""
    batch, kv, group, dim, regions, slots, dense = 1, 2, 2, 8, 64, 16, 32
    case = cases.prefill(cases.rows())

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    windows = {f.name: array(jnp.int32, batch, queries) for f in dataclasses.fields(case.queries)}
    windows["routed"] = array(jnp.bool_, batch, queries)
    places = case.places.__class__(
        visual_order=array(jnp.int32, batch, regions, slots),
        region_segment=array(jnp.int32, batch, regions),
        text_order=array(jnp.int32, batch, dense),
        text_segment=array(jnp.int32, batch, dense),
    )
    visual = array(jnp.float32, batch, kv, regions, slots, dim)
    keys = array(jnp.float32, batch, kv, dense, dim)
    return cases.Prefill(
        q=array(jnp.float32, batch, queries, kv * group, dim),
        visual_k=visual,
        visual_v=visual,
        text_k=keys,
        text_v=keys,
        queries=case.queries.__class__(**windows),
        places=places,
        selected=array(jnp.bool_, batch, queries, kv * group, regions),
        spec=dataclasses.replace(case.spec, query_block=query_block),
    )


def _loss(case):
    out = gaze_prefill(
        *case.arrays(), case.queries, case.places, case.selected, spec=case.spec, implementation="xla"
    )
    return jnp.sum(out)


def _gradients(case):
    return jax.grad(lambda arrays: _loss(case.with_arrays(arrays)))(case.arrays())


@pytest.mark.parametrize("function", [_loss, _gradients])
def test_xla_never_materialises_all_logits(function):
    """No value of the traced program, forward or backward, has T * H * R * P elements."""
    everything = 1024 * 4 * 64 * 16

    def largest(platform, query_block):
        with compile_for(platform):
            # Another function each time: the platform is no part of the tracing cache's key.
            traced = jax.make_jaxpr(lambda case: function(case))(_large(query_block))
        return max(shape.size for shape in _shapes(traced.jaxpr, []))

    assert largest("gpu", 64) <= everything / 8
    assert largest("gpu", 1024) >= everything, "the walk finds such a value where there is one"
    assert largest("cpu", 1024) <= everything / 2, "a CPU takes fewer queries at once than it may"


def test_xla_memory_is_bounded_by_the_query_block():
    """Compiled temporaries of the gradient: a few times one block's logits, not all queries'."""
    temporary = {}
    for query_block in (64, 1024):
        compiled = jax.jit(_gradients).lower(_large(query_block)).compile()
        temporary[query_block] = compiled.memory_analysis().temp_size_in_bytes
    logits = 4 * 4 * (64 * 16 + 32)
    assert temporary[64] < 8 * 64 * logits, temporary
    # 1,024 queries and all keys are more than a CPU takes at once: half of both.
    assert temporary[1024] > max(512 * 4 * 4 * 512, 2 * temporary[64]), temporary


def test_reference_and_xla_differ_in_program():
    """The two programs differ: the reference is not blocked and holds all logits at once."""
    case = cases.prefill(cases.rows())
    programs = [
        str(
            jax.make_jaxpr(
                lambda c, name=name: gaze_prefill(
                    *c.arrays(), c.queries, c.places, c.selected, spec=c.spec, implementation=name
                )
            )(case)
        )
        for name in ("reference", "xla")
    ]
    assert programs[0] != programs[1]
    assert np.isfinite(np.asarray(oracle.prefill(case))).all()
