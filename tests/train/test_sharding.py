"""Invariant 4 for training: parameters and batch split over a mesh give what one device gives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.parallel import rules
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train.step import (
    abstract_state,
    init_state,
    loss_and_metrics,
    put_batch,
    shardings_of,
)
from tests.helpers.experiments import batches_of, compiled, tiny_experiment

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("train")]

SHARDED = MeshConfig(data=2, fsdp=4)


@pytest.fixture(scope="module")
def batch():
    return batches_of(tiny_experiment())[0]


def gradient(mesh, batch):
    """Loss, metrics and gradient at the first state, on a mesh; random numbers where zeros start."""
    experiment = tiny_experiment()
    params = init_state(experiment, mesh).params
    shardings = shardings_of(params)

    def stirred(path, leaf):
        name = jax.tree_util.keystr(path)
        rng = np.random.default_rng(sum(map(ord, name)))
        return np.asarray(leaf) + rng.normal(size=leaf.shape).astype(np.float32) * 0.1

    params = jax.device_put(jax.tree_util.tree_map_with_path(stirred, params), shardings)
    run = jax.jit(
        jax.grad(lambda p, b: loss_and_metrics(p, b, jnp.float32(0.25), experiment.model), has_aux=True),
        out_shardings=(shardings, rules.replicated(mesh)),
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.flax_rules()):
        return run(params, put_batch(batch, mesh))


def test_gradients_and_metrics_are_those_of_one_device(batch):
    one, measured = gradient(make_mesh(MeshConfig(data=1), jax.devices()[:1]), batch)
    many, measured_many = gradient(make_mesh(SHARDED), batch)
    for name, value in measured.items():
        np.testing.assert_allclose(measured_many[name], value, rtol=1e-5, err_msg=name)

    # A bias of the tower's keys has no gradient but rounding, so the scale is that of all.
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one))
    assert scale > 1e-3
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path)
        ),
        one,
        many,
    )


def test_a_step_leaves_every_array_where_it_belongs(batch):
    mesh = make_mesh(SHARDED)
    experiment = tiny_experiment()
    state, _ = compiled(experiment, mesh)(init_state(experiment, mesh), put_batch(batch, mesh))
    wanted = shardings_of(abstract_state(experiment, mesh))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == wanted
    kernel = state.params["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 32 // 4, 48)}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert len(moments) == 4  # two of this kernel and two of gate_proj
    assert all(leaf.sharding == kernel.sharding for leaf in moments)
