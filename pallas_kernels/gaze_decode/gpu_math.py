"""What the Mosaic GPU kernels of gaze_decode share: their arithmetic, and how one is launched.

When a kernel is interpreted, four things are replaced, each in one place: ``Math.dot`` uses ordinary matrix
products instead of the tensor cores, ``Math.scatter`` writes a whole row instead of an element per thread,
layout casts do nothing, and rounding to bfloat16 is forced. All copies, indices, barriers, masks, searches
and the softmax are the ones that run on the chip.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector

Ref = Any  # Pallas refs have no public type
Refs = dict[str, Ref]
Layout = Any  # the types of parameterised and reduced layouts are not public
Operands = dict[str, Any]  # a tree of arrays

ROWS = 64  # rows of a tensor core tile: the query heads of a kv head, padded
DIMS = 64  # D is a multiple of one 128-byte row of bfloat16

# jax 0.11 deprecates the index that jax 0.10 requires.
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_LOAD_ALL: tuple[tuple[()], ...] = ((),) if _INDEX and _INDEX.default is inspect.Parameter.empty else ()


class Math:
    """Operations that differ between the chip and the interpreter."""

    def __init__(self, interpret: bool) -> None:
        self.interpret = interpret
        self.matrix = plgpu.Layout.WGMMA  # [64 n, 8 m]
        self.by_row, self.by_column = self.matrix.reduce(1), self.matrix.reduce(0)

    def copies(self, rows: int, dim: int) -> Layout:
        """The layout in which a plain array of shared memory passes into a swizzled one."""
        return plgpu.Layout.SMEM_GMEM_COPY((rows, dim), jnp.bfloat16, 128)

    def flat(self, *shape: int) -> Layout:
        """The layout of an array that is reduced to a scalar; its size is a multiple of 128."""
        return plgpu.Layout.WG_STRIDED(shape, vec_size=min(int(np.prod(shape)) // 128, 4))

    def cast(self, x: jax.Array, layout: Layout) -> jax.Array:
        """Cast ``x`` to a layout; the interpreter has no layouts."""
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def spread(self, x: jax.Array, shape: tuple[int, ...], axis: int, layout: Layout) -> jax.Array:
        """Broadcast a vector along ``axis`` of a matrix."""
        return self.cast(lax.broadcast_in_dim(x, shape, [axis]), layout)

    def iota(self, shape: tuple[int, ...], axis: int, layout: Layout) -> jax.Array:
        """int32, the index along ``axis``."""
        return self.cast(lax.broadcasted_iota(jnp.int32, shape, axis), layout)

    def load(self, ref: Ref, layout: Layout) -> jax.Array:
        if self.interpret:
            return ref[...]
        return plgpu.load(ref, *_LOAD_ALL, layout=layout, optimized=False)

    def parts(self, x: jax.Array, count: int) -> list[jax.Array]:
        """Split ``x`` into ``count`` bfloat16 arrays whose sum equals it to 8 * count bits."""
        if x.dtype == jnp.bfloat16:
            return [x]
        if x.dtype == jnp.int8:
            return [x.astype(jnp.bfloat16)]
        parts = []
        for left in range(count, 0, -1):
            # XLA, which runs the interpreter, may remove a rounding that is converted back at once.
            rounded = lax.reduce_precision(x, 8, 7) if self.interpret else x
            parts.append(rounded.astype(jnp.bfloat16))
            if left > 1:
                x = x - parts[-1].astype(jnp.float32)
        return parts

    def dot(
        self,
        pairs: Sequence[tuple[Ref, Ref]],
        start: jax.Array | None,
        shape: tuple[int, int],
        *,
        transposed: bool,
    ) -> jax.Array:
        """``start`` plus a @ b (or a @ b.T) of each pair; b is a reference, a may be an array."""
        if self.interpret:
            total = jnp.zeros(shape, jnp.float32) if start is None else start
            dims = (((1,), (1 if transposed else 0,)), ((), ()))
            for a, b in pairs:
                total += lax.dot_general(a[...], b[...], dims, preferred_element_type=jnp.float32)
            return total

        def products(acc: Ref) -> None:
            for a, b in pairs:
                plgpu.wgmma(acc, a, b.transpose((1, 0)) if transposed else b)

        def fresh(acc: Ref) -> jax.Array:
            products(acc)
            return acc[...]

        if start is None:
            return pl.run_scoped(fresh, plgpu.ACC(shape, jnp.float32))
        return pl.run_state(products)(plgpu.ACC.init(start))

    def scatter(self, row: Ref, places: jax.Array, values: jax.Array) -> None:
        """row[places] = values, of int32 matrices; a negative place is left out, the others are distinct."""
        if self.interpret:
            kept = row[...]
            at = jnp.where(places >= 0, places, kept.size).reshape(-1)
            row[...] = kept.at[at].set(values.reshape(-1), mode="drop")
            return

        @plgpu.inline_mgpu(arg_types=(self.matrix, self.matrix, plgpu.RefType()))
        def store(_: Any, places: mgpu.FragmentedArray, values: mgpu.FragmentedArray, row: Any) -> None:
            index, zero = ir.IndexType.get(), mgpu.c(0, ir.IntegerType.get_signless(32))
            for pair in zip(places.registers.flat, values.registers.flat, strict=True):
                for lane in range(ir.VectorType(pair[0].type).shape[0]):
                    static = ir.DenseI64ArrayAttr.get([lane])
                    at, value = (vector.extract(a, dynamic_position=[], static_position=static) for a in pair)
                    with mgpu.when(arith.cmpi(arith.CmpIPredicate.sge, at, zero)):
                        memref.store(value, row, [arith.index_cast(index, at)])

        store(places, values, row)


def pairs(a: Sequence[Ref], b: Ref, count: int) -> list[tuple[Ref, Ref]]:
    """Pairs of parts whose products matter in float32, smallest first."""
    most = max(len(a), count)
    orders = sorted((i + j, i, j) for i in range(len(a)) for j in range(count) if i + j < most)
    return [(a[i], b.at[j]) for _, i, j in reversed(orders)]


def swizzled(columns: int, dtype: Any = jnp.bfloat16) -> tuple[Any, Any]:
    """Shared memory in tiles of 8 rows by ``columns``, at most 128 bytes."""
    # With jax 0.12 mypy takes both classes for abstract, because their protocol has a method without a body.
    tiles = plgpu.TilingTransform((8, columns))  # type: ignore[abstract, unused-ignore]
    width = columns * jnp.dtype(dtype).itemsize
    return tiles, plgpu.SwizzleTransform(width)  # type: ignore[abstract, unused-ignore]


def stage_queries(
    math: Math, source: Ref, target: Ref, parts: int, rows: int, arrived: Ref, plain: Ref
) -> None:
    """Copy [rows, D] from global memory into the first rows of bfloat16 [parts, 64, D], and zeros below."""
    plgpu.copy_gmem_to_smem(source, plain.at[pl.ds(0, rows)], arrived)
    plgpu.barrier_wait(arrived)
    layout = math.copies(*plain.shape)
    x = math.load(plain, layout)
    x = jnp.where(math.iota(x.shape, 0, layout) < rows, x, jnp.zeros((), x.dtype))
    for part, piece in enumerate(math.parts(x, parts)):
        target[part, ...] = piece
    plgpu.commit_smem()


def _interpreter() -> Any:
    """Parameters for interpreting a kernel, with every check on, so that no test passes by luck."""
    # JAX has no public name for it yet, and only tests use it.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    # With a single engine, waiting for one copy would seem to order all those before it.
    return InterpretGPUParams(
        detect_races=True,
        out_of_bounds_reads="raise",
        uninitialized_memory="nan",
        num_tma_threads_per_device=32,
    )


def launch(
    name: str,
    body: Callable[[Any, Sequence[Ref], Refs], None],
    operands: Operands,
    out_type: Sequence[jax.ShapeDtypeStruct],
    grid: Mapping[str, int],
    scratch: Mapping[str, Any],
    *,
    interpret: bool,
    reduction: int = 0,
) -> Sequence[jax.Array]:
    """Run ``body(refs of the operands, refs of the results, scratch)`` in a grid of thread blocks.

    ``name`` is the kernel's in a compiled program; ``reduction`` is the number of bytes of shared memory for
    sums that leave a warp.
    """
    leaves, tree = jax.tree.flatten(operands)

    def call(*refs: Ref, **scratch: Ref) -> None:
        body(jax.tree.unflatten(tree, refs[: len(leaves)]), refs[len(leaves) :], scratch)

    call.__name__ = name
    return plgpu.kernel(
        call,
        out_type=list(out_type),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=dict(scratch),
        # The layouts are written for lane semantics.
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=reduction,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=_interpreter() if interpret else None,
    )(*leaves)
