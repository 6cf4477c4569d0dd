"""The work of a training step whose sequences are split over devices, read from the compiled module."""

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from gaze_jax.errors import UserError
from gaze_jax.parallel import rules
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train.objective import ObjectiveConfig
from gaze_jax.train.step import abstract_state, check_mesh, put_batch, step_function
from tests.helpers.experiments import tiny_experiment
from tests.helpers.streams import PlacedView, Text, batch, sample

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("train")]

KINDS = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
KV_HEADS, HEADS, DIM = 1, 6, 10


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of a device, bytes of its largest array, and the shapes of what it sends."""

    flops: float
    largest: int
    sent: set[tuple[int, ...]]


@functools.cache
def work(ranks):
    """Of one sample with 16 images: 64 regions of 4 tokens and 80 of the text stream."""
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "mlp_dim": 256}
    changes = {f"model.decoder.{name}": size for name, size in sizes.items()}
    changes |= {"model.vision.mlp_dim": 256, "model.gaze.query_block": 16}
    experiment = tiny_experiment(batch_size=1, **changes)
    row = sample([Text(2), *[PlacedView(4, 4)] * 16, Text(62)], region=(2, 2), context=1)
    arrays = {name: np.asarray(a) for name, a in vars(batch([row])).items() if a is not None}
    arrays |= {"images": np.zeros((1, 16, 20, 20, 3), np.float32), "sample_id": np.zeros(1, np.int32)}
    mesh = make_mesh(MeshConfig(data=1, context=ranks), jax.devices()[:ranks])
    state, placed = abstract_state(experiment, mesh), put_batch(arrays, mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.flax_rules()):
        compiled = jax.jit(step_function(experiment)).lower(state, placed).compile()
    text = compiled.as_text()

    def shapes(text):
        return {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([0-9,]+)\]", text)}

    sent = "".join(re.findall(rf"= (.*?) (?:{KINDS})(?:-start)?\(", text))
    return Work(compiled.cost_analysis()["flops"], max(map(math.prod, shapes(text))) * 4, shapes(sent))


@pytest.mark.parametrize("ranks", [4, pytest.param(8, marks=pytest.mark.long)])
def test_ranks_share_the_work_of_a_sample(ranks):
    """FLOPs and the largest array fall as the share falls: the tower's, the decoder's and the objective's."""
    one, many = work(1), work(ranks)
    assert one.flops / ranks <= many.flops <= 1.15 * one.flops / ranks
    # Weights of a layer are whole while they are used, and so are the features that ranks pool from.
    assert many.largest <= max(1.01 * one.largest / ranks, 256 * 256 * 4)


def test_no_key_or_value_leaves_its_rank():
    """Queries [B, T, H, D] and their results go between ranks; nothing has the shape of keys or values."""
    sent = work(4).sent
    assert any(shape[-2:] == (HEADS, DIM) for shape in sent), "queries do"
    # Parameters are sent too: the key's kernel, and the gradients of the norms of both layers.
    others = [shape for shape in sent if shape[-1] == DIM and HEADS not in shape and shape != (32, DIM)]
    assert not [shape for shape in others if math.prod(shape) > 2 * DIM]


def test_distillation_compares_whole_sequences():
    experiment = tiny_experiment(**{"mesh.data": 1, "mesh.fsdp": 1, "mesh.context": 8})
    objective = ObjectiveConfig("distill")
    with pytest.raises(UserError, match=r"^mesh\.context=8 splits sequences, .* use mesh\.fsdp"):
        check_mesh(dataclasses.replace(experiment, objective=objective), make_mesh(experiment.mesh))
