"""The Mosaic GPU kernel that scores regions: a block per row, kv head and 64 regions.

The last 64 regions are moved back to end at R, so that nothing is read behind the descriptors. So scores are
kept by *place*: the places of the last tile name regions of which the tile before names some too.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gaze_decode.gpu_math import (
    DIMS,
    ROWS,
    Math,
    Ref,
    Refs,
    launch,
    pairs,
    stage_queries,
    swizzled,
)

TILE = 64  # regions of a block of scores


def width(regions: int) -> int:
    """W, the columns of the matrix in which places are counted; a tile of 64 x W places."""
    return next((w for w in (16, 32) if regions <= 64 * w), 64)


def places(regions: int) -> int:
    """Number of places of R regions, a multiple of 64 * W."""
    tile = 64 * width(regions)
    return -(-regions // tile) * tile


def moved(regions: int) -> int:
    """By how much the last tile of scores is moved back."""
    return -regions % TILE if regions > TILE else 0


def by_region(scores: jax.Array, regions: int) -> jax.Array:
    """float32 [..., places] to [..., R]."""
    shift = moved(regions)
    own = regions + shift - TILE if shift else regions
    return jnp.concatenate([scores[..., :own], scores[..., own + shift : regions + shift]], axis=-1)


def _scores_block(
    group: int,
    shared: bool,
    parts: tuple[int, int],
    math: Math,
    refs: Refs,
    outs: Sequence[Ref],
    scratch: Refs,
) -> None:
    """One thread block: the scores of 64 regions, for all query heads of a kv head."""
    b, h, t = (lax.axis_index(name) for name in ("batch", "kv", "tile"))
    regions, total = refs["descriptors"].shape[1:]
    wide = scratch["q"].shape[-1]
    at = (refs["layer"][0] * lax.axis_size("batch") + b) * lax.axis_size("kv") + h
    start = jnp.minimum(t * TILE, regions - TILE)
    logits = None
    for column in range(0, total, wide):
        columns = pl.ds(column, wide)
        sides = [
            ("q", refs["features"].at[b, h, :, columns], parts[0], group),
            ("d", refs["descriptors"].at[at, pl.ds(start, TILE), columns], parts[1], TILE),
        ]
        for name, source, count, rows in sides:
            stage = functools.partial(
                stage_queries, math, source, scratch[name], count, rows, scratch["arrived"]
            )
            kind = refs["features" if name == "q" else "descriptors"].dtype
            pl.run_scoped(stage, plgpu.SMEM((ROWS, wide), kind))
        queries = [scratch["q"].at[i] for i in range(parts[0])]
        products = pairs(queries, scratch["d"], parts[1])
        logits = math.dot(products, logits, (ROWS, TILE), transposed=True)

    assert logits is not None, "E is at least 64"
    place = pl.ds(t * TILE, TILE)

    def write_sum(smem: Ref) -> None:
        row = math.iota(logits.shape, 0, math.matrix)
        smem[...] = jnp.sum(jnp.where(row < group, logits, 0.0), axis=0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, outs[0].at[b, h, 0, place])
        plgpu.wait_smem_to_gmem(0)

    def write(smem: Ref) -> None:
        smem[...] = logits
        plgpu.commit_smem()
        lists = outs[0].shape[2]
        plgpu.copy_smem_to_gmem(smem.at[pl.ds(0, lists)], outs[0].at[b, h, :, place])
        plgpu.wait_smem_to_gmem(0)

    if shared:
        pl.run_scoped(write_sum, plgpu.SMEM((TILE,), jnp.float32))
    else:
        pl.run_scoped(write, plgpu.SMEM((ROWS, TILE), jnp.float32, transforms=swizzled(32, jnp.float32)))


def scores(
    features: jax.Array,
    descriptors: jax.Array,
    layer: jax.Array,
    parts: tuple[int, int],
    *,
    shared: bool,
    interpret: bool,
) -> jax.Array:
    """The scores of every region, by place.

    Args:
      features: [B, K, G, E], E a multiple of 64.
      descriptors: [L * B * K, R, E] with R at least 64.
      layer: int32 [1].
      parts: number of bfloat16 arrays whose sum the features and the descriptors are.
      shared: add the scores of a kv head's query heads.
      interpret: see :class:`pallas_kernels.spec.GazeSpec`.

    Returns:
      float32 [B, K, lists, places]: 1 list, or G rounded up to a multiple of 8. Only G lists, and only the
      places of tiles of 64 up to R, hold scores; the others hold anything.
    """
    batch, kv_heads, group, total = features.shape
    regions = descriptors.shape[1]
    wide = 2 * DIMS if total % (2 * DIMS) == 0 else DIMS
    lists = 1 if shared else -(-group // 8) * 8
    scratch = {
        name: plgpu.SMEM((count, ROWS, wide), jnp.bfloat16, transforms=swizzled(DIMS))
        for name, count in zip("qd", parts, strict=True)
    }
    (found,) = launch(
        "gaze_scores",
        functools.partial(_scores_block, group, shared, parts, Math(interpret)),
        {"features": features, "descriptors": descriptors, "layer": layer},
        [jax.ShapeDtypeStruct((batch, kv_heads, lists, places(regions)), jnp.float32)],
        {"batch": batch, "kv": kv_heads, "tile": -(-regions // TILE)},
        scratch | {"arrived": plgpu.Barrier()},
        interpret=interpret,
        reduction=4 * TILE * 4,
    )
    return found
