"""gaze_prefill as defined: float32, one head and one query at a time, no tiling.

The expected result in the shared test suite. It deliberately shares no code with the other implementations.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.softmax import WithLse
from pallas_kernels.spec import GazeSpec, KeyPlaces, Windows


def supports(spec: GazeSpec) -> str | None:
    """Every spec, everywhere."""
    del spec
    return None


def gaze_prefill(
    q: jax.Array,
    visual_k: jax.Array,
    visual_v: jax.Array,
    text_k: jax.Array,
    text_v: jax.Array,
    queries: Windows,
    places: KeyPlaces,
    selected: jax.Array | None,
    *,
    spec: GazeSpec,
) -> WithLse:
    """See :func:`pallas_kernels.gaze_prefill.api.gaze_prefill`."""
    heads = q.shape[2]
    kv_heads, regions, slots, dim = visual_k.shape[1:]
    per_kv = heads // kv_heads
    dtype = q.dtype
    # Before they are indexed: a gradient sums over all queries in the dtype that they read.
    q, visual_k, visual_v, text_k, text_v = (
        a.astype(jnp.float32) for a in (q, visual_k, visual_v, text_k, text_v)
    )

    def one(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        seen: jax.Array,
    ) -> WithLse:
        """One query [D] over keys [N, D], of which those marked in ``seen`` [N] count."""
        k = jnp.where(seen[:, None], k, 0.0)
        v = jnp.where(seen[:, None], v, 0.0)
        logits = jnp.dot(k, q, precision="highest") * spec.scale
        logits = jnp.where(seen, logits, -jnp.inf)
        some = jnp.any(seen)
        logits = jnp.where(some, logits, 0.0)
        weights = jnp.where(some, jax.nn.softmax(logits), 0.0)
        lse = jnp.where(some, jax.nn.logsumexp(logits), -jnp.inf)
        return jnp.dot(weights, v, precision="highest"), lse

    def row(b: int, t: int, h: int) -> WithLse:
        w = jax.tree.map(lambda a: a[b, t], queries)
        order, segment = places.visual_order[b], places.region_segment[b][:, None]
        seen = (order >= 0) & (segment == w.segment) & (w.segment >= 0)
        seen &= (w.visual_lo <= order) & (order <= w.visual_hi)
        if selected is not None:
            mine = selected[b, t, h if spec.select_per == "head" else h // per_kv]
            seen &= ~w.routed | mine[:, None]
        d_order, d_segment = places.text_order[b], places.text_segment[b]
        d_seen = (d_order >= 0) & (d_segment == w.segment) & (w.segment >= 0)
        d_seen &= (w.text_lo <= d_order) & (d_order <= w.text_hi)
        kv = h // per_kv
        return one(
            q[b, t, h],
            jnp.concatenate([visual_k[b, kv].reshape(regions * slots, dim), text_k[b, kv]]),
            jnp.concatenate([visual_v[b, kv].reshape(regions * slots, dim), text_v[b, kv]]),
            jnp.concatenate([seen.reshape(-1), d_seen]),
        )

    index = jnp.indices(q.shape[:3]).reshape(3, -1)
    out, lse = jax.vmap(row)(*index)
    return out.reshape(q.shape).astype(dtype), lse.reshape(q.shape[:3])
