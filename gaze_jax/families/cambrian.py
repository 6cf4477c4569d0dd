"""The models of the paper, Gaze Attention (arXiv 2605.13080): a language model and a SigLIP2.

They read images as ``square`` does. No weights were published, so there are configs but no conversion.
"""

import dataclasses
from collections.abc import Mapping

from gaze_jax.families import qwen, siglip
from gaze_jax.models.config import GazeConfig, MLLMConfig


def _model(decoder: str, image_size: int) -> MLLMConfig:
    # The paper's defaults: regions of 6x6 tokens at 384 pixels, 8x8 at 512, so 16 of them; 4 context tokens.
    side = 6 if image_size == 384 else 8
    return MLLMConfig(
        qwen.DECODERS[decoder],
        siglip.TOWERS[f"siglip2-so400m-patch16-{image_size}"],
        GazeConfig(region=(side, side), context_tokens=4, top_k=4),
        dtype="bfloat16",
        param_dtype="bfloat16",
    )


MODELS: Mapping[str, MLLMConfig] = {
    "cambrian-4b-384": _model("qwen3-4b", 384),
    "cambrian-4b-512": _model("qwen3-4b", 512),
    "cambrian-7b-384": _model("qwen2.5-7b", 384),
    "cambrian-7b-512": _model("qwen2.5-7b", 512),
}
"""The paper's models, selecting 4 of 16 regions per query: its best average at 144 of 576 entries."""


def dense(config: MLLMConfig) -> MLLMConfig:
    """The paper's baseline for a model: every visual token, no context tokens."""
    return dataclasses.replace(config, gaze=dataclasses.replace(config.gaze, top_k=None, context_tokens=0))
