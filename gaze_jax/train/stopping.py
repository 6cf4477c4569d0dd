"""What ends a run before its last step: a signal, a full disk, a device without memory, a lost process."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from gaze_jax.errors import UserError, first_line
from gaze_jax.parallel import peers
from gaze_jax.writing import full_disk

MustStop = Callable[[int], bool]
"""Whether the run must stop after a step; all processes ask after every step, and get the same answer."""


@contextlib.contextmanager
def sigterm() -> Iterator[MustStop]:
    """Context in which SIGTERM asks a run to save and to stop, instead of ending the process.

    Several processes agree on a step by JAX's preemption service, whichever of them got the signal. It has
    a handler of its own since they found each other, which one of Python would replace. A handler can be
    set by the main thread only; in another thread SIGTERM does what it did before.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def without_lost_peers() -> Iterator[None]:
    """Context in which the loss of another process ends this one at once.

    It belongs inside what would wait for the other one when it is closed.
    """
    try:
        yield
    except Exception as error:
        if peers.is_lost(error):
            peers.end_without(error)
        raise


@contextlib.contextmanager
def named(workdir: Path) -> Iterator[None]:
    """Say whether a disk is full, or a device; Orbax raises its errors with the next save, or at the end."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if reason := full_disk(error):
            raise UserError(
                f"{workdir} cannot be written ({reason}); free space and run the same command to go on from "
                "its newest checkpoint."
            ) from error
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(
                f"A device has too little memory ({first_line(error)}); use fewer or smaller rows "
                "(batch_size, data.row, data.max_frames), set model.remat=True or accumulate, or "
                "use more devices."
            ) from error
        raise
