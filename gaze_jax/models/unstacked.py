"""The decoder's kernels as an array per layer, as a CPU wants to read them.

A token that is decoded reads every parameter once, so what counts is how often they are moved. On CPUs XLA
copies a layer out of a stacked kernel before it multiplies: three times the traffic. And it packs a kernel
that is a product's right side, even for a handful of rows, but not a left side that is [out, in]. So the
layer index picks a branch, each with an array of its own, which stands on the left. Values are those of the
stacked form up to rounding. Prefill reads the same arrays, from the right side where it has many rows.

Accelerators want the stacked form: there a branch costs a synchronisation and a slice nothing.
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

# From so many rows on packing a kernel costs little, and turning the product around more.
_MANY = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnstackedKernel:
    """Kernels of one linear layer: an array [out, in] for each block, or one that is no block's."""

    layers: tuple[Float[Array, "out in"], ...]


@dataclasses.dataclass(frozen=True)
class _At:
    """The kernel of one block, in the place of an array among its parameters."""

    kernels: UnstackedKernel
    layer: Int[Array, ""]


def split_layers(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Take the kernels of a model's decoder apart.

    Args:
      params: of an :class:`gaze_jax.models.MLLM`, its blocks stacked.

    Returns:
      Parameters for the same model and methods, each kernel of the blocks and of an untied head an
      :class:`UnstackedKernel`; all else is shared with ``params``. Both are in memory until the caller
      drops one.
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
    """Whether this is what :func:`split_layers` makes of a kernel."""
    return isinstance(leaf, UnstackedKernel)


def is_split(blocks: PyTree) -> bool:
    """Whether the parameters of the blocks come from :func:`split_layers`; None is an untold yet tree."""
    return any(map(is_unstacked, jax.tree.leaves(blocks, is_leaf=is_unstacked)))


def product(
    kernel: Float[Array, "out in"],
    x: Float[Array, "*lead in"],
    *,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "*lead out"]:
    """``x @ kernel.T`` of [out, in] and [..., in], where the kernel is multiplied as it lies in memory."""
    multiply = functools.partial(jax.lax.dot_general, preferred_element_type=preferred_element_type)
    if math.prod(x.shape[:-1]) >= _MANY:
        return multiply(x, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    out = multiply(kernel, x.reshape(-1, x.shape[-1]), (((1,), (1,)), ((), ())))
    # Without the barrier XLA turns the product around, and the kernel is its right side again.
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
      block: one without parameters.
      blocks: the parameters of all, from :func:`split_layers`.
      body: (block, carry, inputs of this layer) to (carry, out).
      carry: what the first is given.
      inputs: arrays with a leading layer axis.

    Returns:
      The last carry, and the outs, stacked.
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
    """A linear layer whose kernel is an :class:`_At`; any other method as it is."""
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
