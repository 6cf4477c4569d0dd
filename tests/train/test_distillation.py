"""Distillation of a dense checkpoint into Gaze: its loss, its teacher, and a run that is stopped."""

import json
import os
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.convert.origin import open_start
from gaze_jax.errors import UserError
from gaze_jax.parallel import rules
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train import checkpoint, loop, teacher
from gaze_jax.train.checkpoint import load_for_inference
from gaze_jax.train.config import parse
from gaze_jax.train.losses import distillation_loss
from gaze_jax.train.step import abstract_state, compile_step, put_batch, shardings_of
from tests.helpers.experiments import (
    batches_of,
    random_state,
    save_untrained,
    tiny,
    tiny_experiment,
    whole_arrays,
)

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("train")]

DISTILL = {"objective.name": "distill", "objective.region_weight": 0.5, "steps": 4, "log_every": 1}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense run to start from, with random parameters."""
    workdir = tmp_path_factory.mktemp("dense")
    save_untrained(tiny_experiment(arm="dense"), workdir)
    return workdir


def distilling(dense, **overrides):
    return parse(tiny(init_from=str(dense), **DISTILL | overrides))


@pytest.fixture(scope="module")
def runs(dense, tmp_path_factory):
    """The same run as a whole, and stopped after two steps; one compilation."""
    experiment = distilling(dense, **{"optimizer.frozen": ("vision",)})
    folder, programs = tmp_path_factory.mktemp("runs"), {}

    def once(experiment, mesh, batch, teacher):
        if not programs:
            programs["step"] = compile_step(experiment, mesh, batch, teacher)
        return programs["step"]

    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"), whole_arrays():
        patch.setattr(loop, "compile_step", once)
        start = open_start(str(dense))
        assert loop.train(experiment, folder / "whole", start)
        with patch.context() as stopping:
            append = loop.metrics.append

            def stop(path, row):
                append(path, row)
                if row["step"] == 1:  # the signal is asked for at the end of a step
                    os.kill(os.getpid(), signal.SIGTERM)

            stopping.setattr(loop.metrics, "append", stop)
            assert not loop.train(experiment, folder / "stopped", start)
        assert loop.train(experiment, folder / "stopped", start)
    return folder


def test_a_stopped_distillation_ends_in_the_same_bits(runs):
    def content(workdir):
        with checkpoint.open_manager(workdir) as manager:
            leaves = checkpoint._meta(manager, manager.latest_step())["leaves"]
        return leaves, (workdir / "metrics.jsonl").read_bytes()

    assert content(runs / "whole") == content(runs / "stopped")


def test_metrics_are_the_parts_of_the_loss(runs):
    rows = [json.loads(line) for line in (runs / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        np.testing.assert_allclose(row["loss"], row["kl"] + 0.5 * row["region_kl"], rtol=1e-5)
        assert row["kl"] > 0 and row["region_kl"] > 0 and row["cross_entropy"] > row["kl"]


def test_the_frozen_tower_keeps_its_bytes_and_the_rest_moves(runs, dense):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    before, after = (load_for_inference(folder, mesh).params for folder in (dense, runs / "whole"))
    for name in ("vision", "decoder", "projector"):
        same = [np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (before[name], after[name])))]
        assert all(same) if name == "vision" else not any(same)


def test_another_teacher_is_refused(runs, dense, tmp_path):
    other = tmp_path / "other"
    save_untrained(tiny_experiment(arm="dense", seed=4), other)
    experiment = distilling(dense, **{"optimizer.frozen": ("vision",)})
    with pytest.raises(UserError, match=r"decoder/.* of init_from=.*other has changed \(\d+ of \d+ param"):
        loop.train(experiment, runs / "stopped", open_start(str(other)))


def test_a_teacher_with_context_tokens_is_refused(dense, tmp_path):
    save_untrained(tiny_experiment(arm="dense_context"), tmp_path / "context")
    with pytest.raises(UserError, match="needs a teacher without context tokens, and init_from has 1 per"):
        loop.train(distilling(dense), tmp_path / "run", open_start(str(tmp_path / "context")))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"init_from": None}, "objective.name='distill' needs init_from"),
        ({"objective.name": "imitate"}, "objective.name='imitate' must be one of"),
        ({"objective.name": "next_token"}, "region_weight=0.5 has an effect only with"),
        ({"objective.region_weight": -1.0}, "region_weight=-1.0 must be a number of at least 0"),
        ({"arm": "dense_context"}, r"region_weight=0.5 has no effect with dense attention \(arm='dense_con"),
    ],
)
def test_objectives_that_contradict_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        parse(tiny(**{"init_from": "ckpt"} | DISTILL | overrides))


def made(experiment, dense, mesh):
    """The teacher, and the other parameters of a student."""
    start = open_start(str(dense))
    taught = teacher.make_teacher(experiment, start.config, start.load(mesh), mesh)
    shardings = shardings_of(abstract_state(experiment, mesh).params)
    return taught, jax.device_put(random_state(experiment).params, shardings)


def gradient(dense, mesh):
    """Gradient and metrics of new parameters that imitate a checkpoint, on a mesh; metrics a bit downhill."""
    experiment = distilling(dense)
    taught, params = made(experiment, dense, mesh)
    (batch,) = batches_of(experiment)
    run = jax.jit(
        jax.grad(
            lambda p, b, t: distillation_loss(p, b, jnp.float32(0.25), experiment.model, t, 0.5), has_aux=True
        ),
        out_shardings=(shardings_of(params), rules.replicated(mesh)),
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.flax_rules()):
        batch = put_batch(batch, mesh)
        gradients, metrics = run(params, batch, taught)
        downhill = jax.tree.map(lambda leaf, slope: leaf - 0.05 * slope, params, gradients)
        return gradients, metrics, run(downhill, batch, taught)[1]


@pytest.mark.long
def test_a_mesh_changes_neither_losses_nor_gradients(dense):
    one, measured, downhill = gradient(dense, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    many, measured_many, _ = gradient(dense, make_mesh(MeshConfig(data=2, fsdp=4)))
    assert all(downhill[name] < measured[name] for name in ("loss", "kl"))
    for name, value in measured.items():
        np.testing.assert_allclose(measured_many[name], value, rtol=1e-5, err_msg=name)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one))
    for mine, theirs in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * scale)


def test_the_student_that_is_its_teacher_has_nothing_to_learn(dense):
    """Dense and without context tokens: the divergence is 0 and so is its gradient."""
    experiment = distilling(dense, arm="dense", **{"objective.region_weight": 0.0})
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    taught, _ = made(experiment, dense, mesh)
    (batch,) = batches_of(experiment)
    loss = jax.grad(
        lambda p: distillation_loss(p, put_batch(batch, mesh), None, experiment.model, taught, 0.0),
        has_aux=True,
    )
    gradient, metrics = jax.jit(loss)(taught.params)
    assert abs(float(metrics["kl"])) < 1e-6 and float(metrics["cross_entropy"]) > 1
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-5
