"""Invariant 7: N steps, a stop and M steps end in the same bits as N + M steps."""

import dataclasses
import json
import os
import signal
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.errors import NotFiniteError, UserError
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train import checkpoint, loop, metrics, timing
from gaze_jax.train.checkpoint import load_for_inference
from gaze_jax.train.step import put_batch, shardings_of
from tests.helpers.experiments import batches_of, begun, compiled, data_of, reused_programs, tiny_experiment

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("train")]


def content(workdir):
    """What the newest checkpoint says of every array, its step and its data, and the bytes of the metrics."""
    with checkpoint.open_manager(workdir) as manager:
        step = manager.latest_step()
        meta = checkpoint._meta(manager, step)
    return step, meta["leaves"], meta["data"], (workdir / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    with reused_programs():
        yield


def during_step(monkeypatch, number, act):
    """Call ``act(state)``, which returns a state, before step ``number`` of a run."""
    compiled = loop.compile_step

    def compile_and_count(*args):
        step_once, done = compiled(*args), 0

        def counted(state, batch):
            nonlocal done
            done += 1
            return step_once(act(state) if done == number else state, batch)

        return counted

    monkeypatch.setattr(loop, "compile_step", compile_and_count)


def terminate(state):
    os.kill(os.getpid(), signal.SIGTERM)
    return state


def spoil(state):
    """A parameter becomes NaN, as after a bad update."""
    with jax.transfer_guard("allow"):  # the loop forbids what only a test does
        params = state.params | {"newline": state.params["newline"].at[3].set(jnp.nan)}
        return dataclasses.replace(state, params=jax.device_put(params, shardings_of(state.params)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run on a mesh of 8 devices."""
    workdir = tmp_path_factory.mktemp("whole")
    assert loop.train(tiny_experiment(), workdir)
    return workdir


@pytest.mark.parametrize("stops", [pytest.param((3,), marks=pytest.mark.long), (2, 1)], ids=str)
def test_a_run_stopped_by_sigterm_ends_in_the_same_bits(whole, stops, tmp_path, monkeypatch, capsys):
    # Stops at steps 3, and 2 and 3: in the middle of a row of metrics.jsonl and at the end of one.
    experiment = tiny_experiment()
    before = signal.getsignal(signal.SIGTERM)
    for steps in stops:
        with monkeypatch.context() as patch:
            during_step(patch, steps, terminate)
            assert not loop.train(experiment, tmp_path)
        assert "Stopped by SIGTERM" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
    assert loop.train(experiment, tmp_path)
    assert f"from step {sum(stops)}" in capsys.readouterr().out
    assert content(tmp_path) == content(whole)


def test_a_finished_run_is_left_alone(whole, capsys):
    before = content(whole)
    assert loop.train(tiny_experiment(), whole)
    assert capsys.readouterr().out == "All 6 steps are done.\n"
    assert content(whole) == before


@pytest.mark.long  # tests/train/test_corpus.py compares the batches
def test_workers_of_the_pipeline_change_nothing(whole, tmp_path):
    assert loop.train(tiny_experiment(num_workers=1), tmp_path)
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
    with checkpoint.open_manager(whole) as manager:
        found = checkpoint.restore(manager, experiment, mesh, data_of(experiment).fingerprint)
    kernel = found.state.params["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 32 // 8, 48)}
    chex.assert_trees_all_equal(found.state.params, one.params, strict=True)
    assert one.step == 6
    assert one.tokenizer.decode(one.tokenizer.encode("Where is the only 7?")[0]) == "Where is the only 7?"


def test_what_is_not_finite_stops_the_run_and_is_never_saved(tmp_path, monkeypatch):
    experiment = tiny_experiment(checkpoint_every=1)
    message = r"stopped at step 4: param_norm is nan\. .* the checkpoints in .* are sound"
    with monkeypatch.context() as patch, pytest.raises(NotFiniteError, match=message):
        during_step(patch, 4, spoil)
        loop.train(experiment, tmp_path)
    trained = load_for_inference(tmp_path, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    assert trained.step == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained.params))
    assert loop.train(experiment, tmp_path)


def test_a_batch_of_another_shape_is_refused_rather_than_compiled():
    experiment = tiny_experiment()
    mesh = make_mesh(experiment.mesh)
    batch = put_batch(batches_of(experiment)[0], mesh)
    batch["tokens"] = batch["tokens"][:, :-1]
    with pytest.raises(ValueError, match="Batch field tokens is int32"):
        compiled(experiment, mesh)(begun(experiment, mesh), batch)


def test_a_program_that_is_compiled_between_steps_is_reported(tmp_path, monkeypatch, capsys):
    """Once, with its step; what an evaluation, a save and a first batch compile is not."""
    compiled_at = 4

    def compile_something(state):
        with jax.transfer_guard("allow"):
            jax.jit(lambda a: a * compiled_at + time.monotonic())(np.float32(1)).block_until_ready()
        return state

    during_step(monkeypatch, compiled_at, compile_something)
    assert loop.train(tiny_experiment(checkpoint_every=2, eval_every=3), tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "compiled where none" in line]
    assert len(lines) == 1 and lines[0].startswith("step 4: ")


def test_an_array_that_is_moved_within_a_step_ends_the_run(tmp_path, monkeypatch):
    def move(state):
        return dataclasses.replace(state, step=state.step + np.int32(0))

    during_step(monkeypatch, 2, move)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.train(tiny_experiment(), tmp_path)


def test_times_are_in_a_file_of_their_own_with_compiling_apart(tmp_path, monkeypatch, capsys):
    compile_step = loop.compile_step

    def slowly(*args):
        time.sleep(0.5)
        return compile_step(*args)

    monkeypatch.setattr(loop, "compile_step", slowly)
    assert loop.train(tiny_experiment(checkpoint_every=3), tmp_path)
    assert "compiled the step in " in capsys.readouterr().out
    start, *rows, rest = metrics.read(tmp_path / timing.FILE)
    assert start["start"] == 0 and [row["step"] for row in rows] == [2, 3, 4, 6]
    assert [row["steps"] for row in rows] == [2, 1, 1, 2] and rest["steps"] == 0
    first, *others = rows
    assert first["compile_s"] >= 0.5 and first["start_s"] > 0
    assert all(row["compile_s"] == row["start_s"] == 0 for row in others)
    assert [row["save_s"] > 0 for row in (*rows, rest)] == [False, False, True, False, True]
    for row in rows:
        seconds = row["step_s"] + row["wait_s"] + row["save_s"]
        assert row["steps_per_s"] == pytest.approx(row["steps"] / seconds)
        assert row["samples_per_s"] == pytest.approx(8 * row["steps_per_s"])
    # Half a second and more of this run was no step.
    assert sum(row["step_s"] for row in rows) < rest["time"] - start["time"] - 0.5
    assert 0 < rows[-1]["goodput"] < 1 and "mfu" not in rows[-1]


def test_a_device_without_memory_is_one_sentence(tmp_path, monkeypatch):
    def compile_step(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 57 bytes.\nMore.")

    monkeypatch.setattr(loop, "compile_step", compile_step)
    with pytest.raises(UserError, match=r"too little memory \(RESOURCE_EXHAUSTED: .* 57 bytes.\); use fewer"):
        loop.train(tiny_experiment(), tmp_path)
