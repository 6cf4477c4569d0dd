"""Shared by multimodal models: tower, projector, newline embedding, language model."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from gaze_jax.core.layout import ViewConfig
from gaze_jax.errors import UserError
from gaze_jax.families.decoder import decoder_rules, implied_head
from gaze_jax.families.qwen import read_qwen2
from gaze_jax.families.siglip import TOWERS, siglip_rules, siglip_unused
from gaze_jax.families.table import Fields, Json, Names, Rule, linear
from gaze_jax.models.config import DecoderConfig, GazeConfig, MLLMConfig, VisionConfig

BUFFERS = {"*.rotary_emb.inv_freq": "a buffer that is computed from rope_theta"}

_REGION = 7  # 16 regions of the 27x27 tokens that these models were trained with


def joint_rules(
    context_tokens: int,
    projector: tuple[str, str] = ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    newline: str = "image_newline",
) -> tuple[Rule, ...]:
    """Rules of projector, newline and context tokens; default names are those of transformers, if any."""
    rules = [
        *linear("projector/linear_1", projector[0], 0, bias=True),
        *linear("projector/linear_2", projector[1], 0, bias=True),
        Rule("newline", newline),
    ]
    if context_tokens:
        rules.append(Rule("context", "context_tokens"))
    return tuple(rules)


def whole_rules(config: MLLMConfig, names: Names) -> tuple[Rule, ...]:
    """The rules of all parts, under their names in a multimodal model."""
    tower = (dataclasses.replace(r, tensor=names.vision + r.tensor) for r in siglip_rules(config.tower))
    decoder = (dataclasses.replace(r, tensor=names.decoder + r.tensor) for r in decoder_rules(config.decoder))
    return (*tower, *joint_rules(0, names.projector, names.newline), *decoder)


def whole_unused(config: MLLMConfig, name: str, names: Names) -> bool:
    """Whether ``name`` is a tensor of the tower after the layer whose features are used."""
    bare = name.removeprefix(names.vision)
    return name.startswith(names.vision) and siglip_unused(config.tower, bare)


def whole_implied(config: MLLMConfig, names: Names) -> Mapping[str, str]:
    """:func:`implied_head` under the names of a multimodal model."""
    pairs = implied_head(config.decoder).items()
    return {names.decoder + copy: names.decoder + original for copy, original in pairs}


def whole_config(decoder: DecoderConfig, tower: VisionConfig, views: ViewConfig) -> MLLMConfig:
    """The config equivalent to the original: dense, causal over all visual tokens, no context tokens.

    Raises:
      ValueError: tiles are not multiples of the tower's image size.
    """
    side = min(_REGION, tower.grid)
    gaze = GazeConfig((side, side), context_tokens=0, visual_scope="all", visual_causal=True)
    config = MLLMConfig(decoder, tower, gaze, views=views)
    _ = config.layout  # checks the views
    return config


def published(decoder: DecoderConfig, tower: VisionConfig, views: ViewConfig) -> MLLMConfig:
    """:func:`whole_config` in bfloat16, the dtype of published multimodal models."""
    config = whole_config(decoder, tower, views)
    return dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")


def pairs(value: Sequence[object], name: str) -> tuple[tuple[int, int], ...]:
    """The value of field ``name``, checked to be a list of pairs of numbers.

    Raises:
      UserError: it is not.
    """
    found = tuple(tuple(pair) for pair in value if isinstance(pair, list))
    right = all(len(pair) == 2 and all(type(side) is int and side > 0 for side in pair) for pair in found)
    if not found or not right or len(found) != len(value):
        raise UserError(f"config.json has {name}={value!r}, which should be a list of [height, width].")
    return tuple((first, second) for first, second in found)


def max_tiles(value: str, name: str) -> int:
    """N of "anyres_max_N", the value of field ``name``.

    Raises:
      UserError: the value has another form.
    """
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", value)
    if found is None:
        raise UserError(f"config.json has {name}={value!r}, which is not supported; only 'anyres_max_N' is.")
    return int(found[1])


def named_tower(name: str, given: VisionConfig | None, fields: Fields) -> VisionConfig:
    """The tower of a model whose ``config.json`` only names it.

    Args:
      name: a path or a Hub id.
      given: the tower described by another directory, up to the features; None without one.
      fields: the fields of config.json; ``mm_hidden_size`` must be the tower's width.

    Raises:
      UserError: the tower is unknown, or differs from ``given``.
    """
    published = TOWERS.get(name.rstrip("/").rpartition("/")[2])
    tower = published if given is None else given
    if tower is None:
        raise UserError(
            f"{fields.where} does not describe its image tower {name!r}, which is none of "
            f"{', '.join(TOWERS)}; give a directory whose config.json does with --vision."
        )
    if published not in (None, tower):
        want, have = dataclasses.asdict(published or tower), dataclasses.asdict(tower)
        wrong = [f"{key}={have[key]} instead of {want[key]}" for key in want if have[key] != want[key]]
        raise UserError(
            f"{fields.where} names the tower {name}, but the one that is given has "
            f"{', '.join(wrong)}; give that one."
        )
    width = fields.get("mm_hidden_size", int, tower.width)
    if width != tower.width:
        raise UserError(
            f"{fields.where} has mm_hidden_size={width} but its tower {name!r} has {tower.width}."
        )
    return tower


def unscaled_decoder(config: Json) -> DecoderConfig:
    """A Qwen2 with its fields at the top of ``config.json``, whose code sets ``rope_scaling`` to None."""
    plain = {name: value for name, value in config.items() if name not in ("rope_scaling", "rope_parameters")}
    nested = config.get("rope_parameters")
    if isinstance(nested, dict) and "rope_theta" in nested:
        plain["rope_theta"] = nested["rope_theta"]
    return read_qwen2(plain)


def scaling_remarks(config: Json) -> tuple[str, ...]:
    """A remark if :func:`unscaled_decoder` ignored a ``rope_scaling``; otherwise empty."""
    nested = config.get("rope_parameters")
    scaling = config.get("rope_scaling")
    if isinstance(nested, dict) and nested.get("rope_type", "default") != "default":
        scaling = nested
    if scaling is None:
        return ()
    return (f"RoPE scaling {scaling} of config.json is ignored, as the original code does.",)
