"""What the processes of one command tell each other, beside arrays.

Each runs the same program on the same arguments. What only one of them can know, such as whether a file can
be read there, is exchanged before anything depends on it: processes that go different ways wait for ever.
"""

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from gaze_jax.errors import UserError

_PATIENCE = 24 * 3600 * 1000
"""Milliseconds to wait for what another process says; the heartbeat finds those that are gone."""

_calls = itertools.count()


def _joined() -> Any:
    """JAX's state of a process that has joined others; None if it is alone."""
    if "jax" not in sys.modules:
        return None
    from jax._src import distributed

    state = distributed.global_state
    return state if state.client is not None and state.num_processes > 1 else None


def several() -> bool:
    """Whether this process has joined others."""
    return _joined() is not None


def is_first() -> bool:
    """Whether this process prints and writes: the first of several, or the only one."""
    state = _joined()
    return state is None or state.process_id == 0


def exchanged(text: str) -> list[str]:
    """The texts of all processes, in their order; every process calls it as often as every other."""
    state = _joined()
    return [text] if state is None else _exchanged(state, text, range(state.num_processes))


def _exchanged(state: Any, text: str, wanted: range) -> list[str]:
    place = f"gaze_jax/together/{next(_calls)}"
    if state.process_id in wanted:  # what nobody asks for would stay in the store of the first process
        state.client.key_value_set(f"{place}/{state.process_id}", text)
    get = state.client.blocking_key_value_get
    return [text if n == state.process_id else get(f"{place}/{n}", _PATIENCE) for n in wanted]


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Context that all processes leave in the same way: what one cannot do ends all of them.

    Raises:
      UserError: one of the processes raised an error; with its message and its status.
    """
    state = _joined()
    if state is None:
        yield
        return
    with _told(state, range(state.num_processes)):
        yield


def by_first(do: Callable[[], object]) -> None:
    """Let the first process do something, and the others wait until it is done.

    Raises:
      UserError: the first process raised an error.
    """
    state = _joined()
    if state is None:
        do()
        return
    with _told(state, range(1)):
        if state.process_id == 0:
            do()


@contextlib.contextmanager
def _told(state: Any, wanted: range) -> Iterator[None]:
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    report = (
        "" if mine is None else json.dumps([getattr(mine, "status", 1), str(mine) or type(mine).__name__])
    )
    found = [text for text in _exchanged(state, report, wanted) if text]
    if mine is not None:
        raise mine
    if found:
        status, message = json.loads(found[0])
        theirs = UserError(message)
        theirs.status = status
        raise theirs
