"""Cambrian-S, as its own code saves it.

Paper: "Cambrian-S: Towards Spatial Supersensing in Video" (arXiv 2511.04670).
"""

import functools
import math

from gaze_jax.core.layout import ViewConfig
from gaze_jax.errors import UserError
from gaze_jax.families.multimodal import (
    BUFFERS,
    named_tower,
    scaling_remarks,
    unscaled_decoder,
    whole_config,
    whole_implied,
    whole_rules,
    whole_unused,
)
from gaze_jax.families.table import Family, Fields, Json, Names
from gaze_jax.models.config import MLLMConfig, VisionConfig
from gaze_jax.models.published import cambrian_canvases


def _side(fields: Fields, name: str) -> int:
    """Tokens per side of a square of ``name`` tokens."""
    tokens = fields.get(name, int)
    side = math.isqrt(max(tokens, 0))
    if side < 1 or side * side != tokens:
        raise UserError(f"{fields.where} has {name}={tokens}, which is no positive square.")
    return side


def _canvases(fields: Fields, size: int) -> tuple[tuple[int, int], ...]:
    """(height, width) of the tiles, in the order in which the original code tries them: by width first."""
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
        "cambrian_s",
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
    """Without what torch-xla's FSDP wraps modules in."""
    return name.replace("_orig_module.", "")


CAMBRIAN_QWEN = Family(
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
