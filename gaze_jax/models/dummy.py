"""A tiny model with every feature, for tests, documentation and dry runs."""

import dataclasses
from typing import Any

from gaze_jax.models.config import DecoderConfig, GazeConfig, MLLMConfig, VisionConfig

DUMMY = MLLMConfig(
    decoder=DecoderConfig(
        vocab_size=64,
        width=32,
        depth=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        rope_theta=1e4,
        qk_norm=True,
        qkv_bias=True,
        tie_embeddings=False,
    ),
    vision=VisionConfig(image_size=20, patch_size=4, width=24, depth=2, num_heads=3, mlp_dim=40),
    gaze=GazeConfig(region=(2, 2), context_tokens=2, top_k=2, select_per="head"),
)
"""A 5x5 token grid in regions of 2x2: nine balanced regions, five of them partial."""


def dummy(**gaze: Any) -> MLLMConfig:
    """:data:`DUMMY` with other gaze settings, e.g. ``dummy(select_per="kv_head")``."""
    return dataclasses.replace(DUMMY, gaze=dataclasses.replace(DUMMY.gaze, **gaze))
