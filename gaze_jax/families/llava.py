"""LLaVA-OneVision: as transformers has it, and as LLaVA-NeXT's own code saves it.

Papers and code: "LLaVA-OneVision: Easy Visual Task Transfer" (Li et al., arXiv 2408.03326);
transformers' ``LlavaOnevisionForConditionalGeneration``; LLaVA-NeXT's ``LlavaQwenForCausalLM``.
"""

import functools
import itertools
import re
from typing import Any

from gaze_jax.core.layout import ViewConfig
from gaze_jax.errors import UserError
from gaze_jax.families.decoder import read_decoder
from gaze_jax.families.multimodal import (
    BUFFERS,
    max_tiles,
    named_tower,
    pairs,
    scaling_remarks,
    unscaled_decoder,
    whole_config,
    whole_implied,
    whole_rules,
    whole_unused,
)
from gaze_jax.families.table import Family, Fields, Json, Names
from gaze_jax.families.tower import feature_tower, read_siglip
from gaze_jax.models.config import MLLMConfig, VisionConfig

_TEXT_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
"""Of transformers' Qwen2Config: a nested config omits what is default."""

_CANVASES = tuple(itertools.product(range(384, 2305, 384), repeat=2))
"""Of transformers' LlavaOnevisionConfig."""


def _views(tower: VisionConfig, canvases: tuple[tuple[int, int], ...], tiles: int | None) -> ViewConfig:
    half = -(-tower.grid // 2)  # frames are pooled to half their side, rounded up
    return ViewConfig("llava_onevision", canvases, max_tiles=tiles, frame_side=half)


def _nested(fields: Fields, name: str, kind: str) -> dict[str, Any]:
    values = fields.get(name, dict)
    Fields(values, f"{fields.where}: {name}").only("model_type", kind)
    return {key: value for key, value in values.items() if value is not None}


def _read_llava_onevision(config: Json) -> MLLMConfig:
    fields = Fields(config, "config.json")
    text = _TEXT_DEFAULTS | _nested(fields, "text_config", "qwen2")
    _nested(fields, "vision_config", "siglip_vision_model")
    fields.only("vision_feature_select_strategy", "full")
    fields.only("projector_hidden_act", "gelu")
    fields.only("multimodal_projector_bias", True)
    fields.only("quantization_config", None)
    # transformers ties where either level says so.
    tied = fields.get("tie_word_embeddings", bool, False) or text.get("tie_word_embeddings", False)
    decoder = read_decoder(
        text | {"tie_word_embeddings": tied}, kind="qwen2", where=f"{fields.where}: text_config"
    )
    layer = fields.get("vision_feature_layer", int, -1)
    tower = feature_tower(read_siglip(config), layer, "vision_feature_layer")
    name = "image_grid_pinpoints"
    canvases = pairs(fields.get(name, list, [list(canvas) for canvas in _CANVASES]), name)
    name = "vision_aspect_ratio"
    tiles = max_tiles(fields.get(name, str, "anyres_max_9"), name)
    return whole_config(decoder, tower, _views(tower, canvases, tiles))


_HF = Names(
    decoder="language_model.",
    vision="vision_tower.",
    projector=("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    newline="image_newline",
)
"""What transformers 5 saves."""


def _hf_name(name: str) -> str:
    """Names of the Hub's files (transformers 4) and names in memory (transformers 5) as 5 saves them."""
    if name == "lm_head.weight":
        return f"{_HF.decoder}{name}"
    name = name.removeprefix("model.")
    name = re.sub(r"^vision_tower\.vision_model\.", _HF.vision, name)
    return re.sub(r"^language_model\.(?!model\.|lm_head\.)", f"{_HF.decoder}model.", name)


LLAVA_ONEVISION = Family(
    part="model",
    read_config=_read_llava_onevision,
    rules=functools.partial(whole_rules, names=_HF),
    names=_HF,
    canonical=_hf_name,
    unused=functools.partial(whole_unused, names=_HF),
    implied=functools.partial(whole_implied, names=_HF),
    left_out=BUFFERS,
)


def _next_canvases(value: Any, size: int) -> tuple[tuple[int, int], ...]:
    """LLaVA-NeXT's (width, height), as a list or as the first and last pair of counts of tiles."""
    name = "image_grid_pinpoints"
    if isinstance(value, str):
        ends = [tuple(map(int, pair)) for pair in re.findall(r"\((\d+)x(\d+)\)", value)]
        if not ends:
            raise UserError(f"config.json has {name}={value!r}; expected such as '(1x1),...,(6x6)'.")
        spans = (range(first, last + 1) for first, last in zip(ends[0], ends[-1], strict=True))
        return tuple((height * size, width * size) for width, height in itertools.product(*spans))
    return tuple((height, width) for width, height in pairs(value, name))


def _read_llava_next(config: Json, tower: VisionConfig | None = None) -> MLLMConfig:
    fields = Fields(config, "config.json")
    fields.only("mm_projector_type", "mlp2x_gelu", required=True)
    fields.only("mm_patch_merge_type", "spatial_unpad", required=True)
    fields.only("mm_vision_select_layer", -2)
    fields.only("mm_vision_select_feature", "patch")
    fields.only("mm_newline_position", "one_token")
    fields.only("mm_spatial_pool_mode", "bilinear")
    fields.only("mm_spatial_pool_stride", None, 2)
    fields.only("mm_resampler_type", None)
    fields.only("mm_use_im_start_end", False)
    for name in ("add_faster_video", "s2"):
        fields.only(name, None, False)
    decoder = unscaled_decoder(config)
    tower = named_tower(fields.get("mm_vision_tower", str), tower, fields)
    pinpoints = config.get("image_grid_pinpoints")
    if not isinstance(pinpoints, str):
        pinpoints = fields.get("image_grid_pinpoints", list)
    canvases = _next_canvases(pinpoints, tower.image_size)
    ratio = fields.get("image_aspect_ratio", str)
    tiles = None if ratio == "anyres" else max_tiles(ratio, "image_aspect_ratio")
    return whole_config(decoder, tower, _views(tower, canvases, tiles))


_NEXT = Names(
    decoder="",
    vision="model.vision_tower.vision_tower.vision_model.",
    projector=("model.mm_projector.0", "model.mm_projector.2"),
    newline="model.image_newline",
)

LLAVA_QWEN = Family(
    part="model",
    read_config=_read_llava_next,
    rules=functools.partial(whole_rules, names=_NEXT),
    names=_NEXT,
    tower_elsewhere=True,
    remarks=scaling_remarks,
    unused=functools.partial(whole_unused, names=_NEXT),
    implied=functools.partial(whole_implied, names=_NEXT),
    left_out=BUFFERS,
)
