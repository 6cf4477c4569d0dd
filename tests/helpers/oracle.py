"""The attention ops in float64, one query, head and key set at a time; shares no code with the ops.

Keys that are not seen are not even indexed, so NaN there cannot matter.
"""

from typing import Any

import jax
import numpy as np


def _softmax_average(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """[D] query, [N, D] keys and values that all count."""
    if len(keys) == 0:
        return np.zeros_like(q)
    logits = keys @ q * scale
    weights = np.exp(logits - logits.max())
    return weights @ values / weights.sum()


def prefill_seen(queries: Any, places: Any, selected: Any, b: int, t: int, shared: int) -> tuple[Any, Any]:
    """Masks bool [R, P] and [S] of what one query sees; ``shared`` indexes ``selected``'s head axis."""
    segment = int(queries.segment[b, t])
    lo, hi = int(queries.visual_lo[b, t]), int(queries.visual_hi[b, t])
    order = np.asarray(places.visual_order[b])
    visual = (
        (np.asarray(places.region_segment[b]) == segment)[:, None] & (order >= max(lo, 0)) & (order <= hi)
    )
    if selected is not None and bool(queries.routed[b, t]):
        visual &= np.asarray(selected[b, t, shared])[:, None]
    lo, hi = int(queries.text_lo[b, t]), int(queries.text_hi[b, t])
    order = np.asarray(places.text_order[b])
    text = (np.asarray(places.text_segment[b]) == segment) & (order >= max(lo, 0)) & (order <= hi)
    if segment < 0:
        return np.zeros_like(visual), np.zeros_like(text)
    return visual, text


def prefill(case: Any) -> np.ndarray:
    """float64 [B, T, H, D] for a :class:`tests.helpers.cases.Prefill`."""
    q, visual_k, visual_v, text_k, text_v = (np.asarray(a).astype(np.float64) for a in case.arrays())
    queries, places, selected = jax.tree.map(np.asarray, (case.queries, case.places, case.selected))
    spec = case.spec
    out = np.zeros_like(q)
    group = q.shape[2] // visual_k.shape[1]
    for b, t, h in np.ndindex(*q.shape[:3]):
        kv = h // group
        visual, text = prefill_seen(queries, places, selected, b, t, h if spec.select_per == "head" else kv)
        keys = np.concatenate([visual_k[b, kv][visual], text_k[b, kv][text]])
        values = np.concatenate([visual_v[b, kv][visual], text_v[b, kv][text]])
        out[b, t, h] = _softmax_average(q[b, t, h], keys, values, spec.scale)
    return out


def decode_read(case: Any, b: int, h: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 keys and values [N, D] that one query of a :class:`tests.helpers.cases.Decode` reads."""
    kv = h // (case.q.shape[1] // case.k.shape[2])
    seen, text = np.array(case.visual_seen[b]), np.asarray(case.text_seen[b])
    if case.indices is not None:
        listed = {int(i) for i in np.asarray(case.indices)[b, h if case.spec.select_per == "head" else kv]}
        seen[[r not in listed for r in range(len(seen))]] = False
    at = (int(case.layer), b, kv)
    keys, values = (
        np.concatenate(
            [np.asarray(a, np.float64)[at][mask] for a, mask in zip(pair, (seen, text), strict=True)]
        )
        for pair in ((case.k, case.text_k), (case.v, case.text_v))
    )
    return keys, values


def decode(case: Any) -> np.ndarray:
    """float64 [B, H, D] for a :class:`tests.helpers.cases.Decode`."""
    q = np.asarray(case.q).astype(np.float64)
    out = np.zeros_like(q)
    for b, h in np.ndindex(*q.shape[:2]):
        out[b, h] = _softmax_average(q[b, h], *decode_read(case, b, h), case.spec.scale)
    return out


def numeric_gradient(function: Any, x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central differences of a scalar float64 function."""
    x = np.array(x, np.float64)
    out = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        kept = x[i]
        x[i] = kept + step
        above = function(x)
        x[i] = kept - step
        out[i] = (above - function(x)) / (2 * step)
        x[i] = kept
    return out
