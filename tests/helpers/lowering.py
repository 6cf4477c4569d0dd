"""JAX lowers programs in one MLIR context after the other, not in a new one for each, which takes 6 ms."""

import functools

_contexts = None


def reuse_contexts():
    """Keeps JAX's MLIR context until :func:`drop_context`.

    The function is private to jax: where it has moved, nothing changes.
    """
    global _contexts
    from jax._src.interpreters import mlir

    make = getattr(mlir, "make_ir_context", None)
    if _contexts is None and make is not None:
        mlir.make_ir_context = _contexts = functools.lru_cache(maxsize=1)(make)


def drop_context():
    """The next program gets a new one: a context keeps the constants and types of all its programs."""
    if _contexts is not None:
        _contexts.cache_clear()
