"""Small modules shared by the decoder, the tower and the projector.

Every parameter names its logical axes; ``gaze_jax.parallel.rules`` maps them to mesh axes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int

from gaze_jax.core.types import AnyArray, Array

Names = tuple[str | None, ...]

PER_LAYER_SCAN: dict[str, Any] = {
    "variable_axes": {"params": 0},
    "split_rngs": {"params": True},
    # True traces every block a second time, to look for outputs that are the same in all layers.
    "check_constancy_invariants": False,
}
"""Arguments of ``nn.scan`` over blocks whose parameters are stacked on a leading axis."""


def logical(init: nn.initializers.Initializer, *names: str | None) -> nn.initializers.Initializer:
    """Attach logical axis names to the parameter that ``init`` creates."""
    return nn.with_logical_partitioning(init, names)


def _matmul(
    x: Float[Array, "*lead M"],
    kernel: Float[Array, "M out"],
    dimensions: object,
    *,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*lead out"]:
    """``lax.dot_general`` of [..., in] and [in, out] as one matrix product over all tokens.

    In the backward pass XLA on CPU is slow to transpose operands with more than two axes: a gated MLP's
    gradient took 1.8 times as long.
    """
    out = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), precision=precision
    )
    return out.reshape(*x.shape[:-1], kernel.shape[1])


ADAPTERS = ("lora_a", "lora_b")
"""Parameters beside a kernel [in, out] whose product is added to it: [in, rank] and [rank, out]."""


class Dense(nn.Dense):
    """``nn.Dense``; if its parameters hold :data:`ADAPTERS`, their product is added to the kernel's."""

    def __call__(self, inputs: Float[Array, "*lead M"]) -> Float[Array, "*lead out"]:
        """[..., M] -> [..., out] in ``dtype``."""
        out = super().__call__(inputs)
        if not self.has_variable("params", ADAPTERS[0]):
            return out
        a, b = (jnp.asarray(self.get_variable("params", name), out.dtype) for name in ADAPTERS)
        inner = _matmul(inputs.astype(out.dtype), a, None, precision=self.precision)
        return out + _matmul(inner, b, None, precision=self.precision)


def dense(
    features: int,
    names: tuple[str, str],
    *,
    use_bias: bool,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    name: str,
    ends_branch: bool = False,
) -> Dense:
    """A linear layer [..., names[0]] -> [..., names[1]] with LeCun-normal weights and zero bias.

    With ``ends_branch``, the last layer of a residual branch starts at zero, so that an untrained block is
    the identity and noise does not swamp its gradient (Zhang et al., "Fixup Initialization", arXiv
    1901.09321).
    """
    init = nn.initializers.zeros_init() if ends_branch else nn.initializers.lecun_normal()
    return Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=logical(init, *names),
        bias_init=logical(nn.initializers.zeros_init(), names[1]),
        dot_general=_matmul,
        name=name,
    )


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32, as Qwen and Llama define it."""

    eps: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*lead M"]) -> Float[Array, "*lead M"]:
        """[..., M] -> [..., M]."""
        weight = self.param(
            "weight", logical(nn.initializers.ones_init(), "norm"), x.shape[-1:], self.param_dtype
        )
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        # Qwen rounds to the activation dtype before it multiplies by the weight.
        return wide.astype(self.dtype) * weight.astype(self.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias over the last axis, in float32.

    Flax's LayerNorm does not run on bfloat16 under strict dtype promotion, and its variance E[x^2] - E[x]^2
    loses precision when the mean is large.
    """

    eps: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*lead M"]) -> Float[Array, "*lead M"]:
        """[..., M] -> [..., M]."""
        shape = x.shape[-1:]
        scale = self.param("scale", logical(nn.initializers.ones_init(), "norm"), shape, self.param_dtype)
        bias = self.param("bias", logical(nn.initializers.zeros_init(), "norm"), shape, self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


def rope_angles(
    positions: Int[AnyArray, "*lead"], head_dim: int, theta: float
) -> tuple[Float32[Array, "*lead {head_dim//2}"], Float32[Array, "*lead {head_dim//2}"]]:
    """Cosines and sines of rotate-half RoPE.

    Args:
      positions: int32 [...] positions.
      head_dim: D.
      theta: base of the frequencies theta ** (-2i / D).

    Returns:
      Two float32 [..., D / 2].
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    # Float32 throughout: bfloat16 rounds position 257 to 256.
    angles = positions[..., None].astype(jnp.float32) * (theta**-exponent)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "*lead heads D"],
    angles: tuple[Float32[Array, "*#lead D//2"], Float32[Array, "*#lead D//2"]],
) -> Float[Array, "*lead heads D"]:
    """Rotate channel i with channel i + D/2: [..., heads, D] by angles [..., D / 2]."""
    cos, sin = (a[..., None, :] for a in angles)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return rotated.astype(x.dtype)
