"""The Mosaic GPU kernel that joins the partial softmaxes of ``gpu_kernel.py``: a block per row and kv head.

Splits are the rows of a matrix, so their weights are vectors and their sum is a sum over rows, whose order
depends on the number of splits alone.
"""

import functools
import math as pymath
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.gaze_decode.gpu_kernel import Shape
from pallas_kernels.gaze_decode.gpu_math import Math, Ref, Refs, launch, swizzled
from pallas_kernels.softmax import WithLse

_TILE = 64  # splits that are joined at once
_BUFFER = 160 * 1024  # bytes of shared memory for values in flight
_LN2 = pymath.log(2)


def _weights(math: Math, scratch: Refs, splits: int, heads: int) -> tuple[list[jax.Array], jax.Array]:
    """The factor of each split, [64, heads] for every 64 of them, and the log-sum-exp [heads]."""
    shape = (_TILE, heads)
    row = math.iota(shape, 0, math.matrix)
    tops, totals = [], []
    for start in range(0, splits, _TILE):
        inside, at = row < splits - start, pl.ds(start, _TILE)
        tops.append(jnp.where(inside, math.load(scratch["tops"].at[at], math.matrix), -jnp.inf))
        totals.append(jnp.where(inside, math.load(scratch["totals"].at[at], math.matrix), 0.0))
    best = functools.reduce(jnp.maximum, [jnp.max(top, axis=0) for top in tops])
    base = math.spread(jnp.where(jnp.abs(best) < jnp.inf, best, 0.0), shape, 1, math.matrix)
    weights = [jnp.exp2(top - base) for top in tops]
    parts = [jnp.sum(weight * total, axis=0) for weight, total in zip(weights, totals, strict=True)]
    total = functools.reduce(jnp.add, parts)
    # A sum of NaN is no sum of 0: the output of a query that sees NaN is not that of one that sees no key.
    none = total == 0
    divisor = jnp.where(none, 1.0, total)
    lse = jnp.where(none, -jnp.inf, best * _LN2 + jnp.log(divisor))
    by_row = math.spread(divisor, shape, 1, math.matrix)
    return [weight / by_row for weight in weights], lse


def _block(shape: Shape, together: bool, math: Math, refs: Refs, outs: Sequence[Ref], scratch: Refs) -> None:
    """One thread block: all query heads of a row's kv head."""
    b, h = lax.axis_index("batch"), lax.axis_index("kv")
    splits, group, heads, dim = shape.splits, shape.group, shape.heads, shape.dim
    stored, buffers = refs["values"].shape[3], scratch["values"].shape[0]
    for name in ("tops", "totals"):
        target = scratch[name].at[pl.ds(0, stored)]
        plgpu.copy_gmem_to_smem(refs[name].at[b, h], target, scratch["facts"])
    items = [(g, start) for g in range(group) for start in range(0, splits, _TILE)]

    def fetch(i: int) -> None:
        (g, start), slot = items[i], i % buffers
        rows = min(stored - start, _TILE)
        source = refs["values"].at[b, h, g, pl.ds(start, rows)]
        target = scratch["values"].at[slot, pl.ds(0, rows)]
        plgpu.copy_gmem_to_smem(source, target, scratch["arrived"].at[slot])

    for i in range(min(buffers, len(items))):
        fetch(i)
    plgpu.barrier_wait(scratch["facts"])
    weights, lse = _weights(math, scratch, splits, heads)
    scratch["lse"][...] = lse

    full, columns = (_TILE, dim), (_TILE, heads)
    row, column = math.iota(full, 0, math.matrix), math.iota(columns, 1, math.matrix)
    total = None
    for i, (g, start) in enumerate(items):
        slot = i % buffers
        plgpu.barrier_wait(scratch["arrived"].at[slot])
        x = math.load(scratch["values"].at[slot], math.matrix)
        x = jnp.where(row < splits - start, x, 0.0)
        if i + buffers < len(items):
            plgpu.commit_smem()
            fetch(i + buffers)
        own = jnp.sum(jnp.where(column == g, weights[start // _TILE], 0.0), axis=1)
        x = x * math.spread(own, full, 0, math.matrix)
        total = x if start == 0 or total is None else total + x
        if start + _TILE >= splits:
            scratch["sums"].at[g][...] = jnp.sum(total, axis=0)
    for g in range(group, heads):
        scratch["sums"].at[g][...] = math.cast(jnp.zeros((dim,), jnp.float32), math.by_column)

    plgpu.commit_smem()
    x = math.load(scratch["sums"], math.flat(heads, dim))
    if together:
        bad = jnp.sum(jnp.where(jnp.abs(x) < jnp.inf, 0.0, 1.0))
        x = x + jnp.where(bad > 0, jnp.nan, 0.0)
    scratch["out"][...] = x.astype(scratch["out"].dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch["out"].at[pl.ds(0, group)], outs[0].at[b, h])
    plgpu.copy_smem_to_gmem(scratch["lse"], outs[1].at[b, h])
    plgpu.wait_smem_to_gmem(0)


def merge(
    shape: Shape, partials: Sequence[jax.Array], dtype: DTypeLike, *, together: bool, interpret: bool
) -> WithLse:
    """Join what :func:`pallas_kernels.gaze_decode.gpu_kernel.attend_in_splits` returns.

    Args:
      shape: that of its kernel.
      partials: its results.
      dtype: of the output.
      together: whether all query heads of a kv head are NaN where one of them is not finite.
      interpret: see :class:`pallas_kernels.spec.GazeSpec`.

    Returns:
      [B, K, G, D] and float32 [B, K, G].
    """
    values, tops, totals = partials
    batch, kv_heads, heads, _, dim = values.shape
    tiles = -(-shape.splits // _TILE)
    buffers = max(min(shape.group * tiles, _BUFFER // (_TILE * dim * 4)), 1)

    def smem(kind: DTypeLike, *sizes: int, **more: Any) -> Any:
        return plgpu.SMEM(sizes, kind, **more)

    out, lse = launch(
        "gaze_join",
        functools.partial(_block, shape, together, Math(interpret)),
        {"values": values, "tops": tops, "totals": totals},
        [
            jax.ShapeDtypeStruct((batch, kv_heads, shape.group, dim), dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, heads), jnp.float32),
        ],
        {"batch": batch, "kv": kv_heads},
        {
            "tops": smem(jnp.float32, tiles * _TILE, heads),
            "totals": smem(jnp.float32, tiles * _TILE, heads),
            "values": smem(jnp.float32, buffers, _TILE, dim, transforms=swizzled(32, jnp.float32)),
            "sums": smem(jnp.float32, heads, dim),
            "out": smem(dtype, heads, dim),
            "lse": smem(jnp.float32, heads),
            "facts": plgpu.Barrier(num_arrivals=2),
            "arrived": plgpu.Barrier(num_barriers=buffers),
        },
        interpret=interpret,
        reduction=4 * dim * 4,
    )
    return out, lse[..., : shape.group]
