"""Interpreted kernels reach Python on a shorter way, in a third of the time."""

import functools

import numpy as np

INTERPRETERS = "jax._src.pallas."


def shorten_callbacks():
    """Gives the callbacks of Pallas' interpreters arrays of numpy instead of JAX.

    JAX copies each argument to a device, and the interpreter copies most of them, single numbers, back at
    once: thousands in a kernel of a few chunks. Values, checks and races stay the same. The function is
    private to jax: where it has moved, nothing changes.
    """
    from jax._src import callback as module

    original = getattr(module, "io_callback_impl", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def direct(*arguments, callback, **options):
        function = getattr(callback, "callback_func", None)
        while isinstance(function, functools.partial):
            function = function.func
        if not str(getattr(function, "__module__", None)).startswith(INTERPRETERS):
            return original(*arguments, callback=callback, **options)
        # Copies: the interpreter keeps some, and what XLA passes ends with the call.
        copied = [np.array(argument) for argument in arguments]
        return original(callback=lambda: callback(*copied), **options)

    module.io_callback_impl = direct
