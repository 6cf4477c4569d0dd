"""A counter of compiled programs, to check that a hot loop compiles nothing."""

import threading
from collections import Counter

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"
_counts: Counter[int] = Counter()


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs, kwargs
    _counts[threading.get_ident()] += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)


def compiles(*, here: bool = False) -> int:
    """Programs that this process compiled or loaded from a compilation cache since this module was imported.

    Compare two calls to see whether the code between them compiled anything::

        before = compiles()
        model.generate("What is this?", images=["street.jpg"])
        assert compiles() == before

    Args:
      here: count those of the calling thread alone.
    """
    return _counts[threading.get_ident()] if here else sum(_counts.values())
