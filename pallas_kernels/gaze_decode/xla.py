"""gaze_decode in plain XLA: gather the selected regions, then one small softmax.

Only listed regions are read from the cache, straight out of the stacked array: no layer's KV is
sliced out first.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.spec import GazeSpec

Packed = tuple[jax.Array, jax.Array]

DENSE_MULTIPLE = 1

_EXACT = jax.lax.Precision.HIGHEST  # float32 stays float32 on TPU; bfloat16 inputs are not affected


def supports(spec: GazeSpec) -> str | None:
    """A cache in the dtype that it comes in, everywhere."""
    return None if spec.visual_dtype is None else f"it keeps no {spec.visual_dtype} cache."


def pack(k: jax.Array, v: jax.Array, *, spec: GazeSpec) -> Packed:
    """Keep [L, B, K, R, P, D]: a region of a head is one contiguous block already."""
    del spec
    return k, v


def unpack(packed: Packed) -> Packed:
    """Keep [L, B, K, R, P, D]."""
    return packed


def _first_mention(indices: jax.Array, regions: int) -> jax.Array:
    """bool [B, Hs, J]: the slot names a region that no earlier slot names."""
    slots = jnp.arange(indices.shape[-1], dtype=jnp.int32)

    def one(indices: jax.Array) -> jax.Array:
        # Unused slots are all sent to the extra place `regions`; their verdict is overruled below.
        place = jnp.where(indices >= 0, indices, regions)
        first = jnp.full((regions + 1,), indices.shape[-1], jnp.int32).at[place].min(slots)
        return first[place] == slots

    return jax.vmap(jax.vmap(one))(indices) & (indices >= 0)


def gaze_decode(
    q: jax.Array,
    visual: Packed,
    dense_k: jax.Array,
    dense_v: jax.Array,
    layer: jax.Array,
    indices: jax.Array | None,
    visual_seen: jax.Array,
    dense_seen: jax.Array,
    *,
    spec: GazeSpec,
) -> jax.Array:
    """See :func:`pallas_kernels.gaze_decode.api.gaze_decode`."""
    batch, heads, dim = q.shape
    kv_heads = dense_k.shape[2]
    per_kv = heads // kv_heads
    regions, slots = visual_seen.shape[1:]
    grouped = q.reshape(batch, kv_heads, per_kv, dim)

    if indices is None or regions == 0:
        k, v = (
            jax.lax.dynamic_index_in_dim(a, layer, keepdims=False).reshape(
                batch, kv_heads, 1, regions * slots, dim
            )
            for a in visual
        )
        seen = visual_seen.reshape(batch, 1, 1, regions * slots)
    else:
        # [B, K, N, J]: N is G selections per kv head, or the single one that the group shares.
        picks = indices.reshape(batch, kv_heads, -1, indices.shape[-1])
        b = jnp.arange(batch)[:, None, None, None]
        h = jnp.arange(kv_heads)[None, :, None, None]
        at = jnp.maximum(picks, 0)
        shape = (batch, kv_heads, picks.shape[2], picks.shape[3] * slots, dim)
        k, v = (a[layer, b, h, at].reshape(shape) for a in visual)
        fresh = _first_mention(indices, regions).reshape(picks.shape)
        seen = (visual_seen[b, at] & fresh[..., None]).reshape(shape[:-1])

    zero = jnp.zeros((), q.dtype)
    k, v = (jnp.where(seen[..., None], a, zero) for a in (k, v))
    dk, dv = (
        jnp.where(dense_seen[:, None, :, None], jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), zero)
        for a in (dense_k, dense_v)
    )

    # With a shared selection G heads meet the same keys: make G a matmul dimension, not a copy.
    rows = grouped.reshape(batch, kv_heads, k.shape[2], -1, dim)
    logits = jnp.einsum("BKNGD,BKNAD->BKNGA", rows, k, precision=_EXACT, preferred_element_type=jnp.float32)
    logits = jnp.where(seen[:, :, :, None, :], logits * spec.scale, -jnp.inf)
    dense = jnp.einsum("BKGD,BKSD->BKGS", grouped, dk, precision=_EXACT, preferred_element_type=jnp.float32)
    dense = jnp.where(dense_seen[:, None, None, :], dense * spec.scale, -jnp.inf)

    both = jnp.concatenate([logits.reshape(batch, kv_heads, per_kv, -1), dense], axis=-1)
    top = jnp.max(both, axis=-1, keepdims=True)
    weights = jnp.exp(both - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1.0)).astype(q.dtype)
    split = logits.shape[-1]
    out = jnp.einsum(
        "BKNGA,BKNAD->BKNGD",
        weights[..., :split].reshape(logits.shape),
        v,
        precision=_EXACT,
        preferred_element_type=jnp.float32,
    ).reshape(grouped.shape)
    out += jnp.einsum(
        "BKGS,BKSD->BKGD", weights[..., split:], dv, precision=_EXACT, preferred_element_type=jnp.float32
    )
    return out.reshape(q.shape).astype(q.dtype)
