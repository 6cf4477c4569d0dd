"""Shapes stand in the types of ``gaze_jax.core`` and ``gaze_jax.models``, and the tests check them."""

import dataclasses
import importlib
import inspect
import pkgutil
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import gaze_jax.core
import gaze_jax.models
from gaze_jax.core import accounting, masks, regions, routing, schedule, selection
from gaze_jax.models import DUMMY, attention, cache, decode, layers, ops, unstacked, vision
from pallas_kernels import GazeSpec
from tests.helpers.streams import PlacedView, Text, batch, sample

B, T, S, R, P, J, K, G, D, L = 2, 3, 5, 4, 6, 2, 2, 2, 8, 3
H = K * G
SIDE = DUMMY.tower.image_size
STREAMS = batch([sample([Text(3), PlacedView(3, 5), Text(2)])])
SELECTOR = {"scores": (B, T, H, R), "visible": (B, T, 1, R), "top_k": (B, 1), "permutation": (B, R)}
DTYPES = {"visible": bool, "visual_seen": bool, "text_seen": bool, "valid": bool, "seen": bool, "kind": int}
DTYPES |= dict.fromkeys(
    ("top_k", "permutation", "visual_src", "indices", "layer", "write_index", "order"), int
)


def _array(name, shape):
    kind = DTYPES.get(name, float)
    return jnp.zeros(shape, {bool: jnp.bool_, int: jnp.int32, float: jnp.float32}[kind])


def _cache(**changed):
    shapes = {"descriptors": (L, B, K, R, D), "text_k": (L, B, K, S, D), "text_v": (L, B, K, S, D)}
    arrays = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    orders = {"visual_order": jnp.zeros((B, R, P), jnp.int32), "text_order": jnp.zeros((B, S), jnp.int32)}
    return cache.Cache(**{"visual": (), **arrays, **orders, **changed})


def _position(order=(B,)):
    zeros = jnp.zeros(B, jnp.int32)
    return decode.DecodePosition(jnp.zeros(order, jnp.int32), jnp.zeros((), jnp.int32), zeros)


def _decode(**fields):
    chosen = selection.Selection(budget=jnp.ones((B, 1), jnp.int32), **fields)
    masks_ = decode.decode_masks(_cache(), _position())
    return decode.decode_attention(
        jnp.zeros((B, 1, H, D)),
        _cache(),
        masks_,
        chosen,
        selection.SelectionSpec(),
        gaze=DUMMY.gaze,
        layer=jnp.int32(0),
    )


# A function, the shapes that it takes, what else it takes, and what must be refused: a shape, or a value.
CASES = {
    "a mask of other slots": (
        regions.mean_keys,
        {"keys": (B, K, R, P, D), "valid": (B, R, P)},
        {},
        {"valid": (B, R, P + 1), "keys": (B, R, P, D)},
    ),
    "a mask that is not boolean": (
        regions.mean_keys,
        {"keys": (B, K, R, P, D), "valid": (B, R, P)},
        {},
        {"valid": np.ones((B, R, P), np.int32), "keys": np.ones((B, K, R, P, D), np.int32)},
    ),
    "an index of floats": (
        regions.to_regions,
        {"features": (B, S, D), "visual_src": (B, R, P)},
        {},
        {"visual_src": np.zeros((B, R, P), np.float32), "features": (B + 1, S, D)},
    ),
    "descriptors of another width": (
        routing.descriptor_scores,
        {"q": (B, T, H, D), "descriptors": (B, K, R, D)},
        {"select_per": "head"},
        {"descriptors": (B, K, R, 2 * D), "q": (B, H, D)},
    ),
    "a permutation of other regions": (
        routing.select_mask,
        SELECTOR,
        {},
        {"permutation": (B, R + 1), "visible": (B, T, 3, R), "top_k": (B, T + 1), "scores": (B, T, R)},
    ),
    "a budget that is no count": (
        routing.select_indices,
        SELECTOR,
        {"capacity": J},
        {"top_k": np.ones((B, T), np.float32), "capacity": 1.5},
    ),
    "keys of another batch": (
        routing.log_masses,
        {
            "q": (B, H, D),
            "visual_k": (B, K, R, P, D),
            "text_k": (B, K, S, D),
            "visual_seen": (B, R, P),
            "text_seen": (B, S),
        },
        {"scale": 1.0},
        {"text_k": (B + 1, K, S, D), "visual_seen": (B, P, R), "text_seen": (B, T)},
    ),
    "kinds of another length": (
        accounting.entries,
        {"valid": (B, R, P), "text_seen": (B, S), "kind": (B, S)},
        {},
        {"kind": (B, S + 1), "valid": (B + 1, R, P)},
    ),
    "progress of several steps": (
        schedule.Schedule().keep,
        {"progress": ()},
        {"final": 0.5},
        {"progress": (3,), "final": "half"},
    ),
    "angles of another head dim": (
        lambda x, cos: layers.apply_rope(x, (cos, cos)),
        {"x": (B, T, H, D), "cos": (B, T, D // 2)},
        {},
        {"cos": (B, T, D), "x": (B, T + 1, H, D)},
    ),
    "a kernel the other way round": (
        unstacked.product,
        {"kernel": (D, S), "x": (B, T, S)},
        {},
        {"kernel": (S, D), "x": (B, T, D)},
    ),
    "values of other regions": (
        ops.gaze_decode,
        {"q": (B, H, D), "text_k": (L, B, K, S, D), "text_v": (L, B, K, S, D), "layer": ()}
        | {"visual_seen": (B, R, P), "text_seen": (B, S)},
        {"visual": (jnp.zeros((L, B, K, R, P, D)),) * 2, "indices": None}
        | {"spec": GazeSpec(scale=1.0), "implementation": "reference"},
        {"text_v": (L, B, K, S + 1, D), "layer": (1,), "visual_seen": (B, R, P, 1)},
    ),
    "two tokens at once": (
        decode.append_token,
        {"k": (B, 1, K, D), "v": (B, 1, K, D), "layer": (), "write_index": ()},
        {"cache": _cache()},
        {"k": (B, 2, K, D), "v": (B, 1, K, D + 1), "write_index": (B,)},
    ),
    "a stream without its views": (
        attention.split_streams,
        {"a": (B, R * P + S, K, D)},
        {"regions": R, "slots": P},
        {"a": (B, R * P + S, K * D)},
    ),
    "pixels without channels": (
        lambda images: jax.eval_shape(vision.VisionTower(DUMMY.tower).init, jax.random.key(0), images),
        {"images": (1, SIDE, SIDE, 3)},
        {},
        {"images": (1, SIDE, SIDE, 4)},
    ),
}
REFUSED = [(case, name) for case, (_, _, _, changes) in CASES.items() for name in changes]


@pytest.mark.parametrize("case", CASES)
def test_what_the_types_say_is_taken(case):
    """The calls that the refused ones differ from in one argument."""
    function, shapes, others, _ = CASES[case]
    found = function(**{name: _array(name, shape) for name, shape in shapes.items()}, **others)
    assert jax.tree.leaves(found), "it returned arrays"


@pytest.mark.parametrize(("case", "wrong"), REFUSED)
def test_another_shape_or_dtype_is_refused(case, wrong):
    """By the check and not by what the function does with it, and by the name of an argument."""
    function, shapes, others, changes = CASES[case]
    arguments = {name: _array(name, shape) for name, shape in shapes.items()} | others
    change = changes[wrong]
    arguments[wrong] = _array(wrong, change) if type(change) is tuple else change
    with pytest.raises(jaxtyping.TypeCheckError, match="typechecking parameter"):
        function(**arguments)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: masks.key_places(dataclasses.replace(STREAMS, targets=STREAMS.targets[:, 1:])), "targets"),
        (lambda: masks.key_places(dataclasses.replace(STREAMS, kind=STREAMS.kind == 0)), "kind"),
        (lambda: decode.decode_masks(_cache(), _position(order=(B, 1))), "order"),
        (
            lambda: decode.decode_masks(_cache(descriptors=jnp.zeros((L, B, K, R + 1, D, 1))), _position()),
            "descr",
        ),
        (lambda: selection.Selection(full_layers=jnp.zeros(L, jnp.int32)).over_layers(L), "full_layers"),
        (lambda: _decode(forced=jnp.zeros((B, 1, H, J))), "forced"),
    ],
)
def test_fields_of_another_shape_are_refused(call, name):
    """Fields that do not fit one another, wherever a function takes the dataclass."""
    with pytest.raises(jaxtyping.TypeCheckError) as refused:
        call()
    assert name in str(refused.value) + str(refused.value.__cause__)


def test_a_result_of_another_shape_is_refused(monkeypatch):
    """What a function returns is checked like what it takes."""
    monkeypatch.setattr(regions.jnp, "concatenate", lambda arrays, axis: arrays[0])
    with pytest.raises(jaxtyping.TypeCheckError, match="checking the return value"):
        regions.minmax_keys(jnp.zeros((B, K, R, P, D)), jnp.ones((B, R, P), bool))


def test_heads_must_be_a_multiple_of_kv_heads():
    """A type cannot say H = K * G, so the function does."""
    with pytest.raises(ValueError, match="H=3 query heads are not a multiple of K=2"):
        routing.descriptor_scores(jnp.zeros((B, T, 3, D)), jnp.zeros((B, K, R, D)), select_per="head")


def _bare(hint):
    """Whether an annotation has an array without a shape in it."""
    if hint in (jax.Array, np.ndarray) or typing.get_origin(hint) is np.ndarray:
        return True
    return any(map(_bare, hint if isinstance(hint, list) else typing.get_args(hint)))


def _functions(module):
    """The public functions of a module, and methods and properties of its classes, with their names."""
    for owner, value in vars(module).items():
        if owner.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        members = vars(value) if inspect.isclass(value) else {"": value}
        for name, member in members.items():
            if isinstance(member, property):
                member = member.fget
            member = getattr(member, "__func__", member)
            if inspect.isfunction(member) and (name == "__call__" or not name.startswith("_")):
                yield f"{owner}.{name}".rstrip("."), member


MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (gaze_jax.core, gaze_jax.models)
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_array_has_a_shape(name):
    """No parameter, result or field is an array without a shape, and the module is one that is checked."""
    module = importlib.import_module(name)
    hints = {
        f"{owner}: {argument}": hint
        for owner, function in _functions(module)
        for argument, hint in typing.get_type_hints(function, include_extras=True).items()
    }
    for owner, value in vars(module).items():
        if dataclasses.is_dataclass(value) and value.__module__ == name:
            fields = typing.get_type_hints(value, include_extras=True)
            own = vars(value)["__annotations__"]  # not what a class of Flax declares
            hints |= {f"{owner}.{field}": hint for field, hint in fields.items() if field in own}
    assert [argument for argument, hint in hints.items() if _bare(hint)] == []
    assert module.jaxtyping is jaxtyping, f"{name} was imported before the hook of tests/conftest.py"


@pytest.mark.parametrize(
    "hint",
    [
        jax.Array,
        jax.Array | None,
        tuple[int, np.ndarray],
        dict[str, jax.Array],
        typing.Callable[[jax.Array], int],
    ],
)
def test_an_array_without_a_shape_is_found(hint):
    """The walk above would find one anywhere in an annotation."""
    assert _bare(hint) and not _bare(jaxtyping.Float[jax.Array, "B T"] | None)


def test_the_walk_meets_every_kind_of_function():
    """Functions, methods, properties, class methods and modules of linen, public ones only."""
    found = {name for module in MODULES for name, _ in _functions(importlib.import_module(module))}
    assert {
        "select_mask",
        "Schedule.keep",
        "Entries.total",
        "Streams.from_batch",
        "RMSNorm.__call__",
    } <= found
    assert {"MLLM.prefill", "Decoder.logits"} <= found and not any(
        "._" in n.replace("__call__", "") for n in found
    )
