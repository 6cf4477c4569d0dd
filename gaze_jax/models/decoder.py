"""A Qwen-shaped decoder whose attention over visual tokens selects, then attends.

Axis letters as in :mod:`gaze_jax.core.streams`; N = R * P + S tokens of both streams, visual first.
Training, prefill and cached decoding run the same modules. Dense attention is ``Selection()``.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.types import AnyArray, Array, ArrayTree, NamedArrays
from gaze_jax.models import context, ops, unstacked
from gaze_jax.models.attention import AttentionMetadata
from gaze_jax.models.block import Block
from gaze_jax.models.cache import Cache, packed_layer, past_of
from gaze_jax.models.config import DTYPES, REMAT_POLICIES, MLLMConfig
from gaze_jax.models.decode import DecodePosition, decode_masks, with_step
from gaze_jax.models.layers import PER_LAYER_SCAN, RMSNorm, dense, logical, rope_angles

Carry = TypeVar("Carry")
Inputs = TypeVar("Inputs")
Out = TypeVar("Out")

Layer = tuple[Int[Array, ""], Selection]
"""Index of a layer and what its queries select."""


class Decoder(nn.Module):
    """Embedding, L scanned blocks, final norm and head."""

    config: MLLMConfig

    def setup(self) -> None:
        c, kinds = self.config.decoder, self.config.numerics.kinds
        init = logical(nn.initializers.normal(c.width**-0.5), "vocab", "embed")
        self.embedding = self.param("embedding", init, (c.vocab_size, c.width), kinds["param_dtype"])
        self.layers = Block(self.config)
        self.norm = RMSNorm(c.norm_eps, **kinds)
        if not c.tie_embeddings:
            self.lm_head = dense(c.vocab_size, ("embed", "vocab"), use_bias=False, name="lm_head", **kinds)

    def embed(self, tokens: Int[AnyArray, "*lead"]) -> Float[Array, "*lead M"]:
        """int32 [...] token ids to [..., M]."""
        return ops.embed(self.embedding, tokens, DTYPES[self.config.dtype])

    def logits(self, hidden: Float[Array, "*lead M"]) -> Float32[Array, "*lead V"]:
        """[..., M] to float32 [..., V]."""
        split = unstacked.is_split(self.get_variable("params", "layers"))
        if not self.config.decoder.tie_embeddings:
            if split:
                kernel: Float[Array, "V M"] = self.get_variable("params", "lm_head")["kernel"].layers[0]
                return unstacked.product(kernel.astype(hidden.dtype), hidden).astype(jnp.float32)
            return self.lm_head(hidden).astype(jnp.float32)
        table = self.embedding.astype(hidden.dtype)
        if split:
            return unstacked.product(table, hidden, preferred_element_type=jnp.float32)
        return jnp.einsum("...M,VM->...V", hidden, table, preferred_element_type=jnp.float32)

    @property
    def head(self) -> Float[Array, "V M"]:
        """The table of which :meth:`logits` are the products; not of unstacked parameters."""
        if self.config.decoder.tie_embeddings:
            return self.embedding
        return jnp.swapaxes(self.get_variable("params", "lm_head")["kernel"], 0, 1)

    def _over_layers(
        self,
        body: Callable[[Block, Carry, Inputs], tuple[Carry, Out]],
        carry: Carry,
        inputs: Inputs,
        *,
        remat: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> tuple[Carry, Out]:
        """Scan ``body(block, carry, inputs)`` over the blocks, whose parameters may be unstacked."""
        blocks: ArrayTree = self.get_variable("params", "layers")
        if unstacked.is_split(blocks):
            return unstacked.scan(Block(self.config, parent=None), blocks, body, carry, inputs)
        if remat:
            policy = REMAT_POLICIES[self.config.remat_policy]
            body = nn.remat(body, prevent_cse=False, policy=policy)
        scan = nn.scan(
            body, length=self.config.decoder.depth, metadata_params=metadata or {}, **PER_LAYER_SCAN
        )
        return scan(self.layers, carry, inputs)

    def init_forward(self, x: Float[Array, "B N M"], positions: Int[Array, "B N"]) -> Float32[Array, "B N V"]:
        """:meth:`forward` without attention, to create parameters; it traces in a third of the time."""
        angles = rope_angles(positions, self.config.decoder.head_dim, self.config.decoder.rope_theta)

        def body(block: Block, x: Float[Array, "B N M"], _: None) -> tuple[Float[Array, "B N M"], None]:
            return block.init_forward(x, angles), None

        scan = nn.scan(
            body,
            length=self.config.decoder.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
            **PER_LAYER_SCAN,
        )
        x, _ = scan(self.layers, x, None)
        return self.logits(self.norm(x))

    def forward(
        self,
        x: Float[Array, "B N M"],
        positions: Int[Array, "B N"],
        metadata: AttentionMetadata,
        selection: Selection,
        spec: SelectionSpec,
        *,
        keep_kv: bool = False,
        keep_hidden: bool = False,
        past: Cache | None = None,
    ) -> tuple[Float[Array, "B N M"], dict[str, ArrayTree]]:
        """Training or prefill over both streams.

        Args:
          x: [B, N, M] embedded tokens.
          positions: int32 [B, N] RoPE positions.
          metadata: attention metadata of the batch.
          selection: what text-stream queries select; T is S.
          spec: static settings, which say what else is returned: scores and selections, or entries.
          keep_kv: return keys, values and descriptors.
          keep_hidden: return "hidden" [L, B, N, M], the residual stream after each block.
          past: the cache of earlier tokens, which the new tokens continue; ``metadata`` includes their order.

        Returns:
          [B, N, M] after the final norm, and a dict of arrays stacked over layers.
        """
        selection.check(spec.routing)
        c = self.config.decoder
        angles = rope_angles(positions, c.head_dim, c.rope_theta)
        layers = jnp.arange(c.depth, dtype=jnp.int32)

        def body(
            block: Block, x: Float[Array, "B N M"], inputs: Layer
        ) -> tuple[Float[Array, "B N M"], dict[str, ArrayTree]]:
            layer, chosen = inputs
            before = None if past is None else past_of(past, layer, self.config.gaze, c.head_dim)
            x, out = block.forward(x, angles, metadata, chosen, spec, layer=layer, past=before)
            kept: dict[str, ArrayTree] = {
                name: out.pop(name) for name in ("scores", "selected", "entries") if name in out
            }
            if keep_kv:
                kept |= out if past is not None else packed_layer(out, self.config.gaze)
            return x, kept | ({"hidden": x} if keep_hidden else {})

        inputs = (layers, selection.over_layers(c.depth))
        x, out = self._over_layers(
            body, x, inputs, remat=self.config.remat, metadata={nn.PARTITION_NAME: "layers"}
        )
        return self.norm(x), out

    def decode(
        self,
        x: Float[Array, "B M"],
        positions: Int[Array, " B"],
        cache: Cache,
        position: DecodePosition,
        selection: Selection,
        spec: SelectionSpec,
    ) -> tuple[Float[Array, "B M"], Cache, NamedArrays]:
        """One token per row with the cache.

        Args:
          x: [B, M] embedded tokens.
          positions: int32 [B] RoPE positions.
          cache: cache of the same rows.
          position: order of the tokens and where they are written; the slot ``write_index`` must be free.
          selection: what the tokens select; T is 1.
          spec: static settings.

        Returns:
          [B, M] after the final norm, the cache with the token in it, and what
          :func:`gaze_jax.models.decode.decode_attention` returns, stacked over layers.
        """
        selection.check(spec.routing)
        c = self.config.decoder
        angles = rope_angles(positions[:, None], c.head_dim, c.rope_theta)
        at = (jnp.zeros((), jnp.int32), context.stored_at(position.write_index, cache.text_order.shape[1]))
        text_order = jax.lax.dynamic_update_slice(cache.text_order, position.order[:, None], at)
        cache = dataclasses.replace(cache, text_order=text_order)
        layers = jnp.arange(c.depth, dtype=jnp.int32)
        # Carry only what changes. The visual cache is closed over, so it is never copied.
        fixed, masks = cache, with_step(decode_masks(cache, position), cache, self.config.gaze)

        def body(
            block: Block, carry: tuple[Array, Array, Array], inputs: Layer
        ) -> tuple[tuple[Array, Array, Array], NamedArrays]:
            x, text_k, text_v = carry
            layer, chosen = inputs
            current = dataclasses.replace(fixed, text_k=text_k, text_v=text_v)
            (x, updated), out = block.decode(x, current, angles, position, masks, chosen, spec, layer=layer)
            return (x, updated.text_k, updated.text_v), out

        carry = (x[:, None], cache.text_k, cache.text_v)
        inputs = (layers, selection.over_layers(c.depth))
        (x, text_k, text_v), out = self._over_layers(body, carry, inputs)
        cache = dataclasses.replace(cache, text_k=text_k, text_v=text_v)
        return self.norm(x)[:, 0], cache, out
