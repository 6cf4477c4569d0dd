"""The run-time check of the shapes in the types of ``gaze_jax.core`` and ``gaze_jax.models``.

``tests/conftest.py`` has jaxtyping put it on every function there as the modules are imported.
"""

import dataclasses
import functools
import typing

import beartype
import beartype.roar
import jaxtyping

PACKAGES = ("gaze_jax.core", "gaze_jax.models")

# An int may stand for a float, as type checkers have it.
_CONF = beartype.BeartypeConf(is_pep484_tower=True)


def checked(function):
    """Check the arguments and the result of a function, and the fields of dataclasses among them.

    The arguments of ``__init__`` are not checked: JAX rebuilds pytrees with other leaves than arrays, such as
    shardings or None. ``__post_init__`` refuses wrong values itself. Fields are checked where a function
    takes or returns the dataclass.
    """
    if function.__name__ in ("__init__", "__post_init__"):
        return function
    arrays = beartype.beartype(function, conf=_CONF)

    @functools.wraps(function)
    def check(*args, **kwargs):
        for value in (*args, *kwargs.values()):
            check_fields(value)
        return arrays(*args, **kwargs)

    return check


def check_fields(value):
    """Refuse a dataclass of the checked packages, or one inside it, whose arrays do not fit one another."""
    for inner in value if type(value) is tuple else (value,):
        fields = _fields(type(inner))
        if not fields:  # most values; a context takes longer than the rest
            continue
        with jaxtyping.jaxtyped("context"):
            for name, take in fields.items():
                field = getattr(inner, name)
                try:
                    take(field)
                except beartype.roar.BeartypeCallHintParamViolation as error:
                    wanted = take.__annotations__["value"]
                    raise jaxtyping.TypeCheckError(
                        f"{type(inner).__name__}.{name} is {_kind(field)}, not {wanted}."
                    ) from error
        for name in fields:
            check_fields(getattr(inner, name))


def _kind(value):
    """Dtype and shape of an array, or the type of anything else."""
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else type(value).__name__


@functools.cache
def _fields(cls):
    """A function for each field of a dataclass of the checked packages, which takes what the field may be."""
    if not (dataclasses.is_dataclass(cls) and cls.__module__.startswith(PACKAGES)):
        return {}
    hints = typing.get_type_hints(cls, include_extras=True)
    # What a class of Flax declares is Flax's: a protocol that cannot be checked at run time, for example.
    bases = [base for base in cls.__mro__ if base.__module__.startswith(PACKAGES)]
    own = {name for base in bases for name in vars(base).get("__annotations__", ())}
    return {field.name: _taker(hints[field.name]) for field in dataclasses.fields(cls) if field.name in own}


def _taker(hint):
    def take(value):
        pass

    take.__annotations__["value"] = hint
    return beartype.beartype(take, conf=_CONF)
