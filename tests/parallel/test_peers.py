"""Processes of one run that end: by a signal to one of them, or because one is killed."""

import json
import os
import signal
import time

import jax
import pytest

from gaze_jax.errors import AGAIN
from gaze_jax.parallel import peers
from gaze_jax.train import checkpoint, stopping
from tests.helpers.commands import start
from tests.parallel.test_distributed import free_port

ABORTED = -signal.SIGABRT
"""How JAX itself ends a process whose peer is lost, if no error reaches Python first."""


class Ended(BaseException):
    """In place of the end of this process."""


@pytest.fixture
def several(monkeypatch):
    """This process as if it were one of several; notes the status with which it would end."""
    found = []

    def end(status):
        found.append(status)
        raise Ended

    monkeypatch.setattr(peers, "_several", True)
    monkeypatch.setattr(peers, "end", end)
    return found


@pytest.mark.parametrize(
    "text",
    [
        "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error "
        "[127.0.0.1]:54417: Connection reset by peer",
        "INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or there was a network error",
        "DEADLINE_EXCEEDED: Barrier timed out.",
        "UNAVAILABLE: Task 1 heartbeat timeout.",
    ],
)
def test_a_lost_process_ends_the_others_with_the_status_that_asks_for_a_start(text, several, capsys):
    with pytest.raises(Ended), stopping.without_lost_peers():
        raise ValueError("saving failed") from RuntimeError(text)
    assert several == [AGAIN]
    message = capsys.readouterr().err
    assert message.startswith("Another process of the run is gone (saving failed); start all of them again")
    assert message.count("\n") == 1


def test_other_errors_pass_and_one_process_has_no_peers(several, monkeypatch):
    with pytest.raises(ValueError, match="a bug"), stopping.without_lost_peers():
        raise ValueError("a bug")
    monkeypatch.setattr(peers, "_several", False)
    with pytest.raises(ValueError, match="Gloo"), stopping.without_lost_peers():
        raise ValueError("Gloo")
    assert not several


def test_one_of_several_leaves_without_waiting(several, monkeypatch):
    with pytest.raises(Ended):
        peers.leave(2)
    assert several == [2]
    monkeypatch.setattr(peers, "_several", False)
    with pytest.raises(SystemExit) as error:
        peers.leave(3)
    assert error.value.code == 3 and several == [2]


def test_of_several_processes_jax_has_the_signal(monkeypatch):
    """A handler of Python would take it from the service by which they agree on a step."""
    calls = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    agree = stopping.multihost_utils
    monkeypatch.setattr(agree, "reached_preemption_sync_point", lambda step: calls.append(step) or step == 4)
    before = signal.getsignal(signal.SIGTERM)
    with stopping.sigterm() as must_stop:
        assert signal.getsignal(signal.SIGTERM) == before
        assert [must_stop(step) for step in (3, 4)] == [False, True]
    assert calls == [3, 4]


# -- Real processes ----------------------------------------------------------------------------------------


def rows(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Starts two processes of one run, with one device each and a cache of compiled programs."""
    cache = str(tmp_path_factory.mktemp("cache"))
    begun = []

    def start_two(workdir, **config):
        config = {"mesh.fsdp": 1, "log_every": 1, "checkpoint_every": 5, "keep_checkpoints": 100} | config
        flags = [f"--config.{name}={value}" for name, value in config.items()]
        flags += [f"--coordinator=localhost:{free_port()}", "--num_processes=2", "--heartbeat_seconds=10"]
        processes = [
            start(
                *("-m", "gaze_jax", "train", "--config=tests/helpers/tiny_config.py", f"--workdir={workdir}"),
                *flags,
                f"--process_id={number}",
                JAX_COMPILATION_CACHE_DIR=cache,
                JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
                XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0",
            )
            for number in range(2)
        ]
        begun.extend(processes)
        return processes

    yield start_two
    for process in begun:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_for_step(workdir, step, processes):
    while not rows(workdir) or rows(workdir)[-1]["step"] < step:
        ended = [process.communicate() for process in processes if process.poll() is not None]
        assert not ended, ended
        time.sleep(0.02)


def ends(processes):
    """Statuses and what was printed; each process ends soon."""
    out = [process.communicate(timeout=60) for process in processes]
    return [process.returncode for process in processes], ["".join(each) for each in out]


STEPS = 24


def content(workdir):
    with checkpoint.open_manager(workdir) as manager:
        step = manager.latest_step()
        leaves = checkpoint._meta(manager, step)["leaves"]
    return step, leaves, rows(workdir)


@pytest.fixture(scope="module")
def whole(launch, tmp_path_factory):
    """What a run of two processes has come to that nobody stopped."""
    workdir = tmp_path_factory.mktemp("whole")
    statuses, out = ends(launch(workdir, steps=STEPS))
    assert statuses == [0, 0], out
    return content(workdir)


@pytest.mark.long
@pytest.mark.standard_promotion
class TestTwoProcesses:
    @pytest.mark.parametrize("asked", [0, 1])
    def test_sigterm_to_one_stops_both_at_one_step_and_saves(self, asked, whole, launch, tmp_path):
        processes = launch(tmp_path, steps=STEPS)
        wait_for_step(tmp_path, 7, processes)
        processes[asked].terminate()
        statuses, out = ends(processes)
        assert statuses == [AGAIN, AGAIN], out
        assert "Stopped by SIGTERM after step" in out[0]
        with checkpoint.open_manager(tmp_path) as manager:
            assert manager.latest_step() >= 7
        statuses, out = ends(launch(tmp_path, steps=STEPS))
        assert statuses == [0, 0], out
        assert content(tmp_path) == whole

    @pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
    @pytest.mark.parametrize("victim", [0, 1])
    def test_a_lost_process_ends_the_other_within_the_heartbeat(self, victim, how, whole, launch, tmp_path):
        """Killed, as by its machine; or silent, as without a network, which only the heartbeat shows."""
        processes = launch(tmp_path, steps=STEPS)
        wait_for_step(tmp_path, 7, processes)
        processes[victim].send_signal(signal.Signals[how])
        lost = time.monotonic()
        survivor = processes[1 - victim]
        out = "".join(survivor.communicate(timeout=60))
        assert time.monotonic() - lost < 10 + 15, "the heartbeat, and what it takes to notice"
        assert survivor.returncode in (AGAIN, ABORTED), out
        if how == "SIGKILL" and victim == 1:
            assert survivor.returncode == AGAIN and "Another process of the run is gone" in out
        processes[victim].kill()
        processes[victim].communicate()
        with checkpoint.open_manager(tmp_path) as manager:
            assert manager.latest_step() >= 5
        statuses, out = ends(launch(tmp_path, steps=STEPS))
        assert statuses == [0, 0], out
        assert content(tmp_path) == whole

    def test_a_second_run_in_the_same_workdir_is_refused_by_all_of_its_processes(self, launch, tmp_path):
        """The first goes on: nothing that it was writing is deleted."""
        first = launch(tmp_path, steps=STEPS)
        wait_for_step(tmp_path, 3, first)
        statuses, out = ends(launch(tmp_path, steps=STEPS))
        assert statuses == [2, 2], out
        assert all("is in use by a run (process" in each for each in out)
        statuses, out = ends(first)
        assert statuses == [0, 0], out
