"""Cambrian-S: checkpoints as its own code saves them, and its views of images and frames.

A newline always follows each row. A single image is padded with grey to a square, pooled and unpadded; its
tiles on grey follow, pooled and unpadded. One of several images (or a single one without canvases) has no
tiles. A frame is padded, pooled to ``frame_side`` and unpadded.

Paper: "Cambrian-S: Towards Spatial Supersensing in Video" (arXiv 2511.04670).
"""

import functools
import math
from collections.abc import Mapping

from gaze_jax.chat.conversation import START, Supervision, turn_spans
from gaze_jax.chat.messages import media_first
from gaze_jax.core.layout import ViewConfig, VisualLayout
from gaze_jax.data.pixels import GREY, Size
from gaze_jax.data.tokenizer import END
from gaze_jax.data.views import Grid, ViewStyle, shown_grids, tile_canvas, unpadded_grid
from gaze_jax.errors import UserError
from gaze_jax.families.family import Family
from gaze_jax.families.joint import (
    BUFFERS,
    named_tower,
    published,
    scaling_remarks,
    unscaled_decoder,
    whole_config,
    whole_implied,
    whole_rules,
    whole_unused,
)
from gaze_jax.families.qwen import DECODERS
from gaze_jax.families.siglip import TOWERS
from gaze_jax.families.table import Conversion, Fields, Json, Names
from gaze_jax.media.video import FrameSampling
from gaze_jax.models.config import MLLMConfig, VisionConfig

STYLE = "cambrian_s"


def _snapshot(layout: VisualLayout, size: Size, side: int) -> Grid:
    """A whole image or frame."""
    canvas = layout.image_size, layout.image_size
    return unpadded_grid(layout, size, side, canvas=canvas, colour=GREY, fit="pad")


def _image_grids(layout: VisualLayout, size: Size, alone: bool) -> tuple[list[Grid], bool]:
    side = layout.views.image_side or layout.grid
    grids = [_snapshot(layout, size, side)]
    canvas = tile_canvas(layout, size, alone)
    if canvas is not None:
        grids.append(unpadded_grid(layout, size, side, canvas=canvas, colour=GREY))
    return shown_grids(grids, size, "An image"), False


def _frame_grid(layout: VisualLayout, size: Size) -> Grid:
    side = layout.views.frame_side or layout.grid
    return shown_grids([_snapshot(layout, size, side)], size, "A frame")[0]


def cambrian_canvases(size: int, max_subimages: int) -> tuple[tuple[int, int], ...]:
    """Canvases (height, width) of up to ``max_subimages`` tiles of ``size`` pixels.

    They are in the order in which the original code tries them: by width first.
    """
    sides = range(1, max_subimages + 1)
    return tuple((y * size, x * size) for x in sides for y in sides if x * y <= max_subimages)


def _side(fields: Fields, name: str) -> int:
    """Side of a square grid whose number of tokens is the field ``name``."""
    tokens = fields.get(name, int)
    side = math.isqrt(max(tokens, 0))
    if side < 1 or side * side != tokens:
        raise UserError(f"{fields.where} has {name}={tokens}, which is no positive square.")
    return side


def _canvases(fields: Fields, size: int) -> tuple[tuple[int, int], ...]:
    """(height, width) of the canvases for tiles; none if images are only padded."""
    fields.only("image_aspect_ratio", "anyres", "pad", required=True)
    if fields.get("image_aspect_ratio", str) == "pad":
        return ()
    return cambrian_canvases(size, fields.get("anyres_max_subimages", int))


def _read_cambrian(config: Json, tower: VisionConfig | None = None) -> MLLMConfig:
    fields = Fields(config, "config.json")
    fields.only("mm_projector_type", "mlp2x_gelu", required=True)
    fields.only("connector_only", True, required=True)
    fields.only("mm_vision_select_layer", -2, required=True)
    fields.only("mm_vision_select_feature", "patch")
    fields.only("mm_use_im_start_end", False)
    fields.only("mm_use_im_newline_token", True)
    towers = fields.get("mm_vision_tower_aux_list", list)
    if len(towers) != 1 or not isinstance(towers[0], str):
        raise UserError(f"{fields.where} has mm_vision_tower_aux_list={towers!r}; one tower is supported.")
    decoder = unscaled_decoder(config)
    tower = named_tower(towers[0], tower, fields)
    fields.only("mm_vision_tower_aux_token_len_list", None, [tower.grid**2])
    views = ViewConfig(
        STYLE,
        _canvases(fields, tower.image_size),
        image_side=_side(fields, "si_token_len"),
        frame_side=_side(fields, "miv_token_len"),
    )
    return whole_config(decoder, tower, views)


_NAMES = Names(
    decoder="",
    vision="model.vision_tower_aux_list.0.vision_tower.vision_model.",
    projector=("model.mm_projector.0", "model.mm_projector.2"),
    newline="model.image_newline",
)


def _name(name: str) -> str:
    """The name without the wrapper prefixes of torch-xla's FSDP."""
    return name.replace("_orig_module.", "")


_CONVERSION = Conversion(
    part="model",
    read_config=_read_cambrian,
    rules=functools.partial(whole_rules, names=_NAMES),
    names=_NAMES,
    tower_elsewhere=True,
    remarks=scaling_remarks,
    canonical=_name,
    unused=functools.partial(whole_unused, names=_NAMES),
    implied=functools.partial(whole_implied, names=_NAMES),
    left_out=BUFFERS
    | {"model.nfp_head.*": "nfp_head, which predicts the next frame in training and has no part in answers"},
)

_VIEWS = ViewConfig(STYLE, canvases=cambrian_canvases(384, 9), image_side=27, frame_side=8)
"""As evaluated by its authors, for a tower of 384 pixels and 27x27 tokens: a frame has up to 64 tokens."""


def _published(decoder: str) -> MLLMConfig:
    return published(DECODERS[decoder], TOWERS["siglip2-so400m-patch14-384"], _VIEWS)


MODELS: Mapping[str, MLLMConfig] = {
    "cambrian-s-0.5b": _published("qwen2.5-0.5b"),
    "cambrian-s-1.5b": _published("qwen2.5-1.5b"),
    "cambrian-s-3b": _published("qwen2.5-3b"),
    "cambrian-s-7b": _published("qwen2.5-7b"),
}
"""Published sizes, with dense attention as written by conversion."""

CAMBRIAN_S = Family(
    views=ViewStyle(STYLE, _image_grids, _frame_grid, unused={"max_tiles": "shrinks no tile grid"}),
    frames=FrameSampling(fps=1.0, max_frames=128),
    arrange=media_first,
    system="You are a helpful assistant.",
    # As in LLaVA-NeXT for Qwen, every line feed and every token that starts or ends a turn is a target too,
    # even in turns of system and user.
    supervision=Supervision(turn_spans, ("\n", START, END)),
    conversions={"cambrian_qwen": _CONVERSION},
    models=MODELS,
)
