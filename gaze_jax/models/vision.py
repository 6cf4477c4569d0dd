"""A SigLIP-shaped image tower and the two-layer projector into the decoder's width."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from gaze_jax.core.types import AnyArray, Array
from gaze_jax.models.config import REMAT_POLICIES, Numerics, VisionConfig
from gaze_jax.models.layers import PER_LAYER_SCAN, LayerNorm, dense, logical

QUERY_BLOCK = 256
"""Most queries whose float32 scores exist at once; the tower's attention has no mask, so blocks are equal."""


def _attend(
    q: Float[Array, "B N heads D"], k: Float[Array, "B N heads D"], v: Float[Array, "B N heads D"]
) -> Float[Array, "B N heads D"]:
    """Full attention of [B, N, heads, D], softmax in float32, in blocks of queries."""

    def attend(q: Float[Array, "B T heads D"]) -> Float[Array, "B T heads D"]:
        # jax.nn.dot_product_attention does not run on bfloat16 under strict dtype promotion.
        logits = jnp.einsum("BTHD,BNHD->BHTN", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5).astype(q.dtype)
        out = jnp.einsum("BHTN,BNHD->BHTD", weights, v, preferred_element_type=jnp.float32)
        return jnp.moveaxis(out, 1, 2).astype(q.dtype)

    batch, length = q.shape[:2]
    count = -(-length // QUERY_BLOCK)
    if count == 1:
        return attend(q)
    block = -(-length // count)
    padded = jnp.pad(q, ((0, 0), (0, count * block - length), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(batch, count, block, *q.shape[2:]), 1, 0)
    out = jax.lax.map(jax.checkpoint(attend), blocks)
    return jnp.moveaxis(out, 0, 1).reshape(batch, count * block, *q.shape[2:])[:, :length]


class EncoderBlock(nn.Module):
    """Pre-LayerNorm self-attention over all patches of one image, and an MLP with tanh GELU."""

    config: VisionConfig
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "B N M"]) -> Float[Array, "B N M"]:
        """[B, N, M] -> [B, N, M]."""
        c, kinds = self.config, self.numerics.kinds
        x = nn.with_logical_constraint(x, ("images", None, "width"))

        def project(x: Float[Array, "B N M"], name: str) -> Float[Array, "B N M"]:
            return dense(c.width, ("embed", "heads"), use_bias=True, name=name, **kinds)(x)

        h = LayerNorm(c.norm_eps, **kinds, name="layer_norm1")(x)
        q, k, v = (
            project(h, name).reshape(*h.shape[:2], c.num_heads, c.width // c.num_heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        h = _attend(q, k, v).reshape(x.shape)
        x = x + dense(c.width, ("heads", "embed"), use_bias=True, ends_branch=True, name="out_proj", **kinds)(
            h
        )
        h = LayerNorm(c.norm_eps, **kinds, name="layer_norm2")(x)
        h = dense(c.mlp_dim, ("embed", "mlp"), use_bias=True, name="fc1", **kinds)(h)
        h = nn.gelu(h, approximate=True)
        return x + dense(c.width, ("mlp", "embed"), use_bias=True, ends_branch=True, name="fc2", **kinds)(h)


class VisionTower(nn.Module):
    """Patches, learned positions, encoder blocks."""

    config: VisionConfig
    numerics: Numerics = Numerics()

    @nn.compact
    def __call__(self, images: Float[AnyArray, "B height width 3"]) -> Float[Array, "B N M"]:
        """Encode images.

        Args:
          images: float32 [B, image_size, image_size, 3], normalised to [-1, 1].

        Returns:
          [B, grid * grid, M] features in raster order.
        """
        c, kinds = self.config, self.numerics.kinds
        dtype = kinds["dtype"]
        x = nn.Conv(
            c.width,
            (c.patch_size, c.patch_size),
            strides=(c.patch_size, c.patch_size),
            padding="VALID",  # a remainder at the right and bottom is dropped
            kernel_init=logical(nn.initializers.lecun_normal(), None, None, None, "embed"),
            bias_init=logical(nn.initializers.zeros_init(), "norm"),
            name="patch_embedding",
            **kinds,
        )(images.astype(dtype))
        x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], c.width)
        table = self.param(
            "position_embedding",
            logical(nn.initializers.normal(c.width**-0.5), None, "embed"),
            (c.grid**2, c.width),
            kinds["param_dtype"],
        )
        x = x + table.astype(dtype)[None]

        def body(
            block: EncoderBlock, x: Float[Array, "B N M"], _: None
        ) -> tuple[Float[Array, "B N M"], None]:
            return block(x), None

        if self.numerics.remat:
            policy = REMAT_POLICIES[self.numerics.remat_policy]
            body = nn.remat(body, prevent_cse=False, policy=policy)
        scan = nn.scan(body, length=c.depth, metadata_params={nn.PARTITION_NAME: "layers"}, **PER_LAYER_SCAN)
        x, _ = scan(EncoderBlock(c, self.numerics, name="layers"), x, None)
        if c.post_norm:
            x = LayerNorm(c.norm_eps, **kinds, name="post_layernorm")(x)
        return x


class Projector(nn.Module):
    """Two linear layers to ``width`` channels with the exact GELU between them (``mlp2x_gelu``)."""

    width: int
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "*lead width"]) -> Float[Array, "*lead M"]:
        """[..., vision width] -> [..., M]."""
        width, kinds = self.width, self.numerics.kinds
        x = dense(width, ("embed", "mlp"), use_bias=True, name="linear_1", **kinds)(x)
        return dense(width, ("mlp", "embed"), use_bias=True, name="linear_2", **kinds)(
            nn.gelu(x, approximate=False)
        )
