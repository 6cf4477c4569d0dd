"""A family of multimodal models: everything in which families differ."""

import dataclasses
from collections.abc import Mapping

from gaze_jax.chat.conversation import ANSWER, Arrange, Supervision
from gaze_jax.data.views import ViewStyle
from gaze_jax.families.table import Conversion
from gaze_jax.media.video import FrameSampling
from gaze_jax.models.config import MLLMConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """Multimodal models that treat images, videos and conversations in the same way.

    Attributes:
      views: how images and frames become token grids. Its name is the value of ``views.style`` in a model's
        config, and the key of the family.
      frames: how frames of a video are sampled in the authors' evaluation.
      arrange: the order of media and text in a turn.
      system: the system prompt that its models were trained with; None: no system prompt.
      supervision: which parts of a conversation the authors trained on.
      conversions: ``model_type`` of ``config.json`` -> how such a checkpoint is read and written.
      models: published name -> config.
    """

    views: ViewStyle
    frames: FrameSampling
    arrange: Arrange
    system: str | None = None
    supervision: Supervision = ANSWER
    conversions: Mapping[str, Conversion] = dataclasses.field(default_factory=dict)
    models: Mapping[str, MLLMConfig] = dataclasses.field(default_factory=dict)
