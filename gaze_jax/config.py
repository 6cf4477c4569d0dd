"""Convert nested dictionaries to frozen dataclasses and back; unknown keys are rejected."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from gaze_jax.stored import renamed_setting

T = TypeVar("T")


def _describe_type(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint)


def _check_value(hint: Any, value: Any, path: str) -> Any:
    """Return ``value`` converted to the type ``hint``, or raise a TypeError that names ``path``."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in typing.get_args(hint):
            return None
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return _check_value(kinds[0] if len(kinds) == 1 else _chosen(kinds, value, path), value, path)
    if origin is tuple:
        if isinstance(value, list | tuple):
            inner = typing.get_args(hint)
            kinds = [inner[0]] * len(value) if inner[-1:] == (Ellipsis,) else list(inner)
            if len(kinds) == len(value):
                return tuple(
                    _check_value(h, v, f"{path}[{i}]")
                    for i, (h, v) in enumerate(zip(kinds, value, strict=True))
                )
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    raise TypeError(f"Config field {path}={value!r} must be of type {_describe_type(hint)}.")


def _chosen(kinds: list[Any], value: Any, path: str) -> Any:
    """Which of several dataclasses a section is of: the first that has its keys and whose needs they fill.

    If none is, the one that knows the most of them, so that the message names what is wrong with it.
    """
    given = set(dict(value.items())) if hasattr(value, "items") else set()
    fields = {kind: dataclasses.fields(kind) for kind in kinds}
    for kind, known in fields.items():
        if given <= {field.name for field in known} and given >= {f.name for f in known if _is_required(f)}:
            return kind
    return max(kinds, key=lambda kind: len(given & {field.name for field in fields[kind]}))


def _is_required(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Build dataclass ``cls`` from a nested mapping (such as a ``ConfigDict``).

    Args:
      cls: a dataclass whose fields are numbers, strings, bools, tuples, optionals or dataclasses. Of a field
        that may be one of several dataclasses, the keys decide which it is.
      values: one entry per field; fields with defaults may be left out.
      path: prefix for names in error messages.

    Raises:
      KeyError: an unknown or missing field, named by its full path, or a name or value that was renamed.
      TypeError: a value's type is not the one declared by its field.
    """
    # A ConfigDict behaves like a mapping but is not registered as one.
    if not hasattr(values, "items"):
        raise TypeError(f"Config section {path or cls.__name__}={values!r} must be a mapping.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    prefix = f"{path}." if path else ""
    given = dict(values.items())
    for name, value in given.items():
        if now := renamed_setting(prefix + name, value):
            raise KeyError(f"Config key {prefix}{name}={value!r} was renamed; write {now}.")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(fields)}."
            raise KeyError(f"Unknown config key {prefix}{name}; {hint}")
    for name, field in fields.items():
        if _is_required(field) and name not in given:
            raise KeyError(f"Config key {prefix}{name} is missing; {cls.__name__} needs it.")
    return cls(**{name: _check_value(hints[name], value, prefix + name) for name, value in given.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Invert :func:`from_dict`: plain JSON-ready dictionaries (tuples become lists).

    Fields with the metadata ``stored=False``, which only say how to run here, are left out.
    """

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            stored = (f.name for f in dataclasses.fields(value) if f.metadata.get("stored", True))
            return {name: plain(getattr(value, name)) for name in stored}
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value

    return typing.cast(dict[str, Any], plain(config))
