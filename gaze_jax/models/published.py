"""Published sizes as configs: what their ``config.json`` would be read as.

Dimensions and parameter counts are checked against transformers in tests/convert/test_published.py; the
rows that the paper joins are those of Gaze Attention (arXiv 2605.13080).
"""

import dataclasses
from collections.abc import Mapping

from gaze_jax.core.layout import ViewConfig
from gaze_jax.models.config import DecoderConfig, GazeConfig, MLLMConfig, VisionConfig

_QWEN2 = {"qk_norm": False, "qkv_bias": True}
_QWEN3 = {"qk_norm": True, "qkv_bias": False}

DECODERS: Mapping[str, DecoderConfig] = {
    # vocabulary, width, depth, query heads, kv heads, head_dim, mlp
    "qwen2.5-0.5b": DecoderConfig(151936, 896, 24, 14, 2, 64, 4864, **_QWEN2),
    "qwen2.5-1.5b": DecoderConfig(151936, 1536, 28, 12, 2, 128, 8960, **_QWEN2),
    "qwen2.5-3b": DecoderConfig(151936, 2048, 36, 16, 2, 128, 11008, **_QWEN2),
    "qwen2.5-7b": DecoderConfig(152064, 3584, 28, 28, 4, 128, 18944, tie_embeddings=False, **_QWEN2),
    "qwen3-4b": DecoderConfig(151936, 2560, 36, 32, 8, 128, 9728, **_QWEN3),
    "qwen3-4b-instruct-2507": DecoderConfig(151936, 2560, 36, 32, 8, 128, 9728, rope_theta=5e6, **_QWEN3),
}
"""Language models; Qwen2 has the sizes of Qwen2.5."""


def _so400m(image_size: int, patch_size: int) -> VisionConfig:
    """The features after layer 26 of 27, which multimodal LLMs read."""
    return VisionConfig(image_size, patch_size, 1152, depth=26, num_heads=16, mlp_dim=4304)


TOWERS: Mapping[str, VisionConfig] = {
    "siglip-so400m-patch14-384": _so400m(384, 14),
    "siglip2-so400m-patch14-384": _so400m(384, 14),
    "siglip2-so400m-patch16-384": _so400m(384, 16),
    "siglip2-so400m-patch16-512": _so400m(512, 16),
}
"""Image towers up to the penultimate layer."""


def _cambrian(decoder: str, image_size: int) -> MLLMConfig:
    # The paper's defaults: regions of 6x6 tokens at 384 pixels, 8x8 at 512, so 16 of them; 4 context tokens.
    side = 6 if image_size == 384 else 8
    return MLLMConfig(
        DECODERS[decoder],
        TOWERS[f"siglip2-so400m-patch16-{image_size}"],
        GazeConfig(region=(side, side), context_tokens=4, top_k=4),
        dtype="bfloat16",
        param_dtype="bfloat16",
    )


def cambrian_canvases(size: int, max_subimages: int) -> tuple[tuple[int, int], ...]:
    """Canvases (height, width) of up to ``max_subimages`` tiles of ``size`` pixels, in Cambrian-S's order."""
    sides = range(1, max_subimages + 1)
    return tuple((y * size, x * size) for x in sides for y in sides if x * y <= max_subimages)


VIEWS: Mapping[str, ViewConfig] = {
    "llava-onevision": ViewConfig(
        "llava_onevision",
        canvases=tuple((384 * y, 384 * x) for y in range(1, 7) for x in range(1, 7)),
        max_tiles=9,
        frame_side=14,
    ),
    "cambrian-s": ViewConfig("cambrian_s", canvases=cambrian_canvases(384, 9), image_side=27, frame_side=8),
}
"""What the published checkpoints make of images and frames with their tower of 384 pixels and 27x27 tokens;
Cambrian-S as it is evaluated, where a frame has up to 64 tokens."""


def _published(decoder: DecoderConfig, tower: str, views: str) -> MLLMConfig:
    # Regions of 7x7 tokens make 16 of the 27x27, as many as the paper's.
    return MLLMConfig(
        decoder,
        TOWERS[tower],
        GazeConfig(region=(7, 7), context_tokens=0),
        dtype="bfloat16",
        param_dtype="bfloat16",
        views=VIEWS[views],
    )


def _llava_onevision(decoder: str, rows: int) -> MLLMConfig:
    # Two tokens were added to the vocabulary, and rows up to a multiple of 64.
    widened = dataclasses.replace(DECODERS[decoder], vocab_size=rows)
    return _published(widened, "siglip-so400m-patch14-384", "llava-onevision")


def _cambrian_s(decoder: str) -> MLLMConfig:
    return _published(DECODERS[decoder], "siglip2-so400m-patch14-384", "cambrian-s")


MODELS: Mapping[str, MLLMConfig] = {
    "cambrian-4b-384": _cambrian("qwen3-4b", 384),
    "cambrian-4b-512": _cambrian("qwen3-4b", 512),
    "cambrian-7b-384": _cambrian("qwen2.5-7b", 384),
    "cambrian-7b-512": _cambrian("qwen2.5-7b", 512),
    "llava-onevision-qwen2-0.5b": _llava_onevision("qwen2.5-0.5b", 152000),
    "llava-onevision-qwen2-7b": _llava_onevision("qwen2.5-7b", 152128),
    "cambrian-s-0.5b": _cambrian_s("qwen2.5-0.5b"),
    "cambrian-s-1.5b": _cambrian_s("qwen2.5-1.5b"),
    "cambrian-s-3b": _cambrian_s("qwen2.5-3b"),
    "cambrian-s-7b": _cambrian_s("qwen2.5-7b"),
}
"""Whole models.

The paper's, "cambrian-4b" and "cambrian-7b", select 4 of 16 regions per query: its best average at 144 of 576
entries. The published LLaVA-OneVision and Cambrian-S are dense, as conversion writes them.
"""


def dense(config: MLLMConfig) -> MLLMConfig:
    """The paper's baseline of a model: every visual token, no context tokens."""
    return dataclasses.replace(config, gaze=dataclasses.replace(config.gaze, top_k=None, context_tokens=0))
