"""How one of several processes ends when it, or another, cannot go on: at once, since clean-up would wait.

JAX's own clean-up, and that of a checkpoint that is being written, wait for every process of a run. After one
has died this takes minutes, and ends by an abort.
"""

import contextlib
import os
import sys
import typing

from gaze_jax.errors import AGAIN

_LOST = (
    "Gloo",
    "NCCL",
    "onnection closed",
    "onnection reset",
    "Socket closed",
    "roken pipe",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "oordination service",
    "heartbeat",
)
"""What errors say when another process, or the way to it, is gone; first letters vary."""

_PATIENCE = 3.0
"""Seconds in which processes that fail alike can say so, before one ends and takes the others with it."""

_several = False


def joined() -> None:
    """Note that this process is one of several."""
    global _several
    _several = True


def is_lost(error: BaseException) -> bool:
    """Whether an error means that another process of the run is gone."""
    cause: BaseException | None = error
    while cause is not None and _several:
        if any(word in str(cause) for word in _LOST):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def end(status: int) -> typing.NoReturn:
    """End this process now, without the clean-up that waits for others."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def end_without(peer_error: BaseException) -> typing.NoReturn:
    """End this process because another is gone, with the status that says to start the run again."""
    reason = " ".join(str(peer_error).split())[:200]
    print(
        f"Another process of the run is gone ({reason}); start all of them again to go on from what is "
        "saved.",
        file=sys.stderr,
    )
    end(AGAIN)


def leave(status: int) -> typing.NoReturn:
    """End a command, as ``sys.exit`` does; one of several processes does not wait for the others."""
    if not _several:
        sys.exit(status)
    # Without the first process the others are aborted, perhaps before they have said what went wrong.
    with contextlib.suppress(Exception):
        from jax._src import distributed

        client = distributed.global_state.client
        if client is not None:
            client.wait_at_barrier("gaze_jax/leave", int(1000 * _PATIENCE))
    end(status)
