"""A trace of some steps, on request."""

import gzip
import json

import pytest

from gaze_jax.errors import UserError
from gaze_jax.train import loop, profiling
from gaze_jax.train.config import profiled
from tests.helpers.experiments import reused_programs, tiny_experiment
from tests.train.test_loop import during_step, spoil, terminate

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("train")]


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    with reused_programs():
        yield


def traces(workdir):
    """The traces of a run: names of what ran, one set for each."""
    found = []
    for path in sorted((workdir / profiling.FOLDER).rglob("*.trace.json.gz")):
        assert list(path.parent.glob("*.xplane.pb"))
        with gzip.open(path) as file:
            found.append({event.get("name") for event in json.load(file)["traceEvents"]})
    return found


def test_the_steps_that_are_asked_for_are_traced(tmp_path, monkeypatch, capsys):
    begun, traced = [], []
    start, stop = profiling.jax.profiler.start_trace, profiling.jax.profiler.stop_trace
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda *a: (begun.append(1), start(*a)))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: (begun.pop(), stop()))
    compile_step = loop.compile_step

    def counting(*args):
        step_once = compile_step(*args)

        def counted(state, batch):
            traced.append(len(begun))
            return step_once(state, batch)

        return counted

    monkeypatch.setattr(loop, "compile_step", counting)
    assert loop.train(tiny_experiment(profile_steps="3:4"), tmp_path)
    assert traced == [0, 0, 1, 1, 0, 0]
    (names,) = traces(tmp_path)
    assert any("jit_step" in str(name) for name in names)
    assert f"steps 3:4 are traced: {tmp_path / 'profile'}\n" in capsys.readouterr().out


@pytest.mark.parametrize("act", [pytest.param(terminate, marks=pytest.mark.long), spoil])
def test_a_run_that_ends_within_them_keeps_its_trace(act, tmp_path, monkeypatch):
    experiment = tiny_experiment(profile_steps="2:5")
    during_step(monkeypatch, 3, act)
    if act is spoil:
        with pytest.raises(UserError, match="Training stopped at step 3"):
            loop.train(experiment, tmp_path)
    else:
        assert not loop.train(experiment, tmp_path)
    assert len(traces(tmp_path)) == 1


@pytest.mark.parametrize("steps", ["0:3", "4:3", "3", "a:b", "3:7", "3:4:5", "-1:2"])
def test_steps_outside_of_the_run_are_refused(steps):
    with pytest.raises(UserError, match=rf"profile_steps='{steps}' must (be the first|end at steps=6)"):
        tiny_experiment(profile_steps=steps)


def test_a_range_is_its_first_and_last_step():
    assert profiled("2:5") == (2, 5) and profiled("3:3") == (3, 3) and profiled("") is None
