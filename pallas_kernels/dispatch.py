"""Select an implementation by name: one dict per op, no fallback."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import TypeVar

import jax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.spec import GazeSpec

KERNELS = ("tpu", "gpu")
"""Implementations for one kind of device, named after it; on a mesh they need ``jax.shard_map``."""

_Tree = TypeVar("_Tree")

_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compile_for(platform: str) -> Iterator[None]:
    """Trace for ``platform`` ("tpu", "gpu") on a machine without one: ahead-of-time compilation."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)


def target() -> str:
    """Return the platform being traced for: "cpu", "gpu" or "tpu"."""
    return _TARGET.get() or jax.default_backend()


def needs(platform: str, spec: GazeSpec) -> str | None:
    """None if a kernel for ``platform`` can run or be compiled here, else the reason why not."""
    here = target()
    if spec.interpret or here == platform:
        return None
    return (
        f"it is a kernel for {platform} and JAX runs on {here}; choose 'xla', or set GazeSpec.interpret "
        "to test it."
    )


def interpreter() -> pltpu.InterpretParams:
    """Parameters for interpreting TPU kernels, with every check on, so that no test passes by luck."""
    return pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")


def find(op: str, implementations: Mapping[str, ModuleType], name: str) -> ModuleType:
    """Return the module called ``name``, or raise a ValueError that lists the valid names."""
    if name not in implementations:
        raise ValueError(f"{op} has no implementation {name!r}; choose one of {tuple(implementations)}.")
    return implementations[name]


def pick(op: str, implementations: Mapping[str, ModuleType], name: str, spec: GazeSpec) -> ModuleType:
    """Return the module that implements ``op`` under ``name``.

    Raises:
      ValueError: no implementation has that name.
      NotImplementedError: it exists but cannot do what ``spec`` asks; nothing else is tried.
    """
    module = find(op, implementations, name)
    reason = module.supports(spec)
    if reason is not None:
        raise NotImplementedError(f"{op} implementation {name!r} cannot run here: {reason}")
    return module


def without_gradient(arrays: _Tree, reason: str) -> _Tree:
    """Return ``arrays``, and raise NotImplementedError(``reason``) where one of them is differentiated."""

    @jax.custom_jvp
    def same(arrays: _Tree) -> _Tree:
        return arrays

    @same.defjvp
    def _refuse(primals: tuple[_Tree], tangents: tuple[_Tree]) -> tuple[_Tree, _Tree]:
        raise NotImplementedError(reason)

    return same(arrays)


def check_shape(op: str, name: str, array: object, expected: tuple[int, ...]) -> None:
    """Raise a ValueError if the shape of ``array`` is not ``expected``."""
    shape = getattr(array, "shape", None)
    if shape != expected:
        raise ValueError(f"{op}: {name} has shape {shape}, expected {expected}.")
