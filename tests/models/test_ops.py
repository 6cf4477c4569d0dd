"""Kernels on a mesh: each device runs its rows and heads, and the result stays where it was computed."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from gaze_jax.models import ops
from pallas_kernels import dispatch
from pallas_kernels.gaze_decode import api
from pallas_kernels.gaze_prefill import chunks, tpu
from tests.helpers import cases, models
from tests.helpers.streams import PlacedView, Text, sample

RULES = [("batch", ("data",)), ("kv_heads", ("tensor",)), ("heads", ("tensor",)), ("layers", None)]


def _mesh(data, tensor):
    kinds = (jax.sharding.AxisType.Auto,) * 2
    devices = jax.devices()[: data * tensor]
    return jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=kinds, devices=devices)


@pytest.fixture
def mesh():
    return _mesh(2, 2)


def _decode(case, implementation="tpu"):
    packed = api.pack(case.k, case.v, spec=case.spec, implementation=implementation)
    return ops.gaze_decode(
        case.q,
        packed,
        case.text_k,
        case.text_v,
        case.layer,
        case.indices,
        case.visual_seen,
        case.text_seen,
        spec=case.spec,
        implementation=implementation,
    )


@pytest.mark.parametrize(
    ("select_per", "listed", "implementation"),
    [
        ("head", True, "tpu"),
        ("kv_head", True, "xla"),
        ("head", False, "xla"),
        pytest.param("head", True, "xla", marks=pytest.mark.long),
        pytest.param("kv_head", True, "tpu", marks=pytest.mark.long),
        pytest.param("head", False, "tpu", marks=pytest.mark.long),
    ],
)
def test_edge_15_decode_on_a_mesh_equals_one_device(select_per, listed, implementation, mesh):
    """Rows over "data", heads over "tensor": the values of one device, sharded over both."""
    case = cases.decode(select_per=select_per, capacity=4 if listed else None)
    case = dataclasses.replace(case, spec=cases.runnable(case.spec))
    run = functools.partial(_decode, implementation=implementation)
    alone = jax.jit(run)(case)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        got = jax.jit(run)(case)
    models.close(got, alone, 2e-5)
    expected = jax.sharding.NamedSharding(mesh, jax.P("data", "tensor"))
    assert got.sharding.is_equivalent_to(expected, got.ndim)


def _prefill(case, implementation):
    return ops.gaze_prefill(
        *case.arrays(),
        case.queries,
        case.places,
        case.selected,
        spec=case.spec,
        implementation=implementation,
    )


def _prefill_with_gradients(case, implementation="tpu"):
    out, pull = jax.vjp(lambda arrays: _prefill(case.with_arrays(arrays), implementation), case.arrays())
    return out, pull(jnp.cos(case.q))[0]


def test_edge_15_prefill_on_a_mesh_equals_one_device(mesh, monkeypatch):
    """Output and gradients of the TPU kernels, rows over "data" and heads over "tensor"."""
    # Tiles of the size of the toy: the interpreter takes as long for padding as for tokens.
    monkeypatch.setattr(tpu, "TILES", tpu.Tiles(queries=32, chunk=64, visits=4, keys=16, open_keys=32))
    rows = [
        sample([PlacedView(2, 3), Text(2)], context=1),
        sample([PlacedView(2, 3), Text(2)], context=1, seed=1),
    ]
    case = cases.prefill(rows)
    case = dataclasses.replace(case, spec=cases.runnable(case.spec))
    alone = jax.jit(_prefill_with_gradients)(case)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        got = jax.jit(_prefill_with_gradients)(case)
    jax.tree.map(lambda a, b: models.close(a, b, 2e-5), got, alone)
    expected = jax.sharding.NamedSharding(mesh, jax.P("data", None, "tensor"))
    assert got[0].sharding.is_equivalent_to(expected, 4)


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
def test_edge_15_chunks_on_a_mesh_equal_one_device(shape, monkeypatch):
    """Output and gradients in XLA with chunks; every device takes its own rows, and none asks another."""
    monkeypatch.setattr(chunks, "CHUNK", 7)
    rows = [sample([PlacedView(3, 3), Text(2)], context=1, seed=seed) for seed in (0, 1)]
    case = cases.prefill(rows)
    run = jax.jit(functools.partial(_prefill_with_gradients, implementation="xla"))
    alone = run(case)
    mesh = _mesh(*shape)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        got = run(case)
        text = run.lower(case).compile().as_text()
    jax.tree.map(lambda a, b: models.close(a, b, 2e-5), got, alone)
    expected = jax.sharding.NamedSharding(mesh, jax.P("data", None, "tensor"))
    assert got[0].sharding.is_equivalent_to(expected, 4)
    assert not re.search(r" (all-gather|all-reduce|all-to-all|collective-permute)[-(]", text)


def test_what_xla_splits_itself_is_left_to_it(mesh):
    """XLA for an accelerator is not wrapped, the compiler may split it as it likes; for a CPU it is."""
    case = cases.decode()
    case = dataclasses.replace(case, spec=cases.runnable(case.spec))

    def program(implementation):
        return str(jax.make_jaxpr(functools.partial(_decode, implementation=implementation))(case))

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        assert "shard_map" in program("tpu") and "shard_map" in program("xla")
        with dispatch.compile_for("gpu"):
            assert "shard_map" not in program("xla")
