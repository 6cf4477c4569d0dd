"""The attention ops in float64 once more, with the errors that bfloat16 makes, element by element.

Every op may round the operands of its products and what it returns, each once, and nothing else: sums are
wider. A rounding is off by at most half a step, so by ``BFLOAT16`` / sqrt(3) of the number in the quadratic
mean, and roundings are independent. So each result has a *deviation*: the root of the sum of squares.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import oracle

BFLOAT16 = float(jnp.finfo(jnp.bfloat16).eps) / 2
"""Largest relative error of one rounding to the nearest."""


def within(got: Any, exact: np.ndarray, squares: np.ndarray) -> None:
    """Fail if an error is more than 4 deviations, or all together more than one; without one it must be 0.

    Args:
      got: what the op returned.
      exact: float64, of the same shape.
      squares: float64, the sum of the squares of what was rounded.
    """
    got = np.asarray(got, np.float64)
    assert got.shape == exact.shape and np.isfinite(got).all()
    assert (exact[squares > 0] != 0).any(), "a case that shows something"
    np.testing.assert_array_equal(got[squares == 0], exact[squares == 0])
    off = (got - exact)[squares > 0] / (BFLOAT16 * np.sqrt(squares[squares > 0] / 3))
    mean = np.sqrt(np.mean(off**2))
    assert np.abs(off).max() <= 4 and mean <= 1, (
        f"off by {np.abs(off).max():.2f} at most, {mean:.2f} in the mean"
    )


def int8(x: Any) -> np.ndarray:
    """Tokens [..., D] rounded to 127 steps of their largest element, float64."""
    x = np.asarray(x, np.float32)
    step = np.abs(x).max(-1, keepdims=True) / 127
    return np.round(x / step).astype(np.float64) * step


def _weights(query: np.ndarray, keys: np.ndarray, scale: float) -> np.ndarray:
    logits = keys @ query * scale
    weights = np.exp(logits - logits.max(initial=-np.inf))
    return weights / weights.sum()


def decode(case: Any) -> tuple[np.ndarray, np.ndarray]:
    """Output of a :class:`tests.helpers.cases.Decode` and the squares of what was rounded, [B, H, D] each."""
    q = np.asarray(case.q).astype(np.float64)
    exact, squares = np.zeros_like(q), np.zeros_like(q)
    for b, h in np.ndindex(*q.shape[:2]):
        k, v = oracle.decode_read(case, b, h)
        weights = _weights(q[b, h], k, case.spec.scale)
        exact[b, h], squares[b, h] = weights @ v, weights**2 @ v**2
    np.testing.assert_allclose(exact, oracle.decode(case), rtol=1e-9, atol=1e-9)
    return exact, squares + exact**2


def prefill(case: Any, cotangent: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Output of a :class:`tests.helpers.cases.Prefill`, and gradients of its five arrays under ``cotangent``.

    Returns:
      float64 values, the output's first, and the squares of what was rounded.
    """
    q, *sides = (np.asarray(a).astype(np.float64) for a in case.arrays())
    d_out = np.asarray(cotangent).astype(np.float64)
    queries, places, selected = jax.tree.map(np.asarray, (case.queries, case.places, case.selected))
    scale, group = case.spec.scale, q.shape[2] // sides[0].shape[1]
    exact = [np.zeros_like(a) for a in (q, q, *sides)]
    squares = [np.zeros_like(a) for a in exact]
    for b, t, h in np.ndindex(*q.shape[:3]):
        kv, at = h // group, (b, t, h)
        shared = h if case.spec.select_per == "head" else kv
        masks = oracle.prefill_seen(queries, places, selected, b, t, shared)
        k, v = (
            np.concatenate([sides[i + 2 * stream][b, kv][mask] for stream, mask in enumerate(masks)])
            for i in (0, 1)
        )
        if len(k) == 0:
            continue
        query, d = q[at], d_out[at]
        weights = _weights(query, k, scale)
        out, d_weights = weights @ v, v @ d
        d_logits = weights * (d_weights - out @ d) * scale
        exact[0][at], exact[1][at] = out, d_logits @ k
        squares[0][at] = weights**2 @ v**2
        # The output that meets the cotangent was rounded already, which moves all logits' gradients at once.
        moved = scale**2 * ((weights * d_weights) ** 2).sum() + scale**2 * ((out * d) ** 2).sum()
        squares[1][at] = d_logits**2 @ k**2 + moved * (weights @ k) ** 2
        cut = masks[0].sum()
        for into, d_keys, d_values in (
            (exact, np.outer(d_logits, query), np.outer(weights, d)),
            (squares, np.outer(d_logits**2 + moved * weights**2, query**2), np.outer(weights**2, d**2)),
        ):
            for i, part in enumerate((d_keys, d_values)):
                into[2 + i][b, kv][masks[0]] += part[:cut]
                into[4 + i][b, kv][masks[1]] += part[cut:]
    return exact, [square + value**2 for square, value in zip(squares, exact, strict=True)]
