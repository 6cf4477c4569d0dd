"""LoRA: low-rank adapters beside the decoder's kernels (Hu et al., arXiv 2106.09685).

A kernel W [in, out] stays as it is, and x W + alpha / rank * (x A) B takes the place of x W. A run keeps its
adapters as one more part of its parameters; what reads a run gets kernels with them added, an ordinary model.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from gaze_jax.models import MLLMConfig, parameters
from gaze_jax.models.layers import ADAPTERS
from gaze_jax.models.parameters import with_shardings
from gaze_jax.parallel import rules

Array = jax.Array

PART = "lora"
"""Part of a run's parameters that holds the adapters: {"self_attn": {"q_proj": {"a", "b"}}}, for example."""

MODULES = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
"""Linear layers of a block of the decoder, and where they are in it."""

_SALT = 1
"""Folded into the key of a run's seed, which the model's own new parameters come from."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, which are trained in place of the decoder.

    Attributes:
      rank: columns of A and rows of B; 0 trains the decoder itself.
      alpha: the product of A and B is multiplied by ``alpha / rank``.
      modules: the linear layers of each block that get an adapter, of :data:`MODULES`.
    """

    rank: int = 0
    alpha: float = 16.0
    modules: tuple[str, ...] = tuple(MODULES)

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank={self.rank} must not be negative.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha={self.alpha} must be positive.")
        if unknown := sorted(set(self.modules) - set(MODULES)):
            raise ValueError(f"lora.modules names {', '.join(unknown)}; known are {', '.join(MODULES)}.")
        if not self.modules:
            raise ValueError("lora.modules is empty; name linear layers, or set lora.rank to 0.")

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied by."""
        return self.alpha / self.rank


def _of_kernels(config: LoraConfig, params: PyTree, make: Callable[[str, Any], PyTree]) -> PyTree:
    """``make(name, kernel)`` for the kernel of each adapter."""
    layers, out = params["decoder"]["layers"], dict[str, dict[str, PyTree]]()
    for name in sorted(config.modules):
        out.setdefault(MODULES[name], {})[name] = make(name, layers[MODULES[name]][name]["kernel"])
    return out


def boxed_params(model: MLLMConfig, config: LoraConfig) -> PyTree:
    """:func:`gaze_jax.models.parameters.boxed_params` of a model and its adapters, if it has any.

    A kernel [L, in, out] has A [L, in, rank] and B [L, rank, out], split over the mesh like its axes.
    """
    boxed = parameters.boxed_params(model)
    if not config.rank:
        return boxed

    def pair(_: str, kernel: nn.LogicallyPartitioned) -> dict[str, nn.LogicallyPartitioned]:
        (layers, width, out), (first, second, third) = kernel.value.shape, kernel.names

        def box(shape: tuple[int, ...], names: tuple[str | None, ...]) -> nn.LogicallyPartitioned:
            return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, kernel.value.dtype), names)

        return {
            "a": box((layers, width, config.rank), (first, second, None)),
            "b": box((layers, config.rank, out), (first, None, third)),
        }

    return boxed | {PART: _of_kernels(config, boxed, pair)}


def abstract_params(model: MLLMConfig, config: LoraConfig, mesh: Mesh) -> PyTree:
    """Shapes, dtypes and shardings of :func:`boxed_params`.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    boxed = boxed_params(model, config)
    return with_shardings(nn.meta.unbox(boxed), rules.param_shardings(mesh, boxed))


def with_new(params: PyTree, config: LoraConfig, seed: int) -> PyTree:
    """The parameters of a model, and adapters that do not change it yet.

    A is uniform within 1 / sqrt(in), as in PEFT, and B is 0, both in the dtype of their kernel.
    """
    if not config.rank:
        return params
    key = jax.random.fold_in(jax.random.key(seed), _SALT)
    keys = dict(zip(MODULES, jax.random.split(key, len(MODULES)), strict=True))

    def pair(name: str, kernel: Array) -> dict[str, Array]:
        layers, width, out = kernel.shape
        a = jax.random.uniform(keys[name], (layers, width, config.rank), jnp.float32, -1.0, 1.0)
        zeros = jnp.zeros((layers, config.rank, out), kernel.dtype)
        return {"a": (a * jnp.float32(width**-0.5)).astype(kernel.dtype), "b": zeros}

    return params | {PART: _of_kernels(config, params, pair)}


def joined(params: Mapping[str, PyTree], config: LoraConfig) -> dict[str, PyTree]:
    """What a model is applied with: each adapter beside its kernel, where :class:`Dense` adds it."""
    if PART not in params:
        return dict(params)

    def beside(group: str, name: str, tree: PyTree) -> PyTree:
        pair = params[PART].get(group, {}).get(name)
        if pair is None:
            return tree
        b = (pair["b"].astype(jnp.float32) * jnp.float32(config.scale)).astype(pair["b"].dtype)
        return tree | dict(zip(ADAPTERS, (pair["a"], b), strict=True))

    return _with_layers(params, beside)


def without(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """What :func:`joined` returns, without the adapters."""

    def plain(group: str, name: str, tree: PyTree) -> PyTree:
        if group not in MODULES.values():
            return tree
        return {leaf: value for leaf, value in tree.items() if leaf not in ADAPTERS}

    return _with_layers(params, plain)


def merged(params: Mapping[str, PyTree], config: LoraConfig) -> dict[str, PyTree]:
    """The ordinary model: kernels [L, in, out] plus ``scale`` times A B, added in float32, in their dtype.

    The kernels of ``params`` that have an adapter are donated.
    """
    if PART not in params:
        return dict(params)

    def add(kernel: Array, a: Array, b: Array) -> Array:
        a, b, wide = (leaf.astype(jnp.float32) for leaf in (a, b, kernel))
        product = jnp.einsum("lir,lro->lio", a, b, precision=jax.lax.Precision.HIGHEST)
        return (wide + jnp.float32(config.scale) * product).astype(kernel.dtype)

    def plain(group: str, name: str, tree: PyTree) -> PyTree:
        pair = params[PART].get(group, {}).get(name)
        if pair is None:
            return tree
        kernel = tree["kernel"]
        run = jax.jit(add, out_shardings=kernel.sharding, donate_argnums=0)
        return tree | {"kernel": run(kernel, pair["a"], pair["b"])}

    return _with_layers(params, plain)


def _with_layers(
    params: Mapping[str, PyTree], change: Callable[[str, str, PyTree], PyTree]
) -> dict[str, PyTree]:
    """``params`` without the adapters' part, and with ``change(group, name, tree)`` of the linear layers."""
    layers = dict(params["decoder"]["layers"])
    for group in dict.fromkeys(MODULES.values()):
        layers[group] = {name: change(group, name, tree) for name, tree in layers[group].items()}
    decoder = {**params["decoder"], "layers": layers}
    return {part: tree for part, tree in params.items() if part != PART} | {"decoder": decoder}
