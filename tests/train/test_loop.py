"""Law 7: N steps, a stop and M steps end in the same bits as N + M steps."""

import functools
import json
import os
import signal

import jax
import numpy as np
import pytest

from gaze_jax.errors import UserError
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train import checkpoint, loop
from gaze_jax.train.checkpoint import load_for_inference
from gaze_jax.train.pipeline import make_iterator
from gaze_jax.train.step import compile_step, init_state, put_batch
from tests.helpers.experiments import tiny_experiment

pytestmark = pytest.mark.standard_promotion


def content(workdir):
    """Bytes of every array of the newest checkpoint, the data's position, and the metrics."""
    with checkpoint.open_manager(workdir) as manager:
        step = manager.latest_step()
        meta = checkpoint._meta(manager, step)
    (position,) = (workdir / "checkpoints" / str(step) / "data").glob("process_*.json")
    return step, meta["leaves"], position.read_text(), (workdir / "metrics.jsonl").read_bytes()


@functools.cache
def _compile(experiment, mesh):
    iterator, _ = make_iterator(experiment)
    batch = put_batch(next(iterator), mesh)
    iterator.close()
    return compile_step(experiment, mesh, batch)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """One program for all runs of one experiment: compiling takes most of these tests' time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_step", lambda experiment, mesh, batch: _compile(experiment, mesh))
        yield


def stop_after(monkeypatch, steps):
    """SIGTERM in the course of step number ``steps``."""
    compiled = loop.compile_step

    def compile_and_count(*args):
        step_once, done = compiled(*args), 0

        def counted(state, batch):
            nonlocal done
            done += 1
            if done == steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return step_once(state, batch)

        return counted

    monkeypatch.setattr(loop, "compile_step", compile_and_count)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compiled_once):
    """An uninterrupted run on a mesh of 8 devices."""
    workdir = tmp_path_factory.mktemp("whole")
    with jax.numpy_dtype_promotion("standard"):
        assert loop.train(tiny_experiment(**{"mesh.fsdp": 2}), workdir)
    return workdir


@pytest.mark.parametrize("stops", [(3,), (2, 1)], ids=str)
def test_a_run_stopped_by_sigterm_ends_in_the_same_bits(whole, stops, tmp_path, monkeypatch, capsys):
    # Stops at steps 3, and 2 and 3: in the middle of a row of metrics.jsonl and at the end of one.
    experiment = tiny_experiment(**{"mesh.fsdp": 2})
    before = signal.getsignal(signal.SIGTERM)
    for steps in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            assert not loop.train(experiment, tmp_path)
        assert "Stopped by SIGTERM" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
    assert loop.train(experiment, tmp_path)
    assert f"from step {sum(stops)}" in capsys.readouterr().out
    assert content(tmp_path) == content(whole)


def test_a_finished_run_is_left_alone(whole, capsys):
    before = content(whole)
    assert loop.train(tiny_experiment(**{"mesh.fsdp": 2}), whole)
    assert "from step 6" in capsys.readouterr().out
    assert content(whole) == before


def test_workers_of_the_pipeline_change_nothing(whole, tmp_path):
    assert loop.train(tiny_experiment(**{"mesh.fsdp": 2}, num_workers=1), tmp_path)
    assert content(tmp_path)[1] == content(whole)[1]


def test_metrics_hold_what_the_schedule_says(whole):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    # From all four regions, of four tokens each, to the one that the config ends with.
    assert rows[0]["top_k"] > rows[1]["top_k"] > rows[2]["top_k"] == 1.0
    for row in rows:
        np.testing.assert_allclose(row["visual_entries"], 4 * row["top_k"])
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_another_mesh_restores_the_same_values(whole):
    one = load_for_inference(whole, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    experiment = tiny_experiment(**{"mesh.fsdp": 8, "mesh.data": 1})
    mesh = make_mesh(experiment.mesh)
    iterator, fingerprint = make_iterator(experiment)
    with checkpoint.open_manager(whole) as manager:
        found = checkpoint.restore(manager, experiment, mesh, iterator, fingerprint)
    iterator.close()
    kernel = found.state.params["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert len({shard.index for shard in kernel.addressable_shards}) == 8
    jax.tree.map(np.testing.assert_array_equal, found.state.params, one.params)
    assert one.step == 6
    assert one.tokenizer.decode(one.tokenizer.encode("Where is the only 7?")[0]) == "Where is the only 7?"


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path):
    experiment = tiny_experiment(**{"optimizer.learning_rate": 1e38, "checkpoint_every": 1})
    with pytest.raises(UserError, match=r"stopped at step \d: .* is (nan|inf)"):
        loop.train(experiment, tmp_path)
    with checkpoint.open_manager(tmp_path) as manager:
        step = manager.latest_step()
    if step is not None:
        params = load_for_inference(tmp_path, make_mesh(MeshConfig(data=1), jax.devices()[:1])).params
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        assert step < experiment.steps


def test_a_batch_of_another_shape_is_refused_rather_than_compiled(tmp_path):
    experiment = tiny_experiment()
    mesh = make_mesh(experiment.mesh)
    iterator, _ = make_iterator(experiment)
    batch = put_batch(next(iterator), mesh)
    iterator.close()
    step_once = _compile(experiment, mesh)
    batch["tokens"] = batch["tokens"][:, :-1]
    with pytest.raises(ValueError, match="Batch field tokens is int32"):
        step_once(init_state(experiment, mesh), batch)
