"""``quick_jit``: jit for tests, which spend their time compiling and not running."""

import functools
from typing import Any

import jax

# Measured on the gradient of the dummy model, one core: 2.3 s instead of 13.3 s to compile.
_QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def quick_jit(function: Any = None, **options: Any) -> Any:
    """``jax.jit`` that compiles several times faster on CPU, to slower programs of the same meaning."""
    if function is None:
        return functools.partial(quick_jit, **options)
    if jax.default_backend() == "cpu":
        options.setdefault("compiler_options", _QUICK)
    return jax.jit(function, **options)
