"""Events for TensorBoard: every row once, however often a run was stopped."""

import json
import math
import struct
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event

from gaze_jax.errors import UserError
from gaze_jax.train import evaluation, loop, metrics, tensorboard, timing
from tests.helpers.experiments import reused_programs, tiny_experiment
from tests.train.test_loop import during_step, terminate

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("train")]


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    with reused_programs():
        yield


def events(workdir):
    """(tag, step) -> value of all files; every pair may occur once."""
    found = {}
    for path in (workdir / tensorboard.FOLDER).iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):  # length, checksum, event, checksum
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value, event.wall_time
    return found


@pytest.mark.long
def test_a_stopped_run_has_each_row_once(tmp_path, monkeypatch):
    experiment = tiny_experiment(tensorboard=True, eval_every=3, **{"eval.held_out": 8})
    with monkeypatch.context() as patch:
        during_step(patch, 5, terminate)
        assert not loop.train(experiment, tmp_path)
    assert ("train/loss", 4) in events(tmp_path)
    # As if it had been killed after a row that is not saved.
    metrics.append(tmp_path / metrics.FILE, {"step": 6, "loss": 7.0})
    before = events(tmp_path)
    assert loop.train(experiment, tmp_path)
    found = events(tmp_path)
    rows = metrics.read(tmp_path / metrics.FILE)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert sorted(step for tag, step in found if tag == "train/loss") == [2, 4, 6]
    for row in rows:
        for name in set(row) - {"step"}:
            assert math.isclose(found[f"train/{name}", row["step"]][0], row[name], rel_tol=1e-6)
    held = metrics.read(tmp_path / evaluation.FILE)
    assert [row["step"] for row in held] == [0, 3, 6]
    for row in held:
        for way in ("gaze", "dense"):
            value = found[f"held_out_{way}/accuracy", row["step"]][0]
            assert math.isclose(value, row[way]["accuracy"], rel_tol=1e-6)
    rates = {step for tag, step in found if tag == "speed/tokens_per_s"}
    assert rates == {2, 3, 4, 5, 6}
    # Rows of the first process keep their time.
    times = {row["step"]: row["time"] for row in timing.kept_rows(metrics.read(tmp_path / timing.FILE))}
    assert found["train/loss", 4][1] == pytest.approx(times[4], abs=1e-3)
    assert found["train/loss", 4][0] == before["train/loss", 4][0]


def test_no_events_unless_asked_for(tmp_path):
    assert loop.train(tiny_experiment(), tmp_path)
    assert not (tmp_path / tensorboard.FOLDER).exists()


def test_without_the_extra_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; install the extra: pip install 'gaze-jax\[tensor"):
        loop.train(tiny_experiment(tensorboard=True), tmp_path)
    assert not list(tmp_path.iterdir())


def test_rows_are_what_json_says(tmp_path):
    (tmp_path / metrics.FILE).write_text(json.dumps({"step": 2, "loss": 1.5}) + "\n")
    writer = tensorboard.Events(tmp_path)
    writer.timing({"step": 2, "time": 5.0, "step_s": 1.0, "goodput": 0.5})
    writer.close()
    assert {key: value for key, (value, _) in events(tmp_path).items()} == {
        ("train/loss", 2): 1.5,
        ("speed/goodput", 2): 0.5,
    }
