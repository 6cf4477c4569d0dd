"""Processes that read records, any of which may die or hang without losing more than one record.

A pool of the standard library cannot tell which record killed a process, and waits forever for one that
hangs. Here every process has a pipe of its own and sends a result per record, so it is known at any time
which record it is at.
"""

import collections
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from gaze_jax.errors import UserError

_CHUNK = 4
"""Records that a process is given at a time."""
_START = 300.0
"""Seconds that a process may take to start: it imports JAX, perhaps from a slow disk."""
_TRIES = 2
"""Processes that may die of a record before it is blamed: memory may be short because of another program."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """In place of a record's result.

    Attributes:
      hung: the time limit was over; otherwise the process died, twice.
      message: the predicate of a sentence about the record, such as "took longer than 600 seconds".
    """

    hung: bool
    message: str


@dataclasses.dataclass(frozen=True)
class _Raised:
    """An exception of the function, as text: not every exception can be sent."""

    text: str


@dataclasses.dataclass
class _Worker:
    """A process; ``todo`` are the records it has sent no result of, ``since`` when it last sent one."""

    process: multiprocessing.process.BaseProcess
    pipe: multiprocessing.connection.Connection
    todo: collections.deque[int]
    since: float
    started: bool = False

    def stop(self) -> None:
        """End the process, whatever it is at."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def map_records(
    function: Callable[[int], Any],
    indexes: Sequence[int],
    *,
    workers: int,
    timeout: float,
    advance: Callable[[int], None] = lambda records: None,
) -> Generator[tuple[int, Any]]:
    """Call a function with each index, in processes of its own.

    Args:
      function: takes an index; it and its results can be pickled.
      indexes: distinct.
      workers: number of processes, at least 1.
      timeout: seconds that a record may take; its process is then killed and replaced.
      advance: called with the number of records that newly have a result, in whatever order.

    Yields:
      Each index with what the function returned, or with a :class:`Failure`, in the order of ``indexes``.

    Raises:
      UserError: processes cannot be started.
      RuntimeError: the function raised an exception, whose traceback it contains.
    """
    left = collections.deque(indexes)
    deaths: collections.Counter[int] = collections.Counter()
    done: dict[int, Any] = {}
    pool: list[_Worker] = []
    try:
        for index in indexes:
            while index not in done:
                while left and len(pool) < workers:
                    pool.append(_start(function, left))
                before = len(done)
                _serve_once(pool, left, done, deaths, timeout)
                advance(len(done) - before)
            yield index, done.pop(index)
    finally:
        for worker in pool:
            worker.stop()


def _start(function: Callable[[int], Any], left: collections.deque[int]) -> _Worker:
    # Not a fork: the parent may have threads.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, function), daemon=True)
    process.start()
    theirs.close()  # or the end of the process would not end the pipe
    worker = _Worker(process, ours, collections.deque(), time.monotonic())
    _give(worker, left)
    return worker


def _give(worker: _Worker, left: collections.deque[int]) -> None:
    """Give a process its next records."""
    worker.todo.extend(left.popleft() for _ in range(min(_CHUNK, len(left))))
    with contextlib.suppress(OSError):  # it is dead, which the next receipt notices
        worker.pipe.send(list(worker.todo))


def _serve_once(
    pool: list[_Worker],
    left: collections.deque[int],
    done: dict[int, Any],
    deaths: collections.Counter[int],
    timeout: float,
) -> None:
    """Wait until a process has a result, is dead or is late; replaces what is dead or late."""
    ends = [worker.since + (timeout if worker.started else _START) for worker in pool]
    pipes = [worker.pipe for worker in pool]
    ready = multiprocessing.connection.wait(pipes, max(0.0, min(ends) - time.monotonic()))
    for worker, end in zip(list(pool), ends):
        try:
            if worker.pipe in ready:
                _receive(worker, left, done)
                if not worker.todo:
                    worker.stop()
                    pool.remove(worker)
                continue
        except (EOFError, OSError):
            worker.process.join()
            failure = Failure(False, f"ended the process that read it ({_how(worker.process)})")
        else:
            if time.monotonic() < end:
                continue
            failure = Failure(True, f"took longer than {timeout:g} seconds")
        worker.stop()
        pool.remove(worker)
        if not worker.started:
            raise UserError(
                f"A process for reading records could not be started ({_how(worker.process)}); "
                "use fewer workers."
            )
        culprit = worker.todo.popleft()
        deaths[culprit] += 1
        left.extendleft(reversed(worker.todo))
        if failure.hung or deaths[culprit] == _TRIES:
            done[culprit] = failure
        else:
            left.appendleft(culprit)


def _receive(worker: _Worker, left: collections.deque[int], done: dict[int, Any]) -> None:
    """Take one message of a process, and give it more records if it has none."""
    message = worker.pipe.recv()
    worker.since = time.monotonic()
    if not worker.started:
        worker.started = True
        return
    if isinstance(message, _Raised):
        raise RuntimeError(f"Record {worker.todo[0]} raised, in another process:\n{message.text}")
    done[worker.todo.popleft()] = message
    if not worker.todo and left:
        _give(worker, left)


def _how(process: multiprocessing.process.BaseProcess) -> str:
    """How a process ended."""
    code = process.exitcode or 0
    if code >= 0:
        return f"exit status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"{name}, as if memory ran out" if name == "SIGKILL" else name


def _work(pipe: multiprocessing.connection.Connection, function: Callable[[int], Any]) -> None:
    """What a process does, until its parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    pipe.send(None)
    with contextlib.suppress(EOFError, OSError):
        for index in _received(pipe):
            try:
                result = function(index)
            except Exception:
                result = _Raised(traceback.format_exc())
            pipe.send(result)


def _received(pipe: multiprocessing.connection.Connection) -> Iterator[int]:
    while True:
        yield from pipe.recv()
