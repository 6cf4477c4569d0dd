"""How many programs were compiled, so that a hot loop can be shown to compile none."""

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs, kwargs
    global _count
    _count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)


def compiles() -> int:
    """Programs that this process compiled, or took from a compilation cache, since this module was imported.

    The difference of two calls says whether what ran between them was new to XLA::

        before = compiles()
        model.generate("What is this?", images=["street.jpg"])
        assert compiles() == before
    """
    return _count
