"""Decoder, tower and the multimodal model that joins them."""

from gaze_jax.models.cache import Cache
from gaze_jax.models.config import DecoderConfig, GazeConfig, MLLMConfig, Numerics, VisionConfig
from gaze_jax.models.decode import DecodePosition
from gaze_jax.models.dummy import DUMMY, dummy
from gaze_jax.models.mllm import MLLM

__all__ = [
    "DUMMY",
    "MLLM",
    "Cache",
    "DecodePosition",
    "DecoderConfig",
    "GazeConfig",
    "MLLMConfig",
    "Numerics",
    "VisionConfig",
    "dummy",
]
