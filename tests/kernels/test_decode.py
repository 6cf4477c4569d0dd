"""The shared suite of ``gaze_decode``, one subclass per implementation, and what XLA reads."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import GazeSpec, gaze_decode
from tests.helpers import oracle
from tests.kernels.decode_suite import DecodeSuite


class TestReference(DecodeSuite):
    """The oracle itself, against float64 loops in numpy."""

    implementation = "reference"
    shards_heads = False  # one flat vmap over rows and heads

    def expected(self, case):
        return oracle.decode(case)


class TestXla(DecodeSuite):
    """Plain XLA, on whatever backend runs the tests."""

    implementation = "xla"


class TestTpu(DecodeSuite):
    """The TPU kernel, interpreted with race detection, NaN scratch and bounds checks (or on a TPU)."""

    implementation = "tpu"
    shards_heads = False  # a Mosaic kernel is partitioned by shard_map, not by the compiler


@pytest.mark.parametrize("share", ["head", "group"])
def test_xla_holds_only_selected_regions(share):
    """8 of 1,024 regions: temporaries stay below a tenth of one layer's keys, so no layer is sliced out."""
    layers, kv, group, regions, slots, dense, dim, capacity = 3, 2, 2, 1024, 16, 8, 16, 8

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    cache = array(jnp.float32, layers, 1, kv, regions, slots, dim)
    dense_cache = array(jnp.float32, layers, 1, kv, dense, dim)
    heads = kv * group if share == "head" else kv
    spec = GazeSpec(scale=1.0, share=share)
    compiled = (
        jax.jit(
            lambda q, k, v, dk, dv, layer, indices, seen, dense_seen: gaze_decode(
                q, (k, v), dk, dv, layer, indices, seen, dense_seen, spec=spec, implementation="xla"
            )
        )
        .lower(
            array(jnp.float32, 1, kv * group, dim),
            cache,
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
