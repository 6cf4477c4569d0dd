"""Steps whose loss or gradient is not finite: what they change, what is said of them, and what ends a run."""

import dataclasses
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.errors import NotFiniteError
from gaze_jax.parallel.mesh import make_mesh
from gaze_jax.train import checkpoint, loop, skipping
from gaze_jax.train.step import put_batch
from tests.helpers.experiments import batches_of, begun, compiled, reused_programs, tiny_experiment

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("train")]

AVERAGED = {"average_decay": 0.9}


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    with reused_programs():
        yield


def spoiled(batch, row=None):
    """A batch with a pixel of infinite brightness in a row, or in each."""
    images = batch["images"].astype(np.float32)
    images[slice(None) if row is None else row, :, 0, 0] = np.inf
    return batch | {"images": images}


class Spoiled:
    """The batches of a run, those of some steps spoiled."""

    def __init__(self, batches, first, steps, row=None):
        self._batches, self._step, self._steps, self._row = batches, first, steps, row

    def __next__(self):
        self._step += 1
        batch = next(self._batches)
        batch = batch | {"images": batch["images"].astype(np.float32)}
        return spoiled(batch, self._row) if self._step in self._steps else batch

    def close(self):
        self._batches.close()

    def summary(self):
        return ""


@pytest.fixture
def run(monkeypatch):
    """Trains in a folder, with the batches of some steps spoiled."""
    open_data = loop.open_data

    def train(workdir, bad=(), row=None, **config):
        def opened(*args):
            data = open_data(*args)
            made = data.batches_from
            return dataclasses.replace(data, batches_from=lambda first: Spoiled(made(first), first, bad, row))

        monkeypatch.setattr(loop, "open_data", opened)
        return loop.train(tiny_experiment(**AVERAGED, **config), workdir)

    return train


def content(workdir):
    with checkpoint.open_manager(workdir) as manager:
        meta = checkpoint._meta(manager, manager.latest_step())
    return meta["leaves"], meta["skipped_in_a_row"], (workdir / "metrics.jsonl").read_bytes()


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_step_that_is_not_finite_changes_its_number_alone():
    experiment = tiny_experiment(**AVERAGED)
    mesh = make_mesh(experiment.mesh)
    one, two = (dict(batch) for batch in batches_of(experiment, 2))
    for batch in (one, two):
        batch["images"] = batch["images"].astype(np.float32)
    step_once = compiled(experiment, mesh, put_batch(one, mesh), None)
    state, measured = step_once(begun(experiment, mesh), put_batch(one, mesh))
    assert int(measured["skipped"]) == 0
    before = jax.device_get(state)
    for row in (None, 5):
        state, measured = step_once(state, put_batch(spoiled(two, row), mesh))
        assert int(measured["skipped"]) == (-1 if row is None else row + 1)
        assert not math.isfinite(measured["loss"])
    after = jax.device_get(state)
    assert (before.step, after.step) == (1, 3)
    chex.assert_trees_all_equal(dataclasses.replace(after, step=before.step), before, strict=True)
    # The next one goes on as if nothing had been.
    state, measured = step_once(state, put_batch(two, mesh))
    assert int(measured["skipped"]) == 0 and math.isfinite(measured["loss"])
    assert float(measured["lr"]) == pytest.approx(1.5e-3), "of the second update, in a warmup of two"


def test_a_gradient_alone_can_be_bad():
    good, bad = jnp.float32(1), jnp.float32(jnp.inf)
    losses = jnp.ones(4)
    assert [int(skipping.verdict(*pair, losses)) for pair in ((good, good), (good, bad), (bad, good))] == [
        0,
        -1,
        -1,
    ]
    assert int(skipping.verdict(bad, bad, losses.at[2].set(jnp.nan))) == 3
    assert int(skipping.verdict(bad, bad, losses * jnp.nan)) == -1


def test_few_bad_steps_are_left_out_and_counted(run, tmp_path, capsys):
    assert run(tmp_path, bad=(2, 3, 5), row=1)
    assert [row.get("skipped") for row in rows(tmp_path)] == [1.0, 1.0, 1.0]
    out = capsys.readouterr().out
    for step, in_a_row in ((2, 1), (3, 2), (5, 1)):
        (sample,) = {int(batches_of(tiny_experiment(), 1, step - 1)[0]["sample_id"][1])}
        what = f"step {step}, loss is nan (samples {sample}, whose loss is not finite)"
        assert f"{what}; left out, as {in_a_row} in a row\n" in out
    assert "step 2/6  1 left out  loss" in out


def test_a_window_without_any_good_step_has_no_means(run, tmp_path, capsys):
    assert run(tmp_path, bad=(3, 4), row=1)
    assert rows(tmp_path)[1] == {"step": 4, "lr": rows(tmp_path)[1]["lr"], "skipped": 2.0}
    assert "step 4/6  2 left out  " in capsys.readouterr().out


@pytest.mark.parametrize("log_every", [1, 6])
def test_too_many_in_a_row_end_the_run_and_name_what_was_read(log_every, run, tmp_path):
    with pytest.raises(NotFiniteError) as error:
        run(tmp_path, bad=(3, 4, 5, 6), checkpoint_every=2, log_every=log_every)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(
        "Training stopped after 3 steps in a row whose update was left out (max_skipped): "
    )
    for step in (3, 4, 5):
        ids = sorted(batches_of(tiny_experiment(), 1, step - 1)[0]["sample_id"].tolist())
        assert f"step {step}, loss is nan (samples {', '.join(map(str, ids))})" in message
    assert "the newest checkpoint, of step 4, is sound" in message
    assert error.value.status == 4
    # That is of the state after step 2, and says so of the steps since.
    with checkpoint.open_manager(tmp_path) as manager:
        assert checkpoint._meta(manager, 4)["skipped_in_a_row"] == 2


def test_the_count_goes_on_after_a_stop(run, tmp_path):
    """Stopped between bad steps, a run ends where one ends that was not."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    some = {"bad": (4, 5), "checkpoint_every": 1}
    for steps in (r"after 2 steps .* step 4, .* step 5, ", r"after 2 steps .* step 5, "):
        with pytest.raises(NotFiniteError, match=f"{steps}.*newest checkpoint, of step 4, is sound"):
            run(parted, max_skipped=2, **some)
    assert run(parted, **some) and run(whole, **some)
    assert content(parted) == content(whole)
