"""Picking an implementation by name: one dict per op, no fallback."""

from collections.abc import Mapping
from types import ModuleType

from pallas_kernels.spec import GazeSpec


def find(op: str, implementations: Mapping[str, ModuleType], name: str) -> ModuleType:
    """Return the module called ``name``, or raise a ValueError that lists the names there are."""
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


def check_shape(op: str, name: str, array: object, expected: tuple[int, ...]) -> None:
    """Raise one sentence if ``array`` has not the ``expected`` shape."""
    shape = getattr(array, "shape", None)
    if shape != expected:
        raise ValueError(f"{op}: {name} has shape {shape}, expected {expected}.")
