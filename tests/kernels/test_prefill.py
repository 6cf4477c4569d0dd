"""The shared suite of ``gaze_prefill``, one subclass per implementation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import gaze_prefill
from pallas_kernels.gaze_prefill import tpu
from tests.helpers import cases, oracle
from tests.kernels.prefill_suite import PrefillSuite


class TestReference(PrefillSuite):
    """The oracle itself, against float64 loops in numpy."""

    implementation = "reference"
    shards_heads = False  # one flat vmap over batch, queries and heads

    def expected(self, case):
        return oracle.prefill(case)


class TestXla(PrefillSuite):
    """Plain XLA, on whatever backend runs the tests."""

    implementation = "xla"


class TestTpu(PrefillSuite):
    """The Mosaic kernels, interpreted on a CPU: reads out of bounds raise, scratch is NaN, races show."""

    implementation = "tpu"
    shards_heads = False  # the compiler does not partition a Mosaic kernel: it takes a shard_map

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
        dense_order=array(jnp.int32, batch, dense),
        dense_segment=array(jnp.int32, batch, dense),
    )
    visual = array(jnp.float32, batch, kv, regions, slots, dim)
    keys = array(jnp.float32, batch, kv, dense, dim)
    return cases.Prefill(
        q=array(jnp.float32, batch, queries, kv * group, dim),
        visual_k=visual,
        visual_v=visual,
        dense_k=keys,
        dense_v=keys,
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
    case = _large(64)
    everything = 1024 * 4 * 64 * 16
    shapes = _shapes(jax.make_jaxpr(function)(case).jaxpr, [])
    assert max(s.size for s in shapes) <= everything / 8
    unblocked = _shapes(jax.make_jaxpr(function)(_large(1024)).jaxpr, [])
    assert max(s.size for s in unblocked) >= everything, "the walk finds such a value where there is one"


def test_xla_memory_is_bounded_by_the_query_block():
    """Compiled temporaries of the gradient: a few times one block's logits, not all queries'."""
    temporary = {}
    for query_block in (64, 1024):
        compiled = jax.jit(_gradients).lower(_large(query_block)).compile()
        temporary[query_block] = compiled.memory_analysis().temp_size_in_bytes
    logits = 4 * 4 * (64 * 16 + 32)
    assert temporary[64] < 8 * 64 * logits, temporary
    assert temporary[1024] > 1024 * logits > 2 * temporary[64], temporary


def test_reference_and_xla_differ_in_program():
    """The two implementations are told apart: an unblocked reference holds every logit at once."""
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
