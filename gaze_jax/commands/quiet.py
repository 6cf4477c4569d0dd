"""Keeps libraries from repeating at length what a command says in one sentence."""

import logging
import sys

from absl import logging as absl_logging

from gaze_jax.writing import full_disk


def of_full_disk(error: BaseException) -> bool:
    """Whether an error is that a disk is full, or follows from it."""
    # Pending writes of TensorStore and Orbax find closed what they need, after the first has failed.
    follows = ("Event loop is closed", "cannot schedule new futures after")
    return full_disk(error) is not None or str(error).startswith(follows)


class _Repeated(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        message = record.getMessage()
        return not any(of_full_disk(each) for each in (error, Exception(message)) if each is not None)


_filter: _Repeated | None = None


def leave_out_full_disks() -> None:
    """From now on no log and no thread shows tracebacks of a full disk.

    Of a checkpoint, Orbax logs one for every array and every thread. It also raises the error, with which the
    command ends.
    """
    global _filter
    if _filter is not None:
        return
    _filter, before = _Repeated(), sys.unraisablehook
    absl_logging.get_absl_handler().addFilter(_filter)

    def hook(found: "sys.UnraisableHookArgs") -> None:
        if found.exc_value is None or not of_full_disk(found.exc_value):
            before(found)

    sys.unraisablehook = hook  # TensorStore's callbacks have nobody to raise errors to
