"""One block of the decoder: pre-norm attention and MLP."""

from collections.abc import Callable
from typing import TypeVar

import flax.linen as nn
from jaxtyping import Float, Float32, Int

from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.types import Array, NamedArrays
from gaze_jax.models.attention import AttentionMetadata, Past, gaze_attention
from gaze_jax.models.cache import Cache
from gaze_jax.models.config import MLLMConfig
from gaze_jax.models.decode import DecodeMasks, DecodePosition, append_token, decode_attention
from gaze_jax.models.layers import RMSNorm, apply_rope, dense

Angles = tuple[Float32[Array, "#B N half"], Float32[Array, "#B N half"]]
Out = TypeVar("Out")

Attend = Callable[
    [Float[Array, "B N H D"], Float[Array, "B N K D"], Float[Array, "B N K D"]],
    tuple[Float[Array, "B N H D"], Out],
]
"""Attention between the projections of a block, and whatever else it returns."""


class Attention(nn.Module):
    """Projections around the attention; the attention itself is a function."""

    config: MLLMConfig

    def setup(self) -> None:
        c, kinds = self.config.decoder, self.config.numerics.kinds
        heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q_proj = dense(heads, ("embed", "heads"), use_bias=c.qkv_bias, name="q_proj", **kinds)
        self.k_proj = dense(kv, ("embed", "kv_heads"), use_bias=c.qkv_bias, name="k_proj", **kinds)
        self.v_proj = dense(kv, ("embed", "kv_heads"), use_bias=c.qkv_bias, name="v_proj", **kinds)
        self.o_proj = dense(
            c.width, ("heads", "embed"), use_bias=False, ends_branch=True, name="o_proj", **kinds
        )
        if c.qk_norm:
            self.q_norm = RMSNorm(c.norm_eps, **kinds)
            self.k_norm = RMSNorm(c.norm_eps, **kinds)

    def qkv(
        self, x: Float[Array, "B N M"], angles: Angles
    ) -> tuple[Float[Array, "B N H D"], Float[Array, "B N K D"], Float[Array, "B N K D"]]:
        """[B, N, M] to post-RoPE queries [B, N, H, D] and keys and values [B, N, K, D]."""
        c = self.config.decoder

        def heads(a: Float[Array, "B N width"]) -> Float[Array, "B N heads D"]:
            return a.reshape(*a.shape[:-1], -1, c.head_dim)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, angles), apply_rope(k, angles), v

    def merge(self, heads: Float[Array, "B N H D"]) -> Float[Array, "B N M"]:
        """[B, N, H, D] to [B, N, M]."""
        return self.o_proj(heads.reshape(*heads.shape[:-2], heads.shape[-2] * heads.shape[-1]))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: MLLMConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N M"]) -> Float[Array, "B N M"]:
        """[B, N, M] -> [B, N, M]."""
        c, kinds = self.config.decoder, self.config.numerics.kinds
        gate = dense(c.mlp_dim, ("embed", "mlp"), use_bias=False, name="gate_proj", **kinds)(x)
        up = dense(c.mlp_dim, ("embed", "mlp"), use_bias=False, name="up_proj", **kinds)(x)
        down = dense(c.width, ("mlp", "embed"), use_bias=False, ends_branch=True, name="down_proj", **kinds)
        return down(nn.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm attention and MLP, with a method each for forward, initialisation and decoding."""

    config: MLLMConfig

    def setup(self) -> None:
        eps, kinds = self.config.decoder.norm_eps, self.config.numerics.kinds
        self.input_norm = RMSNorm(eps, **kinds)
        self.self_attn = Attention(self.config)
        self.post_attention_norm = RMSNorm(eps, **kinds)
        self.mlp = GatedMLP(self.config)

    def around(
        self,
        x: Float[Array, "B N M"],
        angles: Angles,
        attend: Attend[Out],
    ) -> tuple[Float[Array, "B N M"], Out]:
        """[B, N, M] -> [B, N, M] around any attention.

        Args:
          x: [B, N, M].
          angles: of RoPE.
          attend: takes post-RoPE queries [B, N, H, D] and keys and values [B, N, K, D]; returns [B, N, H, D]
            and anything, which is returned too.
        """
        q, k, v = self.self_attn.qkv(self.input_norm(x), angles)
        heads, out = attend(q, k, v)
        x = x + self.self_attn.merge(heads)
        return x + self.mlp(self.post_attention_norm(x)), out

    def forward(
        self,
        x: Float[Array, "B N M"],
        angles: Angles,
        metadata: AttentionMetadata,
        selection: Selection,
        spec: SelectionSpec,
        *,
        layer: Int[Array, ""],
        past: Past | None = None,
    ) -> tuple[Float[Array, "B N M"], NamedArrays]:
        """All tokens at once, [B, N, M]; see :func:`gaze_jax.models.attention.gaze_attention`."""
        x = nn.with_logical_constraint(x, ("batch", "tokens", "width"))
        gaze = self.config.gaze

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, NamedArrays]:
            return gaze_attention(q, k, v, metadata, selection, spec, gaze=gaze, layer=layer, past=past)

        return self.around(x, angles, attend)

    def init_forward(self, x: Float[Array, "B N M"], angles: Angles) -> Float[Array, "B N M"]:
        """[B, N, M] -> [B, N, M] without attention, which has no parameters."""
        return self.around(x, angles, lambda q, k, v: (q, None))[0]

    def decode(
        self,
        x: Float[Array, "B 1 M"],
        cache: Cache,
        angles: Angles,
        position: DecodePosition,
        masks: DecodeMasks,
        selection: Selection,
        spec: SelectionSpec,
        *,
        layer: Int[Array, ""],
    ) -> tuple[tuple[Float[Array, "B 1 M"], Cache], NamedArrays]:
        """One token per row, [B, 1, M]; see :func:`gaze_jax.models.decode.decode_attention`."""
        gaze = self.config.gaze

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Cache, NamedArrays]]:
            new_cache = append_token(cache, k, v, layer, position.write_index)
            heads, out = decode_attention(q, new_cache, masks, selection, spec, gaze=gaze, layer=layer)
            return heads, (new_cache, out)

        x, (new_cache, out) = self.around(x, angles, attend)
        return (x, new_cache), out
