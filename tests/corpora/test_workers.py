"""Processes that read records: what kills or holds one costs no other record."""

import functools
import multiprocessing
import time

import pytest

from gaze_jax.corpora import workers
from gaze_jax.corpora.workers import Failure, map_records
from gaze_jax.errors import UserError
from tests.helpers import faults


def mapped(function, count, *, processes=2, timeout=60.0, **options):
    found = list(map_records(function, range(count), workers=processes, timeout=timeout, **options))
    assert multiprocessing.active_children() == []
    assert [index for index, _ in found] == list(range(count))
    return [result for _, result in found]


def test_results_are_in_order_though_the_first_is_the_last_to_come():
    counts = []
    # Of many chunks the first takes longest.
    assert mapped(faults.slow_first, 30, advance=counts.append) == [2 * n for n in range(30)]
    assert sum(counts) == 30


def test_no_records():
    assert mapped(faults.double, 0) == []


def test_a_record_that_hangs_is_named_and_the_rest_is_read():
    start = time.monotonic()
    found = mapped(functools.partial(faults.hang_at, (3, 17)), 20, timeout=0.7)
    assert found[3] == found[17] == Failure(True, "took longer than 0.7 seconds")
    assert [found[n] for n in range(20) if n not in (3, 17)] == [2 * n for n in range(20) if n not in (3, 17)]
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("fault", "how"), [(faults.exit_at, "exit status 7"), (faults.die_at, "SIGKILL, as if memory ran out")]
)
def test_a_record_that_ends_its_process_is_named_and_the_rest_is_read(fault, how):
    found = mapped(functools.partial(fault, (0, 4)), 19, processes=1)
    for number, result in enumerate(found):
        if number in (0, 4):
            assert result == Failure(False, f"ended the process that read it ({how})")
        else:
            assert result == 2 * number


def test_a_process_that_dies_once_costs_no_record(tmp_path):
    """Another program may have taken the memory."""
    found = mapped(functools.partial(faults.die_once, str(tmp_path)), 6, processes=1)
    assert (tmp_path / "died").exists()
    assert found == [2 * n for n in range(6)]


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)Record 5 raised.*in raise_at.*a bug at 5"):
        mapped(functools.partial(faults.raise_at, 5), 8)
    assert multiprocessing.active_children() == []


def test_processes_that_cannot_start_are_one_sentence():
    """Without this, every record would be blamed and every process replaced."""
    with pytest.raises(UserError, match=r"could not be started \(exit status 5\); use fewer workers\.$"):
        mapped(functools.partial(faults.hang_at, faults.Unloadable()), 4)


def test_processes_end_when_nobody_takes_the_results():
    results = map_records(faults.double, range(100), workers=2, timeout=60)
    assert next(results) == (0, 0)
    results.close()
    assert multiprocessing.active_children() == []
    assert workers._CHUNK < 100, "or there is nothing left to end"
