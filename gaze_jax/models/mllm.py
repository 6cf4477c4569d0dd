"""The multimodal model: tower, projector and decoder joined on the two streams."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int, UInt8

from gaze_jax.core.regions import pool_to_regions, to_regions
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import Kind, Streams
from gaze_jax.core.types import AnyArray, Array, ArrayTree, NamedArrays
from gaze_jax.models import context
from gaze_jax.models.attention import make_metadata
from gaze_jax.models.cache import Cache, append, build_cache
from gaze_jax.models.config import DTYPES, MLLMConfig
from gaze_jax.models.decode import DecodePosition
from gaze_jax.models.decoder import Decoder
from gaze_jax.models.layers import logical
from gaze_jax.models.ops import normalised
from gaze_jax.models.vision import Projector, VisionTower

Images = Float[AnyArray, "B images height width 3"] | UInt8[AnyArray, "B images height width 3"]
SampleId = Int[AnyArray, " B"] | Int[AnyArray, "B S"]


def joined_positions(streams: Streams) -> Int[Array, "B N"]:
    """RoPE positions of both streams, int32 [B, R * P + S], as :meth:`MLLM.embed_streams` orders them."""
    visual = jnp.reshape(streams.visual_positions, (streams.visual_positions.shape[0], -1))
    return context.concatenate(visual, streams.text_positions, 1)


class MLLM(nn.Module):
    """Image tower -> projector -> decoder.

    ``Selection()`` is dense attention in every method.
    """

    config: MLLMConfig

    def setup(self) -> None:
        c, width = self.config, self.config.decoder.width
        param_dtype = c.numerics.kinds["param_dtype"]
        self.decoder = Decoder(c)
        if c.vision is None:
            return
        self.vision = VisionTower(c.vision, c.numerics)
        self.projector = Projector(width, c.numerics)
        init = nn.initializers.normal(width**-0.5)
        self.newline = self.param("newline", logical(init, "norm"), (width,), param_dtype)
        if c.gaze.context_tokens:
            shape = (c.gaze.context_tokens, width)
            self.context = self.param("context", logical(init, None, "norm"), shape, param_dtype)

    def encode(self, images: Images) -> Float[Array, "B N M"]:
        """Images [B, N, height, width, 3] to projected features [B, N * grid * grid, M].

        Images are float32 in [-1, 1], or uint8 and normalised here.
        """
        return self.projector(self.tower(images))

    def tower(self, images: Images) -> Float[Array, "B N channels"]:
        """:meth:`encode` before the projector, [B, N * grid * grid, width of the tower]."""
        batch, views = images.shape[:2]
        if images.dtype == jnp.uint8:
            images = normalised(images)
        flat, restore = context.merged_rows(images)
        features = restore(self.vision(flat))
        return features.reshape(batch, views * features.shape[2], features.shape[3])

    def project(self, features: Float[Array, "B N channels"]) -> Float[Array, "B N M"]:
        """The rest of :meth:`encode`: what :meth:`tower` returns to [B, N, M]."""
        return self.projector(features)

    def _embed_text(self, streams: Streams) -> Float[Array, "B S M"]:
        """Embed text from the table, newlines and context tokens from their parameters; padding is 0."""
        dtype = DTYPES[self.config.dtype]
        is_text = (streams.kind == Kind.TEXT)[..., None]
        x = jnp.where(is_text, self.decoder.embed(jnp.where(is_text[..., 0], streams.tokens, 0)), 0)
        if self.config.vision is None:
            return x
        is_newline = (streams.kind == Kind.NEWLINE)[..., None]
        x = jnp.where(is_newline, self.newline.astype(dtype), x)
        if self.config.gaze.context_tokens:
            is_context = streams.kind == Kind.CONTEXT
            which = jnp.where(is_context, streams.tokens, 0)
            x = jnp.where(is_context[..., None], self.context.astype(dtype)[which], x)
        return x

    def _embed_visual(
        self, features: Float[Array, "B N M"] | None, streams: Streams
    ) -> Float[Array, "B tokens M"]:
        """Projected features in region-major order, [B, R * P, M]; without an image there are none."""
        batch, regions, slots = streams.visual_src.shape
        width = self.config.decoder.width
        if features is None:
            if regions * slots:
                raise ValueError("The batch has visual tokens but there is no image, or no tower to read it.")
            return jnp.zeros((batch, 0, width), DTYPES[self.config.dtype])
        if streams.pool_indices is None or streams.pool_weights is None:
            visual = to_regions(features, streams.visual_src)
        else:
            visual = pool_to_regions(features, streams.pool_indices, streams.pool_weights, self.newline)
        return visual.reshape(batch, regions * slots, width)

    def embed_streams(
        self, features: Float[Array, "B N M"] | None, streams: Streams
    ) -> Float[Array, "B tokens M"]:
        """What the decoder reads: [B, R * P + S, M], visual tokens first.

        Args:
          features: [B, N, M] from :meth:`encode`; None for text alone.
          streams: the batch.
        """
        return context.concatenate(self._embed_visual(features, streams), self._embed_text(streams), 1)

    def init_forward(self, images: Images | None) -> Float32[Array, "1 1 V"]:
        """Use every parameter once, to create them.

        Args:
          images: float32 [1, 1, image_size, image_size, 3]; None for a model without a tower.
        """
        if images is not None:
            self.encode(images)
        token = jnp.zeros((1, 1), jnp.int32)
        return self.decoder.init_forward(self.decoder.embed(token), token)

    def hidden(
        self,
        images: Images | None,
        streams: Streams,
        selection: Selection,
        spec: SelectionSpec = SelectionSpec(),
        *,
        sample_id: SampleId | None = None,
        past: Cache | None = None,
        keep_kv: bool = False,
        keep_hidden: bool = False,
    ) -> tuple[Float[Array, "B S M"], dict[str, ArrayTree]]:
        """The text stream before the head, for callers that need only some of the logits.

        Args:
          images, streams, selection, spec, sample_id: see :meth:`__call__`.
          past: the cache of earlier tokens.
          keep_kv, keep_hidden: see :meth:`gaze_jax.models.decoder.Decoder.forward`.

        Returns:
          [B, S, M] for :meth:`Decoder.logits`, and a dict of the requested arrays, stacked over layers.
        """
        features = None if images is None or self.config.vision is None else self.encode(images)
        x = self.embed_streams(features, streams)
        before = None if past is None else (past.visual_order, past.text_order)
        metadata = make_metadata(streams, self.config.gaze, sample_id, before)
        hidden, out = self.decoder.forward(
            x,
            joined_positions(streams),
            metadata,
            selection,
            spec,
            past=past,
            keep_kv=keep_kv,
            keep_hidden=keep_hidden,
        )
        return context.split(hidden, x.shape[1] - streams.tokens.shape[1], 1)[1], out

    def __call__(
        self,
        images: Images | None,
        streams: Streams,
        selection: Selection,
        spec: SelectionSpec = SelectionSpec(),
        *,
        sample_id: SampleId | None = None,
    ) -> tuple[Float32[Array, "B S V"], NamedArrays]:
        """Teacher-forced pass.

        Args:
          images: [B, N, image_size, image_size, 3], float32 in [-1, 1] or uint8, the tower's inputs: whole
            images, tiles, frames; None for text alone.
          streams: the batch.
          selection: what text-stream queries select; T is S.
          spec: static settings; ``capacity`` is not used here.
          sample_id: int32 [B], or [B, S] for each token of packed rows; only random routing uses it.

        Returns:
          float32 logits [B, S, V] of the text stream, and a dict: with ``spec.return_trace`` and a budget,
          "scores" float32 and "selected" bool, both [L, B, S, Hs, R].
        """
        hidden, out = self.hidden(images, streams, selection, spec, sample_id=sample_id)
        return self.decoder.logits(hidden), out

    def head(self) -> Float[Array, "V M"]:
        """The table [V, M] whose products with :meth:`hidden`, in float32, are the logits."""
        return self.decoder.head

    def final_norm(self, x: Float[Array, "B N M"]) -> Float[Array, "B N M"]:
        """The decoder's norm after its last block."""
        return self.decoder.norm(x)

    def stages(
        self, images: Images | None, streams: Streams
    ) -> tuple[Float[Array, "L B S M"], Float32[Array, "B S V"]]:
        """Dense attention with all intermediates, which conversion compares with the original model's.

        Returns:
          [L, B, S, M], the text stream after each block, and float32 logits [B, S, V].
        """
        last, out = self.hidden(images, streams, Selection(), keep_hidden=True)
        blocks = out["hidden"]
        return blocks[:, :, blocks.shape[2] - streams.tokens.shape[1] :], self.decoder.logits(last)

    def prefill(
        self,
        images: Images | None,
        streams: Streams,
        selection: Selection,
        spec: SelectionSpec = SelectionSpec(),
        *,
        free_slots: int,
        sample_id: SampleId | None = None,
    ) -> tuple[Float32[Array, "B V"], Cache, NamedArrays]:
        """Prefill a new cache with prompts, one sample per row.

        Args:
          images, streams, selection, spec, sample_id: see :meth:`__call__`.
          free_slots: text-stream slots to leave free for later tokens.

        Returns:
          float32 logits [B, V] at each row's last token in order, the cache, and a dict: with
          ``spec.return_trace`` and a budget, "selected" bool [L, B, Hs, R] of that token.
        """
        hidden, layers = self.hidden(images, streams, selection, spec, sample_id=sample_id, keep_kv=True)
        last = jnp.argmax(jnp.where(streams.text_segment >= 0, streams.text_order, -1), axis=1)
        at_last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        out = {}
        if "selected" in layers:
            selected = jnp.take_along_axis(layers["selected"], last[None, :, None, None, None], axis=2)
            out["selected"] = selected[:, :, 0]
        cache = build_cache(layers, streams, self.config.gaze, free_slots=free_slots)
        return self.decoder.logits(at_last), cache, out

    def extend(
        self,
        images: Images | None,
        streams: Streams,
        cache: Cache,
        selection: Selection,
        spec: SelectionSpec = SelectionSpec(),
        *,
        region: Int[Array, ""],
        write_index: Int[Array, ""],
        sample_id: SampleId | None = None,
    ) -> Cache:
        """Prefill what follows a cache, one sample per row: text, images, frames.

        Args:
          images, streams, sample_id: as in :meth:`__call__`; orders and positions continue those of the
            cache, and regions have as many slots as the cache's.
          cache: the cache, with enough free regions and slots.
          selection: T is S; ``bias`` [L, B, R] has the cached regions first, then the new ones.
          spec: static settings; ``return_trace`` is not used here.
          region, write_index: int32 scalars, the first free region and text-stream slot, the same in every
            row.

        Returns:
          The cache with the new tokens.
        """
        spec = dataclasses.replace(spec, return_trace=False)
        _, layers = self.hidden(
            images, streams, selection, spec, sample_id=sample_id, past=cache, keep_kv=True
        )
        return append(cache, layers, streams, self.config.gaze, region=region, write_index=write_index)

    def decode(
        self,
        tokens: Int[Array, " B"],
        positions: Int[Array, " B"],
        cache: Cache,
        position: DecodePosition,
        selection: Selection,
        spec: SelectionSpec = SelectionSpec(),
    ) -> tuple[Float32[Array, "B V"], Cache, NamedArrays]:
        """Feed one token per row, int32 [B]; see :meth:`Decoder.decode`. Logits are float32 [B, V]."""
        x = self.decoder.embed(tokens)
        hidden, cache, out = self.decoder.decode(x, positions, cache, position, selection, spec)
        return self.decoder.logits(hidden), cache, out
