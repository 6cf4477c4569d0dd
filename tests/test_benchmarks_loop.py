"""The benchmark of the training loop: a dry run, and the memory that saving and restoring may take."""

import json

import pytest

from benchmarks import train_loop

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("benchmarks")]


@pytest.mark.long
def test_the_loop_is_compared_with_the_bare_step(tmp_path):
    """By two clocks, in rounds; the run behind a ratio has its checkpoints and rows."""
    path = tmp_path / "result.json"
    train_loop.main(["--quick", "--only=overhead", f"--json={path}"])
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == ["overhead, by the clock", "overhead, by the processor's time"]
    for row in rows:
        assert len(row["ratios"]) == 2 and min(row["ratios"]) > -1
        assert row["met"] == (row["value"] <= train_loop.OVERHEAD == row["target"])
        assert row["bare_step_seconds"] > 0 and row["steps"] == 4 and row["checkpoint_every"] == 2


@pytest.mark.long  # two processes that make a state of 200 MB
def test_saving_and_restoring_200_mb_stay_below_the_stated_memory(tmp_path):
    path = tmp_path / "result.json"
    train_loop.main(["--only=memory", "--megabytes=200", f"--json={path}"])
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == ["memory, save", "memory, restore"]
    for row, bound in zip(rows, (train_loop.SAVING, train_loop.RESTORING), strict=True):
        assert 180e6 < row["state_bytes"] < 230e6
        assert 0.3 < row["value"] <= bound == row["target"] and row["met"]
    # What is restored is in memory afterwards.
    assert rows[1]["value"] >= 1


def test_the_peak_is_that_of_the_work_alone():
    def work():
        big = bytearray(100_000_000)
        big[::4096] = b"x" * len(big[::4096])

    work()
    found = train_loop.peak(lambda: None)
    assert found["peak"] - found["before"] < 20e6
    found = train_loop.peak(work)
    assert 90e6 < found["peak"] - found["before"] < 130e6
