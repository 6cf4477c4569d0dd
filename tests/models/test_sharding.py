"""Invariant 4: a batch sharded over a data mesh equals the unsharded one, and stays sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.models import DUMMY
from tests.helpers import models
from tests.helpers.streams import batch


@pytest.mark.parametrize("devices", [4])
def test_data_sharded_forward(devices):
    """Values, selections and output sharding of the routed forward on four devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    streams = batch([models.two_images(seed) for seed in range(devices)])
    images = models.images(devices, 2)
    top_k = jnp.array([[1], [2], [3], [18]], jnp.int32)
    run = models.forward(DUMMY, collect=True)
    expected, expected_out = run(models.parameters(DUMMY), images, streams, top_k)
    got, out = run(
        jax.device_put(models.parameters(DUMMY), everywhere), *jax.device_put((images, streams, top_k), rows)
    )
    models.close(got, expected, 1e-5)
    np.testing.assert_array_equal(out["selected"], expected_out["selected"])
    assert got.sharding.is_equivalent_to(rows, got.ndim)
    layered = jax.sharding.NamedSharding(mesh, jax.P(None, "data"))
    assert out["selected"].sharding.is_equivalent_to(layered, out["selected"].ndim)


def test_data_sharded_decode():
    """The cache keeps its sharding through a decoding step, and the step equals the unsharded one."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    layered = jax.sharding.NamedSharding(mesh, jax.P(None, "data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    streams, images = batch([models.two_images(seed) for seed in range(2)]), models.images(2, 2)
    variables, top_k = models.parameters(DUMMY), jnp.int32(3)
    _, cache, _ = models.prefill(DUMMY, 1)(variables, images, streams, top_k)
    write_index = streams.tokens.shape[1]
    order = streams.text_order[:, -1] + 1
    run = models.decode(DUMMY, 4)
    expected, _, expected_out = run(
        variables, jnp.array([1, 2]), order, cache, models.step(order, write_index), top_k
    )
    spread = jax.tree.map(lambda a: jax.device_put(a, rows if a.dtype == jnp.int32 else layered), cache)
    step = jax.tree.map(
        lambda a: jax.device_put(a, rows if a.ndim else everywhere), models.step(order, write_index)
    )
    tokens, order = jax.device_put((jnp.array([1, 2]), order), rows)
    got, after, out = run(jax.device_put(variables, everywhere), tokens, order, spread, step, top_k)
    models.close(got, expected, 1e-5)
    np.testing.assert_array_equal(out["indices"], expected_out["indices"])
    assert got.sharding.is_equivalent_to(rows, got.ndim)
    assert after.text_k.sharding.is_equivalent_to(layered, after.text_k.ndim)
