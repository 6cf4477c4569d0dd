"""What the workers of a run are reading, noted in files, so that one that hangs or dies names its record."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

_NOTE_BYTES = 40


@contextlib.contextmanager
def busy_with(folder: str, number: int) -> Iterator[None]:
    """Context in which :func:`busy` finds that this process reads record ``number``."""
    path = os.path.join(folder, str(os.getpid()))
    _note(path, f"{number} {time.time():.1f}")
    try:
        yield
    finally:
        _note(path, "")


def _note(path: str, text: str) -> None:
    """Write over the note at ``path``, which keeps its size: emptying a file takes ext4 a millisecond."""
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(file, text.ljust(_NOTE_BYTES).encode(), 0)
    finally:
        os.close(file)


def busy(folder: str) -> list[tuple[int, float]]:
    """(record, seconds since it was begun) of every worker that is reading one, the longest first."""
    found = []
    for path in Path(folder).iterdir():
        words = path.read_text(encoding="ascii").split()
        if len(words) == 2:
            found.append((int(words[0]), time.time() - float(words[1])))
    return sorted(found, key=lambda one: -one[1])
