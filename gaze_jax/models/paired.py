"""A model and its dense teacher, layer by layer in one scan.

The teacher's attention says how much of its mass every region gets; the student's scores are compared with it
in the same layer, so that neither is kept for all layers.
"""

from typing import NamedTuple, TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, PyTree

from gaze_jax.core import masks, regions, routing
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import Streams
from gaze_jax.core.types import Array
from gaze_jax.models.attention import AttentionMetadata, gaze_attention, make_metadata, split_streams
from gaze_jax.models.block import Angles, Attend, Block
from gaze_jax.models.config import REMAT_POLICIES, MLLMConfig
from gaze_jax.models.layers import rope_angles
from gaze_jax.models.mllm import MLLM, Images, SampleId, joined_positions

Out = TypeVar("Out")

_NONE = -1e30
"""Logit of a region without mass."""


class Side(NamedTuple):
    """One of the two models: its config and its parameters."""

    config: MLLMConfig
    params: PyTree


class PairedFeatures(NamedTuple):
    """What both models say of a batch.

    Attributes:
      hidden, teacher_hidden: [B, S, M], the text stream before the head.
      head, teacher_head: [V, M].
      entries: float32 [B, S], visual keys that the student attends to, mean over layers and heads; None if
        its attention is dense.
      region_kl: float32 [B, S], KL divergence in nats of the softmax of the student's region scores from the
        teacher's attention to the regions, mean over layers and selectors; 0 where a query sees no region.
        None if the student's attention is dense.
    """

    hidden: Float[Array, "B S M"]
    teacher_hidden: Float[Array, "B S M"]
    head: Float[Array, "V M"]
    teacher_head: Float[Array, "V M"]
    entries: Float32[Array, "B S"] | None
    region_kl: Float32[Array, "B S"] | None


def paired_features(
    student: Side,
    teacher: Side,
    images: Images,
    streams: Streams,
    selection: Selection,
    *,
    shared_tower: bool,
    sample_id: SampleId | None = None,
) -> PairedFeatures:
    """Run a model and its teacher on the same batch.

    The teacher attends densely, without context tokens, and has no gradient.

    Args:
      student: the model.
      teacher: a model with as many layers and heads, and without context tokens.
      images, streams, selection, sample_id: as in :meth:`gaze_jax.models.mllm.MLLM.__call__`.
      shared_tower: both have the same image tower, which then runs once.
    """
    teacher = Side(teacher.config, jax.lax.stop_gradient(teacher.params))
    towers = [_call(student, "tower", images)]
    towers.append(towers[0] if shared_tower else _call(teacher, "tower", images))
    plain = streams.without_context()
    x, taught = (
        _call(side, "embed_streams", _call(side, "project", tower), seen)
        for side, tower, seen in zip((student, teacher), towers, (streams, plain), strict=True)
    )
    layers = _Layers(
        student.config,
        teacher.config,
        make_metadata(streams, student.config.gaze, sample_id),
        make_metadata(plain, teacher.config.gaze, sample_id),
        _angles(student.config, streams),
        _angles(teacher.config, plain),
    )
    depth = student.config.decoder.depth
    body = layers.advance
    if student.config.remat:
        body = jax.checkpoint(body, prevent_cse=False, policy=REMAT_POLICIES[student.config.remat_policy])
    blocks = tuple(side.params["decoder"]["layers"] for side in (student, teacher))
    (x, taught), sums = jax.lax.scan(
        body,
        (x, jax.lax.stop_gradient(taught)),
        (jnp.arange(depth, dtype=jnp.int32), selection.over_layers(depth), *blocks),
    )
    visual = x.shape[1] - streams.tokens.shape[1]
    hidden, teacher_hidden = (
        _call(side, "final_norm", values[:, visual:]) for side, values in ((student, x), (teacher, taught))
    )
    means = [None if leaf is None else jnp.mean(leaf, axis=0) for leaf in sums]
    return PairedFeatures(
        hidden, teacher_hidden, _call(student, "head"), _call(teacher, "head"), means[0], means[1]
    )


def _call(side: Side, method: str, *arguments: object) -> Array:
    return cast(Array, MLLM(side.config).apply({"params": side.params}, *arguments, method=method))


def _angles(config: MLLMConfig, streams: Streams) -> Angles:
    return rope_angles(joined_positions(streams), config.decoder.head_dim, config.decoder.rope_theta)


class _Layers(NamedTuple):
    """What a layer of both models needs besides its parameters."""

    config: MLLMConfig
    teacher_config: MLLMConfig
    metadata: AttentionMetadata
    teacher_metadata: AttentionMetadata
    angles: Angles
    teacher_angles: Angles

    def advance(
        self, carry: tuple[Array, Array], inputs: tuple[Array, Selection, PyTree, PyTree]
    ) -> tuple[tuple[Array, Array], tuple[Array | None, Array | None]]:
        """One layer of both: the two residual streams [B, N, M], and entries and region_kl [B, S]."""
        x, taught = carry
        layer, chosen, params, teacher_params = inputs
        routed = chosen.budget is not None
        x, taught = (nn.with_logical_constraint(a, ("batch", "tokens", "width")) for a in (x, taught))

        def attend_densely(q: Array, k: Array, v: Array) -> tuple[Array, Array | None]:
            heads, _ = gaze_attention(
                q,
                k,
                v,
                self.teacher_metadata,
                Selection(),
                SelectionSpec(),
                gaze=self.teacher_config.gaze,
                layer=layer,
            )
            return heads, self._log_mass(q, k) if routed else None

        taught, log_mass = _block(
            self.teacher_config, teacher_params, taught, self.teacher_angles, attend_densely
        )
        taught = jax.lax.stop_gradient(taught)

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array | None, Array | None]]:
            heads, out = gaze_attention(
                q,
                k,
                v,
                self.metadata,
                chosen,
                SelectionSpec(return_entries=True),
                gaze=self.config.gaze,
                layer=layer,
            )
            if log_mass is None:
                return heads, (None, None)
            return heads, (out["entries"], self._region_kl(q, k, jax.lax.stop_gradient(log_mass)))

        x, out = _block(self.config, params, x, self.angles, attend)
        return (x, taught), out

    def _log_mass(self, q: Float[Array, "B N H D"], k: Float[Array, "B N K D"]) -> Float32[Array, "B S Hs R"]:
        """Log of the teacher's attention to each region; the selectors are the student's."""
        metadata, gaze = self.teacher_metadata, self.config.gaze
        visual_k, text_k = split_streams(k, *metadata.valid.shape[1:])
        return routing.oracle_scores(
            q[:, metadata.valid.shape[1] * metadata.valid.shape[2] :],
            visual_k,
            text_k,
            *masks.visible_keys(metadata.text, metadata.places),
            scale=q.shape[3] ** -0.5,
            select_per=gaze.select_per,
            query_block=gaze.query_block,
        )

    def _region_kl(
        self,
        q: Float[Array, "B N H D"],
        k: Float[Array, "B N K D"],
        log_mass: Float32[Array, "B S Hs R"],
    ) -> Float32[Array, "B S"]:
        metadata, gaze = self.metadata, self.config.gaze
        visual_k, _ = split_streams(k, *metadata.valid.shape[1:])
        descriptors = regions.describe(visual_k, metadata.valid, gaze.descriptor)
        scores = routing.descriptor_scores(
            routing.query_features(q[:, q.shape[1] - log_mass.shape[1] :], gaze.descriptor),
            descriptors,
            select_per=gaze.select_per,
        )
        # A score is sqrt(D) times the mean logit of a region, summed over the heads that select together.
        scale = q.shape[3] ** -0.5 * scores.shape[2] / q.shape[2]
        return region_kl(scores * jnp.float32(scale), log_mass, metadata.routed.visible)


def _block(
    config: MLLMConfig,
    params: PyTree,
    x: Array,
    angles: Angles,
    attend: Attend[Out],
) -> tuple[Array, Out]:
    passed = Block(config).apply({"params": params}, x, angles, attend, method="around")
    return cast(tuple[Array, Out], passed)


def region_kl(
    logits: Float32[Array, "B S Hs R"],
    log_mass: Float32[Array, "B S Hs R"],
    visible: Bool[Array, "B S R"],
) -> Float32[Array, "B S"]:
    """KL divergence of softmax(``logits``) from the teacher's attention to the regions, in nats.

    Both are distributions over the regions that a query may select. A mean over the selectors; 0 for a query
    that may select none.
    """
    seen = visible[:, :, None, :]
    # Finite, since a query that sees no region would otherwise have a gradient of NaN.
    target = jax.nn.log_softmax(jnp.where(seen & (log_mass > _NONE), log_mass, _NONE))
    found = jax.nn.log_softmax(jnp.where(seen, logits, _NONE))
    return jnp.mean(jnp.sum(jnp.exp(target) * (target - found), axis=-1), axis=-1)
