"""One run at a time in a workdir: a second would delete what the first is writing, and mix their metrics."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from gaze_jax.errors import UserError
from gaze_jax.parallel import together

FILE = "run.lock"


@contextlib.contextmanager
def only_run(workdir: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Context in which no other run can begin in ``workdir``.

    The system ends the lock with the process that has it, however that ends. Of several processes the first
    has it.

    Args:
      workdir: gets a file with the process and its machine.
      tell: gets a line where the file system has no locks.

    Raises:
      UserError: another run has the workdir, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with together.agreed():
            if together.is_first():
                _lock(stack.enter_context(_opened(workdir / FILE)), workdir, tell)
        yield


def _opened(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another --workdir.") from error


def _lock(file: TextIO, workdir: Path, tell: Callable[[str], None]) -> None:
    """Lock a file until it is closed, and write into it who has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(
            f"{workdir} is in use by a run ({holder}); wait until it ends, or give another --workdir."
        ) from error
    except OSError as error:
        tell(f"{workdir} has no locks ({error.strerror}): start no second run in it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
