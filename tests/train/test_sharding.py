"""Invariant 4 for training: parameters and batch split over a mesh give what one device gives."""

import dataclasses
import functools
import math
import re
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.errors import UserError
from gaze_jax.parallel import rules
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train import objective
from gaze_jax.train.losses import next_token_loss
from gaze_jax.train.step import (
    abstract_state,
    check_mesh,
    init_state,
    put_batch,
    shardings_of,
    step_function,
)
from tests.helpers.experiments import batches_of, begun, compiled, tiny_experiment

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("train")]

SHARDED = MeshConfig(data=2, fsdp=4)


@pytest.fixture(scope="module")
def batch():
    return batches_of(tiny_experiment())[0]


HEADS = {"model.decoder.num_kv_heads": 2}
"""A model whose heads two devices can share."""


def gradient(mesh, batch, **overrides):
    """Loss, metrics and gradient at the first state, on a mesh; random numbers where zeros start."""
    experiment = tiny_experiment(**overrides)
    params = begun(experiment, mesh).params
    shardings = shardings_of(params)

    def stirred(path, leaf):
        name = jax.tree_util.keystr(path)
        rng = np.random.default_rng(sum(map(ord, name)))
        return np.asarray(leaf) + rng.normal(size=leaf.shape).astype(np.float32) * 0.1

    params = jax.device_put(jax.tree_util.tree_map_with_path(stirred, params), shardings)
    run = jax.jit(
        jax.grad(lambda p, b: next_token_loss(p, b, jnp.float32(0.25), experiment.model), has_aux=True),
        out_shardings=(shardings, rules.replicated(mesh)),
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.flax_rules()):
        return run(params, put_batch(batch, mesh))


@pytest.mark.parametrize(
    ("mesh", "overrides"),
    [
        (MeshConfig(1, 2, 2, 2), HEADS),
        pytest.param(SHARDED, {}, marks=pytest.mark.long),
        *(
            pytest.param(mesh, HEADS, marks=pytest.mark.long)
            for mesh in (
                *(MeshConfig(8), MeshConfig(1, 8), MeshConfig(4, 1, 2), MeshConfig(1, 4, 2)),
                *(MeshConfig(2, 2, 2), MeshConfig(1, 1, 1, 8), MeshConfig(2, 1, 1, 4)),
            )
        ),
    ],
    ids=str,
)
def test_gradients_and_metrics_are_those_of_one_device(batch, mesh, overrides):
    one, measured = gradient(make_mesh(MeshConfig(data=1), jax.devices()[:1]), batch, **overrides)
    many, measured_many = gradient(make_mesh(mesh), batch, **overrides)
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


def test_a_mesh_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(UserError, match=r"tensor=2 does not divide decoder.num_kv_heads=1, .* can be 1\."):
        check_mesh(tiny_experiment(), make_mesh(MeshConfig(2, 2, 2)))


@pytest.mark.parametrize(
    "shape",
    [
        MeshConfig(2, 4),
        *(pytest.param(shape, marks=pytest.mark.long) for shape in (MeshConfig(1, 4, 2), MeshConfig(1, 8))),
    ],
    ids=str,
)
def test_no_device_does_or_holds_more_than_its_share(shape):
    """The work of the compiled step, not only its values: the tower's above all."""
    one, many = work(MeshConfig(1, 1)), work(shape)
    assert one.flops / 8 <= many.flops <= 1.15 * one.flops / 8
    # Images, residual streams and hidden channels of a row are whole on the devices that share its work.
    assert many.largest <= 1.01 * one.largest / (8 // shape.tensor)
    # The tables [V, M] = [144, 32] and logits exist in parts only.
    rows = 144 // shape.tensor
    whole = {(144, 32), (32, 144), (rows, 32), (32, rows)} | ({(144, 8)} if shape.tensor > 1 else set())
    assert not whole & many.shapes
    assert not any(len(found) == 3 and found[-1] in (144, rows) for found in many.shapes)
    if shape.tensor == 1:
        # Between devices go parameters, and text-stream vectors of 29 tokens or a chunk of 15: never visual.
        activations = {found[1] for found in many.sent if len(found) > 2 and found[:3] != (5, 5, 3)}
        assert activations == {15, 29}


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of a device, bytes of its largest array, and the shapes of all arrays and of those it sends."""

    flops: float
    largest: int
    shapes: set[tuple[int, ...]]
    sent: set[tuple[int, ...]]


@functools.cache
def work(shape):
    """Of a step whose model has more channels than the tiny one, as real ones have: patches and what is
    computed of single vectors are not split over devices that share rows."""
    mesh = make_mesh(shape, jax.devices()[: shape.data * shape.fsdp * shape.tensor])
    channels = {"model.decoder.mlp_dim": 256, "model.vision.mlp_dim": 256}
    experiment = tiny_experiment(batch_size=16, **HEADS, **channels)
    batch = put_batch(batches_of(experiment)[0], mesh)
    step, state = jax.jit(step_function(experiment)), abstract_state(experiment, mesh)
    with (
        jax.set_mesh(mesh),
        nn.logical_axis_rules(rules.flax_rules()),
        mock.patch.object(objective, "LOGIT_BYTES", 32 * 1024),
    ):
        compiled = step.lower(state, batch).compile()
    text = compiled.as_text()

    def shapes(text):
        return {tuple(map(int, shape.split(","))) for shape in re.findall(r"[fs]32\[([0-9,]+)\]", text)}

    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    sent = "".join(re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", text))
    largest = max(map(math.prod, shapes(text))) * 4
    return Work(compiled.cost_analysis()["flops"], largest, shapes(text), shapes(sent))


def test_parts_of_a_batch_add_up_to_it():
    """Gradients and metrics by sums over tokens, though the parts have different numbers of targets."""
    experiment = tiny_experiment(batch_size=8)
    mesh = make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    (host,) = batches_of(experiment)
    host["targets"][1::2, :-4] = -100
    batch = put_batch(host, mesh)
    found = {}
    for parts in (1, 2):
        parted = dataclasses.replace(experiment, accumulate=parts)
        state = begun(parted, mesh)
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules.flax_rules()):
            found[parts] = jax.jit(step_function(parted))(state, batch)
    for name, value in found[1][1].items():
        np.testing.assert_allclose(found[2][1][name], value, rtol=1e-5, err_msg=name)
    # Adam divides by the root of the second moment, so rounding of a small gradient grows: compare moments.
    for mine, theirs in zip(jax.tree.leaves(found[2][0].opt_state), jax.tree.leaves(found[1][0].opt_state)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("rows", "parts"), [(12, 1), (8, 2)])
def test_rows_that_the_devices_cannot_share_are_refused(rows, parts):
    experiment = tiny_experiment(batch_size=rows, accumulate=parts)
    with pytest.raises(UserError, match=rf"^batch_size={rows}.* must be a multiple of the 8 devices"):
        check_mesh(experiment, make_mesh(SHARDED))


@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_step_leaves_every_array_where_it_belongs(batch, tensor):
    experiment = tiny_experiment(**{"mesh.tensor": tensor, **HEADS} if tensor > 1 else {})
    mesh = make_mesh(experiment.mesh)
    assert dict(mesh.shape)["fsdp"] == 2
    state, _ = compiled(experiment, mesh)(init_state(experiment, mesh), put_batch(batch, mesh))
    wanted = shardings_of(abstract_state(experiment, mesh))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == wanted
    kernel = state.params["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 32 // 2, 48 // tensor)}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert len(moments) == 4  # two of this kernel and two of gate_proj
    assert all(leaf.sharding == kernel.sharding for leaf in moments)
