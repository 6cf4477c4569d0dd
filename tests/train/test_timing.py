"""Speeds, shares of the time and goodput, by a clock that the test sets."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from gaze_jax.parallel import rules
from gaze_jax.parallel.costs import count_flops
from gaze_jax.parallel.mesh import make_mesh
from gaze_jax.parallel.topology import CHIPS, peak_flops
from gaze_jax.train import timing
from gaze_jax.train.losses import next_token_loss
from gaze_jax.train.step import abstract_state, put_batch
from gaze_jax.train.utilisation import model_flops, peak_of
from tests.helpers.experiments import batches_of, tiny_experiment

ROW = {"loss": 1.0, "lr": 0.5, "accuracy": 0.25, "top_k": 2.0, "visual_entries": 8.0}


class Clock:
    """Both clocks of the module."""

    def __init__(self, monkeypatch, now=100.0):
        self.now = now
        monkeypatch.setattr(timing.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(timing.time, "time", lambda: 1000.0 + self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def batch(tokens, samples=1):
    """Two rows of 20 text tokens and 10 slots, ``tokens`` of them of ``samples`` samples in the first row."""
    at = np.arange(40).reshape(2, 20)
    segment = np.where(at < 20, at % samples, 0)
    return {
        "text_segment": np.where(at < tokens, segment, -1),
        "visual_src": np.full((2, 2, 5), -1),
    }


def batches(clock, *made):
    for one in made:
        clock.now += 1.5
        yield one


def test_the_progress_line_says_how_long_it_will_take(clock):
    stopwatch = timing.Stopwatch(None, 10, 3610, processes=4, peak=1e12)
    taken = batches(clock, batch(30), batch(10))
    stopwatch.take(taken), stopwatch.take(taken)
    with stopwatch.part("compile"):
        clock.now += 50.0
    clock.now += 17.0
    for _ in range(100):
        stopwatch.count(3e10)
    stopwatch.row(110)
    line = stopwatch.line(110, ROW, 16)
    assert "step  110/3610" in line
    assert "5.00 steps/s" in line
    assert "ETA 11:40" in line  # 3500 steps at 5 a second
    assert "top_k 2.0 of 16" in line
    assert "visual entries 8.0" in line
    # Of each of 4 processes, in 20 s: 40 tokens of 120, in the rows of 3 samples. 17 s of the 70 are steps.
    assert "  0.6 samples/s  8 tokens/s  MFU 15.0%  padding 67%  waiting for data 15%  goodput 24%  " in line
    clock.now += 20.0
    stopwatch.row(210)
    line = stopwatch.line(210, ROW, 16)
    assert "0 tokens/s  MFU 0.0%  padding 100%  waiting for data 0%  goodput 41%" in line
    assert "MFU" not in timing.Stopwatch(None, 210, 3610)._speeds({"steps": 1.0, "flops": 1.0} | SUMS)


SUMS = {"step_s": 1.0, "wait_s": 0.0, "save_s": 0.0, "samples": 1.0, "tokens": 1.0, "slots": 1.0}


def test_rows_split_the_time_and_a_batch_that_comes_while_devices_compute_costs_none(clock, tmp_path):
    path = tmp_path / timing.FILE
    stopwatch = timing.Stopwatch(path, 0, 10)
    with stopwatch.part("start"):
        clock.now += 3.0
    stopwatch.take(batches(clock, batch(20, 4)), lambda: True)
    clock.now += 2.5
    with stopwatch.part("evaluate"):
        clock.now += 7.0
    stopwatch.take(batches(clock, batch(20, 1)), lambda: False)
    found = stopwatch.row(2)
    assert found == json.loads(path.read_text().splitlines()[-1])
    parts = {name: found[f"{name}_s"] for name in ("step", *timing.PARTS)}
    assert parts == {"step": 4.0, "start": 3.0, "compile": 0.0, "wait": 1.5, "save": 0.0, "evaluate": 7.0}
    assert found["samples_per_s"] == 5 / 5.5 and found["tokens_per_s"] == 40 / 5.5
    assert found["waiting"] == 1.5 / 5.5 and found["goodput"] == 4.0 / 15.5
    with stopwatch.part("save"):
        clock.now += 1.0
    rest = stopwatch.row(2)
    assert rest["save_s"] == 1.0 and "steps_per_s" not in rest


def test_goodput_forgets_steps_that_were_repeated_and_counts_the_time_between_processes(clock, tmp_path):
    path = tmp_path / timing.FILE
    first = timing.Stopwatch(path, 0, 100, began=1090.0)
    for step in (10, 20, 30):
        clock.now += 10.0
        first.row(step)
    with path.open("a") as file:
        file.write('{"step": 40, "st')  # killed while it wrote
    clock.now += 20.0
    second = timing.Stopwatch(path, 20, 100)
    clock.now += 10.0
    # 20 s of the first process and 10 s of the second, 70 s after the first one began.
    assert second.row(30)["goodput"] == pytest.approx(30 / 70)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.get("start", row.get("step")) for row in rows] == [0, 10, 20, 30, 20, 30]
    assert timing.kept_rows(rows) == [rows[1], rows[2], rows[5]]
    assert timing.Stopwatch(path, 30, 100)._kept == 30.0


def test_the_peak_is_that_of_known_chips_alone():
    assert peak_flops("TPU v5 lite") == CHIPS["v5e"].flops_per_second == 197e12
    assert peak_flops("TPU v5") == 459e12 and peak_flops("TPU v6 lite") == 918e12
    assert peak_flops("NVIDIA H200") == 989.5e12
    assert peak_flops("cpu") is None
    assert peak_of(make_mesh(tiny_experiment().mesh)) is None


@pytest.mark.standard_promotion
def test_model_flops_are_those_of_forward_and_backward_and_rematerialisation_adds_none():
    experiment = tiny_experiment(**{"optimizer.name": "adamw"})
    mesh = make_mesh(experiment.mesh)
    shapes = put_batch(batches_of(experiment)[0], mesh)
    found = model_flops(experiment, mesh, shapes)
    params = abstract_state(experiment, mesh).params
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.flax_rules()):
        forward = jax.jit(lambda p, b: next_token_loss(p, b, 1.0, experiment.model)[0])
        once = count_flops(forward.trace(params, shapes).jaxpr).total
    # The backward pass has two products for each of the forward pass, but for the pixels' gradient.
    assert 2.8 * once < found < 3.1 * once
    assert model_flops(tiny_experiment(**{"model.remat": True}), mesh, shapes) == found
    parts = tiny_experiment(batch_size=16, accumulate=2)
    assert model_flops(parts, mesh, put_batch(batches_of(parts)[0], mesh)) == 2 * found
