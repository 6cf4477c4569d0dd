"""Routed layers of a decoding step as abstract programs, and how many operations a compiled one executes.

What ``gaze_jax.models.decode.decode_attention`` does in a layer (scores, selection, attention), scanned over
the layers: what depends on the step alone can be computed before the loop.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.models import GazeConfig
from gaze_jax.models.attention import RoutedQueries
from gaze_jax.models.cache import Cache
from gaze_jax.models.decode import DecodeMasks, decode_attention
from pallas_kernels.gaze_decode import shapes

LIMITS = {"kv_head": 30, "head": 45}
"""The most operations of a routed layer on a TPU, by ``select_per``."""


def step_of(shape: shapes.Shape, implementation: str) -> tuple[GazeConfig, Cache, DecodeMasks]:
    """A model's gaze settings, and the abstract cache and masks of a decoding step."""
    _, kv_heads, _, dim = shapes.HEADS[shape.heads]
    regions, _ = shapes.SCENES[shape.tokens]
    gaze = GazeConfig(
        select_per=shape.select_per,
        decode_implementation=implementation,
        visual_dtype=shape.visual_dtype,
    )
    _, packed, text, *_ = shape.arguments(implementation)

    def array(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shape.batch, *sizes), dtype)

    cache = Cache(
        visual=packed,
        descriptors=jax.ShapeDtypeStruct((shape.layers, shape.batch, kv_heads, regions, dim), jnp.bfloat16),
        text_k=text,
        text_v=text,
        visual_order=array(jnp.int32, regions, shapes.SLOTS),
        text_order=array(jnp.int32, shapes.TEXT),
    )
    one = array(jnp.int32, 1)
    masks = DecodeMasks(
        visual=array(jnp.bool_, regions, shapes.SLOTS),
        text=array(jnp.bool_, shapes.TEXT),
        routed=RoutedQueries(
            visible=array(jnp.bool_, 1, regions),
            count=one,
            order=one,
            sample=one,
            first=array(jnp.int32, regions),
            permutation=array(jnp.int32, regions),
        ),
    )
    return gaze, cache, masks


def queries_of(shape: shapes.Shape) -> jax.ShapeDtypeStruct:
    """Abstract queries [B, 1, H, D] of a decoding step."""
    _, kv_heads, group, dim = shapes.HEADS[shape.heads]
    return jax.ShapeDtypeStruct((shape.batch, 1, kv_heads * group, dim), jnp.bfloat16)


def routed_layers(shape: shapes.Shape, implementation: str) -> tuple[Callable[..., Any], Any]:
    """A function that runs the routed attention of all layers of a shape, and its abstract arguments."""
    gaze, cache, masks = step_of(shape, implementation)

    def run(q: Any, cache: Cache, masks: DecodeMasks, budget: Any) -> Any:
        spec = SelectionSpec(capacity=shapes.SCENES[shape.tokens][1])

        def layer(q: Any, number: Any) -> tuple[Any, None]:
            attended = decode_attention(q, cache, masks, Selection(budget), spec, gaze=gaze, layer=number)
            return attended[0], None

        return jax.lax.scan(layer, q, jnp.arange(shape.layers, dtype=jnp.int32))[0]

    return run, (queries_of(shape), cache, masks, jax.ShapeDtypeStruct((), jnp.int32))


def operations(text: str) -> tuple[list[str], list[str]]:
    """The instructions that an optimised HLO text executes: per pass of its loop, and once around it.

    Fusions, custom calls, copies, sorts, slices and everything else count; parameters, constants, tuples and
    their elements, and bitcasts are no work. The end of an asynchronous copy belongs to its start. Of a
    program without a loop all instructions count as one pass.

    Raises:
      ValueError: the program has several loops.
    """
    free = r"parameter|constant|bitcast|get-tuple-element|tuple|while|after-all|\S+-done"
    bodies = set(re.findall(r"\bwhile\(.*body=(%[\w.\-]+)", text))
    if len(bodies) > 1:
        raise ValueError(f"The program has {len(bodies)} loops; which one runs over the layers is unknown.")
    found: dict[str, list[str]] = {}
    inside = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?(%[\w.\-]+) \(", line)
        inside = ("ENTRY" if header[1] else header[2]) if header else inside
        made = re.match(r"\s+(?:ROOT )?(%[\w.\-]+) = .*? ([\w\-]+)\(", line)
        if made and not re.fullmatch(free, made[2]):
            found.setdefault(inside, []).append(f"{made[1]} {made[2]}")
    once = found.get("ENTRY", [])
    return (found.get(bodies.pop(), []), once) if bodies else (once, [])
