"""One run at a time in a workdir."""

import errno
import fcntl
import signal
import subprocess
import sys

import pytest

from gaze_jax.errors import UserError
from gaze_jax.train import checkpoint, lock, loop
from tests.helpers.experiments import tiny_experiment

HOLD = """
import sys, time
from pathlib import Path
from gaze_jax.train.lock import only_run
with only_run(Path(sys.argv[1]), print):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_before_it_touches_anything(tmp_path):
    """It would delete what the first is writing, as what a killed run left."""
    being_written = tmp_path / checkpoint.FOLDER / f"3{checkpoint.UNFINISHED}-1"
    being_written.mkdir(parents=True)
    with (
        lock.only_run(tmp_path, print),
        pytest.raises(
            UserError, match=r"is in use by a run \(process \d+ on .*\); wait until it ends, or giv"
        ),
    ):
        loop.train(tiny_experiment(), tmp_path)
    assert being_written.exists() and not (tmp_path / "metrics.jsonl").exists()


def test_a_killed_run_leaves_no_lock(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with (
        pytest.raises(UserError, match=rf"\(process {holder.pid} on "),
        lock.only_run(tmp_path, print),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with lock.only_run(tmp_path, print):
        pass
    with lock.only_run(tmp_path, print):
        pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    told = []
    with lock.only_run(tmp_path, told.append):
        pass
    assert told == [f"{tmp_path} has no locks (No locks available): start no second run in it"]


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"run.lock cannot be written \(.*\); give another --workdir"),
        lock.only_run(tmp_path / "file", print),
    ):
        pass
