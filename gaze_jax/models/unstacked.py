"""The decoder's kernels as one array per layer, for fast decoding on CPUs.

A decoding step reads every parameter once, so memory traffic decides its speed. On CPUs XLA copies a layer
out of a stacked kernel before it multiplies, which is three times the traffic. It also packs a kernel that
is the right operand of a product, even for a few rows, but not a left operand [out, in]. So the layer index
selects a branch, each branch has its own array, and that array is the left operand. Values equal those of
the stacked form up to rounding. Prefill reads the same arrays, as the right operand if it has many rows.

Accelerators use the stacked form: there a branch costs a synchronisation and a slice costs nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int, PyTree, Shaped

from gaze_jax.core.types import Array

Module = TypeVar("Module", bound=nn.Module)
Carry = TypeVar("Carry")
Inputs = TypeVar("Inputs")
Out = TypeVar("Out")

# With at least this many rows, packing a kernel costs less than transposing the product.
_MANY = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnstackedKernel:
    """Kernels of one linear layer: an array [out, in] per block, or a single one outside the blocks."""

    layers: tuple[Float[Array, "out in"], ...]


@dataclasses.dataclass(frozen=True)
class _At:
    """The kernel of one block; replaces the array in the block's parameters."""

    kernels: UnstackedKernel
    layer: Int[Array, ""]


def split_layers(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Unstack the kernels of a model's decoder.

    Args:
      params: parameters of an :class:`gaze_jax.models.MLLM`, its blocks stacked.

    Returns:
      Parameters for the same model and methods. Each kernel of the blocks and of an untied head is an
      :class:`UnstackedKernel`; everything else is shared with ``params``. Both forms are in memory until the
      caller drops one.
    """
    decoder = dict(params["decoder"])
    decoder["layers"] = jax.tree_util.tree_map_with_path(_split, decoder["layers"])
    if "lm_head" in decoder:
        decoder["lm_head"] = {"kernel": UnstackedKernel((jnp.asarray(decoder["lm_head"]["kernel"]).T,))}
    return {**params, "decoder": decoder}


def _split(
    path: tuple[jax.tree_util.DictKey, ...], leaf: Shaped[Array, "..."]
) -> Shaped[Array, "..."] | UnstackedKernel:
    if path[-1].key != "kernel":
        return leaf
    return UnstackedKernel(jax.jit(lambda a: tuple(a[i].T for i in range(a.shape[0])))(leaf))


def is_unstacked(leaf: object) -> TypeGuard[UnstackedKernel]:
    """Whether ``leaf`` is a kernel made by :func:`split_layers`."""
    return isinstance(leaf, UnstackedKernel)


def is_split(blocks: PyTree) -> bool:
    """Whether the blocks' parameters come from :func:`split_layers`; False for None, before they exist."""
    return any(map(is_unstacked, jax.tree.leaves(blocks, is_leaf=is_unstacked)))


def product(
    kernel: Float[Array, "out in"],
    x: Float[Array, "*lead in"],
    *,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "*lead out"]:
    """``x @ kernel.T`` of [out, in] and [..., in], without copying or packing the kernel."""
    multiply = functools.partial(jax.lax.dot_general, preferred_element_type=preferred_element_type)
    if math.prod(x.shape[:-1]) >= _MANY:
        return multiply(x, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    out = multiply(kernel, x.reshape(-1, x.shape[-1]), (((1,), (1,)), ((), ())))
    # Without the barrier XLA transposes the product, which makes the kernel its right operand again.
    return jax.lax.optimization_barrier(out).T.reshape(*x.shape[:-1], kernel.shape[0])


def scan(
    block: Module,
    blocks: PyTree,
    body: Callable[[Module, Carry, Inputs], tuple[Carry, Out]],
    carry: Carry,
    inputs: Inputs,
) -> tuple[Carry, Out]:
    """``nn.scan`` of ``body`` over split parameters.

    Args:
      block: a block without parameters.
      blocks: parameters of all blocks, from :func:`split_layers`.
      body: maps (block, carry, inputs of this layer) to (carry, out).
      carry: initial carry.
      inputs: arrays with a leading layer axis.

    Returns:
      The final carry, and the stacked outputs.
    """
    stacked = jax.tree.map(lambda leaf: None if is_unstacked(leaf) else leaf, blocks, is_leaf=is_unstacked)

    def step(carry: Carry, here: tuple[Int[Array, ""], PyTree, Inputs]) -> tuple[Carry, Out]:
        layer, leaves, inputs = here
        params = jax.tree.map(
            lambda leaf, own: _At(leaf, layer) if is_unstacked(leaf) else own,
            blocks,
            leaves,
            is_leaf=is_unstacked,
        )
        with nn.intercept_methods(_read):
            return body(block.bind({"params": params}), carry, inputs)

    depth = jax.tree.leaves(stacked)[0].shape[0]
    return jax.lax.scan(step, carry, (jnp.arange(depth, dtype=jnp.int32), stacked, inputs))


def _read(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Method interceptor: run linear layers on their :class:`_At` kernel, call anything else unchanged."""
    module = context.module
    if not isinstance(module, nn.Dense) or context.method_name != "__call__":
        return call(*args, **kwargs)
    kernel: _At = module.get_variable("params", "kernel")
    dtype = module.dtype

    def branch(own: Array) -> Callable[[Array], Array]:
        return lambda x: product(own.astype(dtype), x)

    (x,) = args
    out = jax.lax.switch(kernel.layer, [branch(own) for own in kernel.kernels.layers], x.astype(dtype))
    return out + module.get_variable("params", "bias").astype(dtype) if module.use_bias else out
