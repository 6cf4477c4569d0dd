"""A Qwen-shaped decoder whose attention over visual tokens selects, then attends.

Axis letters as in :mod:`gaze_jax.core.streams`; N = R * P + S tokens of both streams, visual first.
Training, prefill and cached decoding run the same modules. Dense attention is ``top_k=None``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gaze_jax.core import routing
from gaze_jax.core.accounting import mask_from_indices
from gaze_jax.core.routing import Keep, Routing
from gaze_jax.models import unstacked
from gaze_jax.models.attention import AttentionMetadata, gaze_attention, region_scores
from gaze_jax.models.cache import Cache, decode_spec, layer_keys, packed_layer, past_of
from gaze_jax.models.config import DTYPES, MLLMConfig
from gaze_jax.models.layers import RMSNorm, apply_rope, dense, logical, rope_angles
from gaze_jax.models.ops import gaze_decode

Array = jax.Array
Angles = tuple[Array, Array]
PER_LAYER_SCAN: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


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

    def qkv(self, x: Array, angles: Angles) -> tuple[Array, Array, Array]:
        """[B, N, M] to post-RoPE queries [B, N, H, D] and keys and values [B, N, K, D]."""
        c = self.config.decoder

        def heads(a: Array) -> Array:
            return a.reshape(*a.shape[:-1], -1, c.head_dim)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, angles), apply_rope(k, angles), v

    def merge(self, heads: Array) -> Array:
        """[B, N, H, D] to [B, N, M]."""
        return self.o_proj(heads.reshape(*heads.shape[:-2], -1))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: MLLMConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, N, M] -> [B, N, M]."""
        c, kinds = self.config.decoder, self.config.numerics.kinds
        gate = dense(c.mlp_dim, ("embed", "mlp"), use_bias=False, name="gate_proj", **kinds)(x)
        up = dense(c.mlp_dim, ("embed", "mlp"), use_bias=False, name="up_proj", **kinds)(x)
        down = dense(c.width, ("mlp", "embed"), use_bias=False, ends_branch=True, name="down_proj", **kinds)
        return down(nn.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm attention and MLP; one method per way to run it."""

    config: MLLMConfig

    def setup(self) -> None:
        eps, kinds = self.config.decoder.norm_eps, self.config.numerics.kinds
        self.input_norm = RMSNorm(eps, **kinds)
        self.self_attn = Attention(self.config)
        self.post_attention_norm = RMSNorm(eps, **kinds)
        self.mlp = GatedMLP(self.config)

    def _around(
        self, x: Array, angles: Angles, attend: Callable[..., tuple[Array, Any]]
    ) -> tuple[Array, Any]:
        q, k, v = self.self_attn.qkv(self.input_norm(x), angles)
        heads, out = attend(q, k, v)
        x = x + self.self_attn.merge(heads)
        return x + self.mlp(self.post_attention_norm(x)), out

    def forward(
        self, x: Array, angles: Angles, metadata: AttentionMetadata, **options: Any
    ) -> tuple[Array, dict[str, Any]]:
        """All tokens at once, [B, N, M]; options of :func:`gaze_jax.models.attention.gaze_attention`."""
        x = nn.with_logical_constraint(x, ("batch", "tokens", "width"))
        return self._around(
            x, angles, lambda q, k, v: gaze_attention(q, k, v, metadata, gaze=self.config.gaze, **options)
        )

    def init_forward(self, x: Array, angles: Angles) -> Array:
        """[B, N, M] past every parameter; attention has none and is left out."""
        return self._around(x, angles, lambda q, k, v: (q, None))[0]

    def decode(
        self,
        x: Array,
        cache: Cache,
        angles: Angles,
        step: "DecodePosition",
        decode_masks: "DecodeMasks",
        *,
        layer: Array,
        selection: "Selection",
        route: Routing,
        capacity: int | None,
        return_trace: bool,
    ) -> tuple[tuple[Array, Cache], dict[str, Array]]:
        """One token per row, [B, 1, M]: append its key and value, select regions, attend."""
        gaze, spec = self.config.gaze, decode_spec(self.config.gaze, self.config.decoder.head_dim)
        new_cache = cache

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, dict[str, Array]]:
            nonlocal new_cache
            new_cache = _append(cache, k, v, layer, step.write_index)
            indices, out = None, {}

            def keys() -> tuple[Array, Array]:
                return layer_keys(new_cache, layer, gaze, self.config.decoder.head_dim)

            def oracle() -> Array:
                return routing.oracle_scores(
                    q,
                    *keys(),
                    decode_masks.visual[:, None],
                    decode_masks.text[:, None],
                    scale=spec.scale,
                    select_per=gaze.select_per,
                    query_block=1,
                )

            regions = cache.visual_order.shape[1]
            if selection.top_k is not None and regions > 0:
                descriptors = jax.lax.dynamic_index_in_dim(cache.descriptors, layer, keepdims=False)
                scores, seen = region_scores(
                    q,
                    descriptors,
                    decode_masks.regions[:, None, :],
                    gaze=gaze,
                    route=route,
                    sample=step.sample[:, None],
                    order=step.order[:, None],
                    first=decode_masks.first,
                    layer=layer,
                    forced=selection.forced,
                    bias=selection.bias,
                    oracle=oracle,
                )
                top_k = routing.count(selection.top_k, decode_masks.regions[:, None])
                slots = regions if capacity is None else capacity
                indices = routing.select_indices(scores, seen, top_k, slots, decode_masks.permutation)[:, 0]
                out = {"indices": indices, "scores": scores[:, 0]}

            def read(indices: Array | None) -> Array:
                return gaze_decode(
                    q[:, 0],
                    new_cache.visual,
                    new_cache.text_k,
                    new_cache.text_v,
                    layer,
                    indices,
                    decode_masks.visual,
                    decode_masks.text,
                    spec=spec,
                    implementation=gaze.decode_implementation,
                )

            if indices is None or selection.full_layers is None:
                heads = read(indices)
            else:
                heads = jax.lax.cond(selection.full_layers, lambda: read(None), lambda: read(indices))
            if return_trace and regions > 0:
                selected = None
                if indices is not None:
                    selected = mask_from_indices(indices, regions)
                    if selection.full_layers is not None:
                        selected |= selection.full_layers & decode_masks.regions[:, None]
                    out["selected"] = selected
                out["attention"], out["dense"] = routing.attention_shares(
                    q[:, 0], *keys(), decode_masks.visual, decode_masks.text, selected, scale=spec.scale
                )
            return heads[:, None], out

        x, out = self._around(x, angles, attend)
        return (x, new_cache), out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """What decides about regions besides the scores, for all layers or, without its axis L, for one.

    Attributes:
      top_k: int32 or a fraction, [L, B, T] or broadcastable in B and T; None is dense attention.
      forced: int32 [L, B, T, Hs, J], for strategy "forced".
      bias: float32 [L, B, R] of :func:`gaze_jax.core.routing.steer`.
      full_layers: bool [L], layers that read every region.
    """

    top_k: Array | Keep | None
    forced: Array | None
    bias: Array | None
    full_layers: Array | None = None

    @classmethod
    def make(
        cls,
        layers: int,
        top_k: Array | Keep | None,
        forced: Array | None,
        bias: Array | None,
        full_layers: Array | None = None,
    ) -> "Selection":
        """Give everything its axis L."""
        if isinstance(top_k, Keep):
            fraction = jnp.asarray(top_k.fraction, jnp.float32)
            budget: Array | Keep | None = Keep(_lead(fraction, layers, 2))
        else:
            budget = _per_layer(top_k, layers, 2)
        steered = None if bias is None else _lead(jnp.asarray(bias, jnp.float32), layers, 2)
        return cls(budget, _per_layer(forced, layers, 4), steered, full_layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodePosition:
    """Where the token that is being decoded stands.

    Attributes:
      order: int32 [B] index in the spliced sequence.
      write_index: int32 scalar, the text-stream slot that it takes in every row.
      sample: int32 [B], names the sample for random routing.
    """

    order: Array
    write_index: Array
    sample: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeMasks:
    """What the tokens of a step may see: the same in every layer, so computed before them.

    Attributes:
      visual: bool [B, R, P] visual keys; what is routed attends to those of the selected regions.
      text: bool [B, S] text-stream keys.
      regions: bool [B, R] regions that may be selected: the whole region is earlier.
      first: int32 [B, R] order of each region's first token.
      permutation: int32 [B, R] regions by first token, for ties.
    """

    visual: Array
    text: Array
    regions: Array
    first: Array
    permutation: Array


def _decode_masks(cache: Cache, step: DecodePosition) -> DecodeMasks:
    """Of a cache whose ``text_order`` has the tokens of the step already."""
    order = step.order[:, None]
    first, last = cache.first, cache.last
    return DecodeMasks(
        visual=(cache.visual_order >= 0) & (cache.visual_order <= order[:, :, None]),
        text=(cache.text_order >= 0) & (cache.text_order <= order),
        regions=(last >= 0) & (last <= order),
        first=first,
        permutation=routing.tie_permutation(first),
    )


def _append(cache: Cache, k: Array, v: Array, layer: Array, write_index: Array) -> Cache:
    """Write one token's [B, 1, K, D] key and value in place."""

    def write(stack: Array, new: Array) -> Array:
        new = jnp.moveaxis(new, 1, 2)[None].astype(stack.dtype)
        zero = jnp.zeros((), jnp.int32)
        return jax.lax.dynamic_update_slice(stack, new, (layer, zero, zero, write_index, zero))

    return dataclasses.replace(cache, text_k=write(cache.text_k, k), text_v=write(cache.text_v, v))


def _per_layer(value: Array | None, layers: int, trailing: int) -> Array | None:
    """Give ``value`` a leading layer axis, if it has only its ``trailing`` axes or fewer."""
    if value is None:
        return None
    if not jnp.issubdtype(jnp.asarray(value).dtype, jnp.integer):
        raise TypeError(
            f"top_k and forced regions must be integers, got {jnp.asarray(value).dtype}; "
            "core.routing.Keep is a budget as a fraction."
        )
    return _lead(jnp.asarray(value, jnp.int32), layers, trailing)


def _lead(value: Array, layers: int, trailing: int) -> Array:
    """``value`` with a leading layer axis before its ``trailing`` ones."""
    if value.ndim <= trailing:
        value = value.reshape((1,) * (trailing + 1 - value.ndim) + value.shape)
    return jnp.broadcast_to(value, (layers, *value.shape[1:]))


def _check_steering(
    top_k: Array | Keep | None, route: Routing, forced: Array | None, bias: Array | None
) -> None:
    """Raise a ValueError where dense attention would silently ignore a steered selection."""
    if top_k is None and (forced is not None or route.strategy == "forced"):
        raise ValueError("Forced regions need top_k: dense attention (top_k=None) reads every region.")
    if top_k is None and bias is not None:
        raise ValueError("A bias needs top_k: dense attention (top_k=None) reads every region.")


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

    def embed(self, tokens: Array) -> Array:
        """int32 [...] token ids to [..., M]."""
        return jnp.take(self.embedding, tokens, axis=0).astype(DTYPES[self.config.dtype])

    def logits(self, hidden: Array) -> Array:
        """[..., M] to float32 [..., V]."""
        split = unstacked.is_split(self.get_variable("params", "layers"))
        if not self.config.decoder.tie_embeddings:
            if split:
                kernel: Array = self.get_variable("params", "lm_head")["kernel"].layers[0]
                return unstacked.product(kernel.astype(hidden.dtype), hidden).astype(jnp.float32)
            return self.lm_head(hidden).astype(jnp.float32)
        table = self.embedding.astype(hidden.dtype)
        if split:
            return unstacked.product(table, hidden, preferred_element_type=jnp.float32)
        return jnp.einsum("...M,VM->...V", hidden, table, preferred_element_type=jnp.float32)

    def _over_layers(
        self, body: Callable[..., Any], carry: Any, inputs: Any, *, remat: bool = False, **options: Any
    ) -> Any:
        """Scan ``body``, of (block, carry, inputs), over the blocks; their parameters may be apart."""
        blocks: Any = self.get_variable("params", "layers")
        if unstacked.is_split(blocks):
            return unstacked.scan(Block(self.config, parent=None), blocks, body, carry, inputs)
        if remat:
            body = nn.remat(body, prevent_cse=False)
        scan = nn.scan(body, length=self.config.decoder.depth, **options, **PER_LAYER_SCAN)
        return scan(self.layers, carry, inputs)

    def init_forward(self, x: Array, positions: Array) -> Array:
        """:meth:`forward` without attention, for making parameters: it traces in a third of the time."""
        angles = rope_angles(positions, self.config.decoder.head_dim, self.config.decoder.rope_theta)

        def body(block: Block, x: Array, _: None) -> tuple[Array, None]:
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
        x: Array,
        positions: Array,
        metadata: AttentionMetadata,
        *,
        top_k: Array | Keep | None,
        route: Routing,
        forced: Array | None,
        collect: bool,
        keep_kv: bool,
        keep_hidden: bool = False,
        bias: Array | None = None,
        past: Cache | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Training or prefill over both streams.

        Args:
          x: [B, N, M] embedded tokens.
          positions: int32 [B, N] RoPE positions.
          metadata: of the batch.
          top_k: int32 broadcastable to [L, B, S], or a fraction; None is dense attention.
          route: where scores come from.
          forced: int32 broadcastable to [L, B, S, Hs, J], for strategy "forced".
          collect: return scores and selections.
          keep_kv: return keys, values and descriptors.
          keep_hidden: return "hidden" [L, B, N, M], the residual stream after each block.
          bias: float32 broadcastable to [L, B, R], see :func:`gaze_jax.core.routing.steer`.
          past: what was read before, whose order ``metadata`` knows; what is new goes on with it.

        Returns:
          [B, N, M] after the final norm, and a dict of arrays stacked over layers.
        """
        _check_steering(top_k, route, forced, bias)
        c = self.config.decoder
        angles = rope_angles(positions, c.head_dim, c.rope_theta)
        layers = jnp.arange(c.depth, dtype=jnp.int32)
        per_layer = (layers, Selection.make(c.depth, top_k, forced, bias))

        def body(block: Block, x: Array, inputs: Any) -> tuple[Array, dict[str, Array]]:
            layer, selection = inputs
            x, out = block.forward(
                x,
                angles,
                metadata,
                route=route,
                layer=layer,
                top_k=selection.top_k,
                forced=selection.forced,
                bias=selection.bias,
                past=None if past is None else past_of(past, layer, self.config.gaze, c.head_dim),
                collect=collect,
            )
            wanted = {"scores", "selected"} if collect else set()
            if keep_kv:
                if past is None:
                    out = packed_layer(out, self.config.gaze)
                wanted |= set(out) - {"scores", "selected"}
            if keep_hidden:
                out, wanted = out | {"hidden": x}, wanted | {"hidden"}
            return x, {name: out[name] for name in sorted(wanted & set(out))}

        named = {"metadata_params": {nn.PARTITION_NAME: "layers"}}
        x, out = self._over_layers(body, x, per_layer, remat=self.config.remat, **named)
        return self.norm(x), out

    def decode(
        self,
        x: Array,
        positions: Array,
        cache: Cache,
        step: DecodePosition,
        *,
        top_k: Array | Keep | None,
        route: Routing,
        forced: Array | None,
        capacity: int | None,
        bias: Array | None = None,
        full_layers: Array | None = None,
        return_trace: bool = False,
    ) -> tuple[Array, Cache, dict[str, Array]]:
        """One token per row with the cache.

        Args:
          x: [B, M] embedded tokens.
          positions: int32 [B] RoPE positions.
          cache: of the rows.
          step: where the tokens stand; ``step.write_index`` must be free.
          top_k: int32 broadcastable to [L, B, 1], or a fraction; None is dense attention.
          route: where scores come from.
          forced: int32 broadcastable to [L, B, 1, Hs, J], for strategy "forced".
          capacity: J; None allows all R regions.
          bias: float32 broadcastable to [L, B, R], see :func:`gaze_jax.core.routing.steer`.
          full_layers: bool [L], layers that read every region whatever J is.
          return_trace: also return where the attention went, which reads every key.

        Returns:
          [B, M] after the final norm, the cache with the token in it, and, if routed, "indices" int32
          [L, B, Hs, J] and "scores" float32 [L, B, Hs, R]; with ``return_trace`` also "selected" bool
          [L, B, Hs, R], if routed, and "attention" and "dense", float32 [L, B, H, R] of
          :func:`gaze_jax.core.routing.attention_shares`.
        """
        _check_steering(top_k, route, forced, bias)
        c = self.config.decoder
        angles = rope_angles(positions[:, None], c.head_dim, c.rope_theta)
        zero = jnp.zeros((), jnp.int32)
        text_order = jax.lax.dynamic_update_slice(
            cache.text_order, step.order[:, None], (zero, step.write_index)
        )
        cache = dataclasses.replace(cache, text_order=text_order)
        layers = jnp.arange(c.depth, dtype=jnp.int32)
        per_layer = (layers, Selection.make(c.depth, top_k, forced, bias, full_layers))
        # Only what changes is carried; the visual cache is closed over and never copied.
        fixed, decode_masks = cache, _decode_masks(cache, step)

        def body(block: Block, carry: Any, inputs: Any) -> tuple[Any, dict[str, Array]]:
            x, text_k, text_v = carry
            layer, selection = inputs
            (x, now), out = block.decode(
                x,
                dataclasses.replace(fixed, text_k=text_k, text_v=text_v),
                angles,
                step,
                decode_masks,
                layer=layer,
                selection=selection,
                route=route,
                capacity=capacity,
                return_trace=return_trace,
            )
            return (x, now.text_k, now.text_v), out

        carry = (x[:, None], cache.text_k, cache.text_v)
        (x, text_k, text_v), out = self._over_layers(body, carry, per_layer)
        cache = dataclasses.replace(cache, text_k=text_k, text_v=text_v)
        return self.norm(x)[:, 0], cache, out
