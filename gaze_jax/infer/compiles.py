"""A counter of compiled programs, to check that a hot loop compiles nothing."""

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs, kwargs
    global _count
    _count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)


def compiles() -> int:
    """Programs that this process compiled or loaded from a compilation cache since this module was imported.

    Compare two calls to see whether the code between them compiled anything::

        before = compiles()
        model.generate("What is this?", images=["street.jpg"])
        assert compiles() == before
    """
    return _count
