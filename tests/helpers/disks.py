"""Writes that really fail."""

import contextlib
import resource


@contextlib.contextmanager
def full_after(size):
    """Context in which no file of this process can grow beyond ``size`` bytes: "File too large".

    Python ignores the signal that comes with it. A full disk fails at the same calls with another number.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
