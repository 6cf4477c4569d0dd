"""Functions for other processes, of an index: quick, or fatal at some. This module imports nothing large."""

import os
import signal
import time


def double(index):
    return 2 * index


def slow_first(index):
    time.sleep(0.5 if index == 0 else 0)
    return 2 * index


def hang_at(where, index):
    if index in where:
        time.sleep(600)
    return 2 * index


def exit_at(where, index):
    if index in where:
        os._exit(7)
    return 2 * index


def die_at(where, index):
    if index in where:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * index


def die_once(folder, index):
    """Kills the first process that gets index 3, none after it."""
    if index == 3 and not os.path.exists(f"{folder}/died"):
        open(f"{folder}/died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * index


def raise_at(where, index):
    if index == where:
        raise KeyError(f"a bug at {index}")
    return 2 * index


class Unloadable:
    """Pickles, but ends the process that loads it."""

    def __reduce__(self):
        return os._exit, (5,)
