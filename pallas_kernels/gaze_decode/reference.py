"""gaze_decode as defined: float32, one head at a time, every region under a mask.

The expected result in the shared test suite. It deliberately shares no code with the other implementations.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import dequantize, quantize
from pallas_kernels.softmax import WithLse
from pallas_kernels.spec import GazeSpec

Packed = tuple[jax.Array, jax.Array]

TEXT_MULTIPLE = 1


def supports(spec: GazeSpec) -> str | None:
    """Every spec, everywhere."""
    del spec
    return None


def pack(k: jax.Array, v: jax.Array, *, spec: GazeSpec) -> Packed:
    """Keep the layout [L, B, K, R, P, D]; round as ``spec`` says."""
    if spec.visual_dtype == "int8":
        return dequantize(*quantize(k)), dequantize(*quantize(v))
    return k, v


def unpack(packed: Packed) -> Packed:
    """Return k and v, [L, B, K, R, P, D] each, unchanged."""
    return packed


def reserve(packed: Packed, regions: int, slots: int) -> Packed:
    """Pad R and P with zeros to the new sizes."""
    k, v = packed
    more = [(0, 0)] * 3 + [(0, regions - k.shape[3]), (0, slots - k.shape[4]), (0, 0)]
    return jnp.pad(k, more), jnp.pad(v, more)


def write(packed: Packed, piece: Packed, start: jax.Array) -> Packed:
    """Overwrite the regions from ``start`` on with those of ``piece``."""
    (k, v), (new_k, new_v) = packed, piece
    put = jax.lax.dynamic_update_slice_in_dim
    return put(k, new_k, start, 3), put(v, new_v, start, 3)


def gaze_decode(
    q: jax.Array,
    visual: Packed,
    text_k: jax.Array,
    text_v: jax.Array,
    layer: jax.Array,
    indices: jax.Array | None,
    visual_seen: jax.Array,
    text_seen: jax.Array,
    *,
    spec: GazeSpec,
) -> WithLse:
    """See :func:`pallas_kernels.gaze_decode.api.gaze_decode`."""
    batch, heads, dim = q.shape
    per_kv = heads // text_k.shape[2]
    regions, slots = visual_seen.shape[1:]
    # Before they are indexed and joined: an int8 cache is float32 here, a text stream may be narrower, and a
    # gradient sums in the dtype that is indexed.
    keys, values, text_k, text_v = (a.astype(jnp.float32) for a in (*visual, text_k, text_v))

    def one(b: jax.Array, h: jax.Array) -> WithLse:
        kv = h // per_kv
        seen = visual_seen[b]
        if indices is not None:
            listed = indices[b, h if spec.select_per == "head" else kv]
            seen &= jnp.isin(jnp.arange(regions), listed)[:, None]
        seen = jnp.concatenate([seen.reshape(-1), text_seen[b]])
        k = jnp.concatenate([keys[layer, b, kv].reshape(regions * slots, dim), text_k[layer, b, kv]])
        v = jnp.concatenate([values[layer, b, kv].reshape(regions * slots, dim), text_v[layer, b, kv]])
        k = jnp.where(seen[:, None], k, 0.0)
        v = jnp.where(seen[:, None], v, 0.0)
        logits = jnp.dot(k, q[b, h].astype(jnp.float32), precision="highest") * spec.scale
        some = jnp.any(seen)
        logits = jnp.where(some, jnp.where(seen, logits, -jnp.inf), 0.0)
        weights = jnp.where(some, jax.nn.softmax(logits), 0.0)
        lse = jnp.where(some, jax.nn.logsumexp(logits), -jnp.inf)
        return jnp.dot(weights, v, precision="highest"), lse

    b, h = jnp.indices((batch, heads)).reshape(2, -1)
    out, lse = jax.vmap(one)(b, h)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(batch, heads)
