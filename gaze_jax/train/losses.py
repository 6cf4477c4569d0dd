"""The loss of a batch and its metrics: next-token cross entropy, or distillation from a dense teacher.

Sums are divided by the supervised tokens of the whole batch, so that parts of a batch add up to it.
"""

from collections.abc import Callable, Mapping
from typing import cast

import jax.numpy as jnp
from jaxtyping import Bool, Float32, Int, PyTree

from gaze_jax.core.budget import budget_from_keep
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import IGNORE, Kind, Streams
from gaze_jax.core.types import Array, NamedArrays
from gaze_jax.models import MLLM, MLLMConfig
from gaze_jax.models.attention import make_metadata
from gaze_jax.models.paired import Side, paired_features
from gaze_jax.train import lora
from gaze_jax.train.objective import Logits, token_losses
from gaze_jax.train.teacher import Teacher

Batch = Mapping[str, Array]
Metrics = dict[str, Array]

ROW_LOSSES = "row_losses"
"""Among the metrics of a loss, float32 [B]: the sum of each row, by which one that is not finite is found."""


def count_supervised(batch: Batch) -> Int[Array, ""]:
    """Supervised tokens of a batch, int32 scalar."""
    return jnp.sum(batch["targets"] != IGNORE, dtype=jnp.int32)


def next_token_loss(
    params: PyTree,
    batch: Batch,
    keep: Array | None,
    config: MLLMConfig,
    supervised_tokens: Array | None = None,
) -> tuple[Array, Metrics]:
    """Teacher-forced cross entropy, averaged over the supervised tokens of the whole batch.

    Args:
      params: the model's parameters, adapters beside their kernels.
      batch: fields :data:`gaze_jax.train.step.BATCH_FIELDS`, the streams int32, images float32 or uint8
        [B, N, height, width, 3].
      keep: float32 scalar, fraction of the visible regions that a query selects; None is dense attention.
      config: the model's config.
      supervised_tokens: int32 scalar to divide sums by, if ``batch`` is a part of a batch with so many: the
        results of its parts add up to those of the batch.

    Returns:
      float32 loss and metrics, averaged over supervised queries: "loss", "accuracy", "top_k" (regions that
      a query selects) and "visual_entries" (visual keys that it attends to, mean over layers and heads);
      and :data:`ROW_LOSSES`.
    """
    streams = Streams.from_batch(batch)
    visible, top_k = _budget(batch, streams, keep, config)
    passed = MLLM(config).apply(
        {"params": params},
        batch["images"],
        streams,
        Selection(top_k),
        SelectionSpec(return_entries=True),
        sample_id=batch["sample_id"],
        method="hidden",
    )
    hidden, out = cast(tuple[Array, NamedArrays], passed)
    head = cast(Array, MLLM(config).apply({"params": params}, method="head"))
    tokens = token_losses(Logits(hidden, head), streams.targets)
    mean, rows = _mean_over_supervised(batch, supervised_tokens), _sums_of_rows(batch)
    entries = jnp.mean(out["entries"], axis=0) if "entries" in out else None
    loss = mean(tokens.loss)
    return loss, {
        "loss": loss,
        "accuracy": mean(tokens.correct),
        **_selected(mean, streams, visible, top_k, entries),
        ROW_LOSSES: rows(tokens.loss),
    }


def distillation_loss(
    params: PyTree,
    batch: Batch,
    keep: Array | None,
    config: MLLMConfig,
    teacher: Teacher,
    region_weight: float,
    supervised_tokens: Array | None = None,
) -> tuple[Array, Metrics]:
    """KL divergence of the next-token distributions from the dense teacher's, and of the region scores.

    A supervised token that follows a context token directly has no place in the teacher's sequence: its
    loss is the cross entropy.

    Args:
      params, batch, keep, config, supervised_tokens: as in :func:`next_token_loss`.
      teacher: the model to learn from; what it shares with ``params`` it reads without adapters.
      region_weight: weight of the divergence of the softmax of the region scores from the teacher's
        attention to the regions.

    Returns:
      As :func:`next_token_loss`, with "loss" the weighted sum of "kl" and "region_kl", and "cross_entropy";
      without "region_kl" if attention is dense.
    """
    streams = Streams.from_batch(batch)
    visible, top_k = _budget(batch, streams, keep, config)
    both = paired_features(
        Side(config, params),
        Side(teacher.config, lora.without(params) | teacher.params),
        batch["images"],
        streams,
        Selection(top_k),
        shared_tower="vision" not in teacher.params,
        sample_id=batch["sample_id"],
    )
    tokens = token_losses(
        Logits(both.hidden, both.head), streams.targets, Logits(both.teacher_hidden, both.teacher_head)
    )
    assert tokens.kl is not None
    mean, rows = _mean_over_supervised(batch, supervised_tokens), _sums_of_rows(batch)
    losses = jnp.where(streams.kind == Kind.CONTEXT, tokens.loss, tokens.kl)
    kl = mean(losses)
    metrics = {
        "kl": kl,
        "cross_entropy": mean(tokens.loss),
        "accuracy": mean(tokens.correct),
        **_selected(mean, streams, visible, top_k, both.entries),
        ROW_LOSSES: rows(losses),
    }
    if both.region_kl is None:
        return kl, {"loss": kl, **metrics}
    region_kl = mean(both.region_kl)
    metrics[ROW_LOSSES] += rows(both.region_kl)
    loss = kl + jnp.float32(region_weight) * region_kl
    return loss, {"loss": loss, "region_kl": region_kl, **metrics}


def _budget(
    batch: Batch, streams: Streams, keep: Array | None, config: MLLMConfig
) -> tuple[Bool[Array, "B S R"], Int[Array, "B S"] | None]:
    """The regions that each query may select, and how many it does."""
    routed = make_metadata(streams, config.gaze, batch["sample_id"]).routed
    return routed.visible, None if keep is None else budget_from_keep(keep, routed.count)


Mean = Callable[[Array], Array]


def _mean_over_supervised(batch: Batch, supervised_tokens: Array | None) -> Mean:
    """A function that averages values [B, S] over supervised tokens."""
    supervised = batch["targets"] != IGNORE
    count = count_supervised(batch) if supervised_tokens is None else supervised_tokens

    def mean(values: Array) -> Float32[Array, ""]:
        total = jnp.sum(jnp.where(supervised, values.astype(jnp.float32), 0.0))
        return total / jnp.maximum(count, 1).astype(jnp.float32)

    return mean


def _sums_of_rows(batch: Batch) -> Callable[[Array], Array]:
    """A function that sums values [B, S] over the supervised tokens of each row."""
    supervised = batch["targets"] != IGNORE

    def rows(values: Array) -> Float32[Array, " B"]:
        return jnp.sum(jnp.where(supervised, values.astype(jnp.float32), 0.0), axis=1)

    return rows


def _selected(
    mean: Mean,
    streams: Streams,
    visible: Bool[Array, "B S R"],
    top_k: Int[Array, "B S"] | None,
    entries: Float32[Array, "B S"] | None,
) -> Metrics:
    """Regions and visual keys of a query; without ``entries`` every visible key is attended to."""
    if entries is None:
        region_tokens = jnp.sum(streams.visual_valid, axis=-1, dtype=jnp.int32).astype(jnp.float32)
        entries = jnp.einsum("BSR,BR->BS", visible.astype(jnp.float32), region_tokens)
    visible_regions = jnp.sum(visible, axis=-1, dtype=jnp.int32)
    return {
        "top_k": mean(visible_regions if top_k is None else jnp.minimum(top_k, visible_regions)),
        "visual_entries": mean(entries),
    }
