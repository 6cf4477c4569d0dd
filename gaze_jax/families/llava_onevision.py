"""LLaVA-OneVision: checkpoints of transformers and of LLaVA-NeXT's own code.

A single image is treated as in transformers: resized to a square, followed by its tiles on black, unpadded,
shrunk if there are many, with a newline after each row of tiles. One of several images (or a single one
without canvases) is padded with grey to a square, kept whole, and followed by one newline. A frame is resized
to a square and pooled; one newline follows the last frame.

Papers and code: "LLaVA-OneVision: Easy Visual Task Transfer" (Li et al., arXiv 2408.03326);
transformers' ``LlavaOnevisionForConditionalGeneration``; LLaVA-NeXT's ``LlavaQwenForCausalLM``.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence

from gaze_jax.chat.messages import Content, media_first
from gaze_jax.core.layout import ViewConfig, VisualLayout
from gaze_jax.data.pixels import BLACK, Size
from gaze_jax.data.sample import Video
from gaze_jax.data.views import Grid, ViewStyle, shown_grids, tile_canvas, unpadded_grid, whole_grid
from gaze_jax.errors import UserError
from gaze_jax.families.family import Family
from gaze_jax.families.joint import (
    BUFFERS,
    max_tiles,
    named_tower,
    pairs,
    published,
    scaling_remarks,
    unscaled_decoder,
    whole_config,
    whole_implied,
    whole_rules,
    whole_unused,
)
from gaze_jax.families.qwen import DECODERS, read_qwen2
from gaze_jax.families.siglip import TOWERS, feature_tower, read_siglip
from gaze_jax.families.table import Conversion, Fields, Json, Names, Original
from gaze_jax.media.video import FrameSampling
from gaze_jax.models.config import MLLMConfig, VisionConfig

STYLE = "llava_onevision"

SHRINK_ABOVE = 1.1
"""A tile grid is shrunk only if its side is more than this many times what ``max_tiles`` allows."""


def _shrunk(shape: tuple[int, int], layout: VisualLayout, size: Size) -> tuple[int, int]:
    """The shape of an unpadded tile grid after the limit on its tokens."""
    limit = layout.views.max_tiles
    ratio = 0.0 if limit is None else math.sqrt(shape[0] * shape[1] / (limit * layout.tokens))
    if ratio <= SHRINK_ABOVE:
        return shape
    small = int(shape[0] // ratio), int(shape[1] // ratio)
    if 0 in small:
        raise UserError(
            f"An image of {size[0]}x{size[1]} pixels has {shape[0]}x{shape[1]} tokens, and the limit of "
            f"views.max_tiles={limit} leaves it none; crop it, or raise views.max_tiles."
        )
    return small


def _image_grids(layout: VisualLayout, size: Size, alone: bool) -> tuple[list[Grid], bool]:
    side, canvas = layout.grid, tile_canvas(layout, size, alone)
    if canvas is None:
        return [whole_grid(layout, size, side, "pad")], True
    # transformers rounds to 7 digits before it truncates to whole rows.
    tiles = unpadded_grid(layout, size, side, canvas=canvas, colour=BLACK, digits=7)
    tiles = dataclasses.replace(tiles, shape=_shrunk(tiles.shape, layout, size))
    return shown_grids([whole_grid(layout, size, side, "squash"), tiles], size, "An image"), False


def _frame_grid(layout: VisualLayout, size: Size) -> Grid:
    return whole_grid(layout, size, layout.views.frame_side or layout.grid, "squash")


def _arrange(items: tuple[Content, ...]) -> tuple[Content, ...]:
    """Images, then videos, then the text."""
    return media_first(sorted(items, key=lambda item: isinstance(item, Video)))


_TEXT_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
"""Defaults of transformers' Qwen2Config; a nested config omits them."""

_CANVASES = tuple(itertools.product(range(384, 2305, 384), range(384, 2305, 384)))
"""Default canvases of transformers' LlavaOnevisionConfig."""


def _views(tower: VisionConfig, canvases: tuple[tuple[int, int], ...], tiles: int | None) -> ViewConfig:
    half = -(-tower.grid // 2)  # frames are pooled to half their side, rounded up
    return ViewConfig(STYLE, canvases, max_tiles=tiles, frame_side=half)


def _nested(fields: Fields, name: str, kind: str) -> dict[str, object]:
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
    # transformers ties the embeddings if either level says so.
    tied = fields.get("tie_word_embeddings", bool, False) or text.get("tie_word_embeddings", False)
    decoder = read_qwen2(text | {"tie_word_embeddings": tied}, f"{fields.where}: text_config")
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
"""Names that transformers 5 saves."""


def _hf_name(name: str) -> str:
    """Map names of the Hub's files (transformers 4) and in memory (5) to those that transformers 5 saves."""
    if name == "lm_head.weight":
        return f"{_HF.decoder}{name}"
    name = name.removeprefix("model.")
    name = re.sub(r"^vision_tower\.vision_model\.", _HF.vision, name)
    return re.sub(r"^language_model\.(?!model\.|lm_head\.)", f"{_HF.decoder}model.", name)


_TRANSFORMERS = Conversion(
    part="model",
    read_config=_read_llava_onevision,
    rules=functools.partial(whole_rules, names=_HF),
    names=_HF,
    canonical=_hf_name,
    unused=functools.partial(whole_unused, names=_HF),
    implied=functools.partial(whole_implied, names=_HF),
    left_out=BUFFERS,
    original=Original(
        "LlavaOnevisionForConditionalGeneration",
        layers="model.language_model.layers",
        tower="model.vision_tower",
        feature_layer="config.vision_feature_layer",
        projector="model.multi_modal_projector",
        newline="model.image_newline",
    ),
)


def _next_canvases(value: str | Sequence[object], size: int) -> tuple[tuple[int, int], ...]:
    """LLaVA-NeXT's canvases (width, height): a list, or the first and last pair of tile counts."""
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

_LLAVA_NEXT = Conversion(
    part="model",
    read_config=_read_llava_next,
    rules=functools.partial(whole_rules, names=_NEXT),
    names=_NEXT,
    # LLaVA-NeXT's code writes "llava", a different model in transformers, or the language model's type.
    aliases=(("llava", "LlavaQwenForCausalLM"), ("qwen2", "LlavaQwenForCausalLM")),
    tower_elsewhere=True,
    remarks=scaling_remarks,
    unused=functools.partial(whole_unused, names=_NEXT),
    implied=functools.partial(whole_implied, names=_NEXT),
    left_out=BUFFERS,
)


def _published(decoder: str, rows: int) -> MLLMConfig:
    # Two tokens were added to the vocabulary, which was then padded to a multiple of 64 rows.
    widened = dataclasses.replace(DECODERS[decoder], vocab_size=rows)
    tower = TOWERS["siglip-so400m-patch14-384"]
    return published(widened, tower, _views(tower, _CANVASES, 9))


MODELS: Mapping[str, MLLMConfig] = {
    "llava-onevision-qwen2-0.5b": _published("qwen2.5-0.5b", 152000),
    "llava-onevision-qwen2-7b": _published("qwen2.5-7b", 152128),
}
"""Published sizes, with dense attention as written by conversion."""

LLAVA_ONEVISION = Family(
    views=ViewStyle(
        STYLE, _image_grids, _frame_grid, video_end_newline=True, unused={"image_side": "pools no image"}
    ),
    frames=FrameSampling(max_frames=32),
    arrange=_arrange,
    # transformers' template has no system prompt; lmms-lab's own code has Cambrian-S's.
    system=None,
    conversions={"llava_onevision": _TRANSFORMERS, "llava_qwen": _LLAVA_NEXT},
    models=MODELS,
)
