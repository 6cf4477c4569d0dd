"""The model of a run that starts from a checkpoint: the checkpoint's, with some settings changed."""

import dataclasses
from typing import Any

from gaze_jax.models.config import MLLMConfig


@dataclasses.dataclass(frozen=True)
class GazeChanges:
    """Fields of :class:`gaze_jax.models.config.GazeConfig` to change; None keeps the checkpoint's."""

    region: tuple[int, int] | None = None
    context_tokens: int | None = None
    top_k: int | None = None
    select_per: str | None = None
    descriptor: str | None = None
    visual_scope: str | None = None
    visual_causal: bool | None = None
    prefill_implementation: str | None = None
    query_block: int | None = None
    video_region: tuple[int, int, int] | None = None
    newlines: str | None = None


@dataclasses.dataclass(frozen=True)
class ModelChanges:
    """What of a checkpoint's model to change; None keeps it.

    Attributes:
      gaze: attention over visual tokens.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters during training; the checkpoint's are cast to it.
      remat, remat_policy: recompute a block's activations in the backward pass, and what is kept of them.
    """

    gaze: GazeChanges = GazeChanges()
    dtype: str | None = None
    param_dtype: str | None = None
    remat: bool | None = None
    remat_policy: str | None = None


def changed(config: MLLMConfig, changes: ModelChanges) -> MLLMConfig:
    """``config`` with ``changes``.

    Raises:
      ValueError: the result is no valid model.
    """

    def given(fields: object) -> dict[str, Any]:
        values = {f.name: getattr(fields, f.name) for f in dataclasses.fields(fields)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if value is not None}

    gaze = dataclasses.replace(config.gaze, **given(changes.gaze))
    return dataclasses.replace(config, **(given(changes) | {"gaze": gaze}))
