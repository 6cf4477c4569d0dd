"""gaze_decode in C++ for CPUs, called through ``jax.ffi``; routing too, in the same call if asked for.

The stacked cache is read in place: XLA hands over its address, and nothing of it is sliced out or gathered.
Query heads of a kv head read the union of their selections once. Arithmetic is float32 in any dtype.
``decode.h`` says how the work is divided; the result has the same bits on any number of threads.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import quantize
from pallas_kernels.dispatch import target
from pallas_kernels.gaze_decode.cpu import Side
from pallas_kernels.gaze_decode.native import library
from pallas_kernels.gaze_decode.routed import Routed
from pallas_kernels.gaze_decode.xla import reserve, unpack, write
from pallas_kernels.softmax import WithLse
from pallas_kernels.spec import GazeSpec

# The stacked cache is that of xla on other devices, and so is what changes it.
__all__ = ["gaze_decode", "pack", "reserve", "route_and_decode", "supports", "unpack", "write"]

Array = jax.Array
Packed = tuple[Side, Side]

TEXT_MULTIPLE = 1
_FLOATS = (jnp.float32, jnp.bfloat16)


def supports(spec: GazeSpec) -> str | None:
    """None on a CPU with the library, else the reason why not."""
    del spec
    if target() != "cpu":
        return f"it is for CPUs and JAX runs on {target()}; choose 'xla'."
    return library.missing()


def pack(k: Array, v: Array, *, spec: GazeSpec) -> Packed:
    """Keep [L, B, K, R, P, D]; round as ``spec`` says."""
    if spec.visual_dtype == "int8":
        return Side(*quantize.quantize(k)), Side(*quantize.quantize(v))
    return Side(k), Side(v)


def gaze_decode(
    q: Array,
    visual: Packed,
    text_k: Array,
    text_v: Array,
    layer: Array,
    indices: Array | None,
    visual_seen: Array,
    text_seen: Array,
    *,
    spec: GazeSpec,
) -> WithLse:
    """See :func:`pallas_kernels.gaze_decode.api.gaze_decode`."""
    listed = jnp.zeros((q.shape[0], text_k.shape[2], 0), jnp.int32) if indices is None else indices
    results = (q, jax.ShapeDtypeStruct(q.shape[:2], jnp.float32))
    call = _call(library.TARGET, results, scale=spec.scale, dense=indices is None)
    out, lse = call(*_arrays(q, visual, text_k, text_v, layer, visual_seen, text_seen), listed)
    return out, lse


def route_and_decode(
    q: Array,
    visual: Packed,
    text_k: Array,
    text_v: Array,
    layer: Array,
    visual_seen: Array,
    text_seen: Array,
    features: Array,
    descriptors: Array,
    budget: Array,
    visible: Array,
    order: Array,
    *,
    capacity: int,
    spec: GazeSpec,
) -> Routed:
    """See :func:`pallas_kernels.gaze_decode.api.route_and_decode`."""
    batch, heads, _ = q.shape
    shared = heads if spec.select_per == "head" else text_k.shape[2]
    results = (
        q,
        jax.ShapeDtypeStruct((batch, heads), jnp.float32),
        jax.ShapeDtypeStruct((batch, shared, capacity), jnp.int32),
        jax.ShapeDtypeStruct((batch, shared, descriptors.shape[3]), jnp.float32),
    )
    _check("descriptors", descriptors)
    call = _call(library.ROUTED_TARGET, results, scale=spec.scale, dense=False)
    selecting = (features.astype(q.dtype), descriptors, budget, visible, order)
    return Routed(*call(*_arrays(q, visual, text_k, text_v, layer, visual_seen, text_seen), *selecting))


def _check(name: str, array: Array, dtypes: tuple[jnp.dtype, ...] = _FLOATS) -> None:
    if array.dtype not in dtypes:
        raise NotImplementedError(
            f"gaze_decode implementation 'native' takes float32 and bfloat16, and {name} is {array.dtype}; "
            "choose 'xla'."
        )


def _arrays(
    q: Array, visual: Packed, text_k: Array, text_v: Array, layer: Array, visual_seen: Array, text_seen: Array
) -> tuple[Array, ...]:
    """What the library takes first, in its order; the scales of an int8 cache, else nothing."""
    keys, values = visual
    _check("q", q)
    _check("the visual cache", keys.values, (*_FLOATS, jnp.int8))
    _check("the text stream", text_k)
    if keys.values.dtype != values.values.dtype or text_k.dtype != text_v.dtype:
        raise NotImplementedError("gaze_decode implementation 'native' takes keys and values of one dtype.")
    scales = (jnp.zeros((0,), jnp.float32) if side.scales is None else side.scales for side in visual)
    layer = jnp.asarray(layer, jnp.int32)
    return (q, keys.values, values.values, *scales, text_k, text_v, layer, visual_seen, text_seen)


def _call(
    name: str, results: tuple[Array | jax.ShapeDtypeStruct, ...], *, scale: float, dense: bool
) -> Callable:
    """The library's function as a function of arrays; under ``jax.vmap`` a loop."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in results]
    call = jax.ffi.ffi_call(name, shapes, vmap_method="sequential")
    return functools.partial(call, scale=np.float32(scale), dense=dense)
