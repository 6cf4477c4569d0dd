"""What whole multimodal models have in common: tower, projector, newline embedding, language model."""

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
    """Projector, newline and context tokens; by default under transformers' names where it has them."""
    rules = [
        *linear("projector/linear_1", projector[0], 0, bias=True),
        *linear("projector/linear_2", projector[1], 0, bias=True),
        Rule("newline", newline),
    ]
    if context_tokens:
        rules.append(Rule("context", "context_tokens"))
    return tuple(rules)


def whole_rules(config: MLLMConfig, names: Names) -> tuple[Rule, ...]:
    """The tables of all parts, under the names that they have in a whole model."""
    tower = (dataclasses.replace(r, tensor=names.vision + r.tensor) for r in siglip_rules(config.tower))
    decoder = (dataclasses.replace(r, tensor=names.decoder + r.tensor) for r in decoder_rules(config.decoder))
    return (*tower, *joint_rules(0, names.projector, names.newline), *decoder)


def whole_unused(config: MLLMConfig, name: str, names: Names) -> bool:
    """Whether ``name`` belongs to the tower and lies behind the features that are read."""
    bare = name.removeprefix(names.vision)
    return name.startswith(names.vision) and siglip_unused(config.tower, bare)


def whole_implied(config: MLLMConfig, names: Names) -> Mapping[str, str]:
    """A tied head under its name in a whole model."""
    pairs = implied_head(config.decoder).items()
    return {names.decoder + copy: names.decoder + original for copy, original in pairs}


def whole_config(decoder: DecoderConfig, tower: VisionConfig, views: ViewConfig) -> MLLMConfig:
    """A model that computes what the original does: dense, causal over all visual tokens, no context tokens.

    Raises:
      ValueError: tiles that are no multiples of the tower's image size.
    """
    side = min(_REGION, tower.grid)
    gaze = GazeConfig((side, side), context_tokens=0, visual_scope="all", visual_causal=True)
    config = MLLMConfig(decoder, tower, gaze, views=views)
    _ = config.layout  # checks the views
    return config


def published(decoder: DecoderConfig, tower: VisionConfig, views: ViewConfig) -> MLLMConfig:
    """:func:`whole_config` in bfloat16, as whole models are published."""
    config = whole_config(decoder, tower, views)
    return dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")


def pairs(value: Sequence[object], name: str) -> tuple[tuple[int, int], ...]:
    """A list of pairs of numbers, from field ``name``.

    Raises:
      UserError: it is something else.
    """
    found = tuple(tuple(pair) for pair in value if isinstance(pair, list))
    right = all(len(pair) == 2 and all(type(side) is int and side > 0 for side in pair) for pair in found)
    if not found or not right or len(found) != len(value):
        raise UserError(f"config.json has {name}={value!r}, which should be a list of [height, width].")
    return tuple((first, second) for first, second in found)


def max_tiles(value: str, name: str) -> int:
    """N of "anyres_max_N", the value of field ``name``.

    Raises:
      UserError: it says something else.
    """
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", value)
    if found is None:
        raise UserError(f"config.json has {name}={value!r}, which is not supported; only 'anyres_max_N' is.")
    return int(found[1])


def named_tower(name: str, given: VisionConfig | None, fields: Fields) -> VisionConfig:
    """The tower of a model whose ``config.json`` only names it.

    Args:
      name: a path or a Hub id.
      given: the tower that another directory describes, up to the features; None without one.
      fields: of config.json; its ``mm_hidden_size`` must be the tower's width.

    Raises:
      UserError: the tower is not known, or is not the one that was given.
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
    """A Qwen2 whose fields lie at the top of ``config.json`` and whose code sets ``rope_scaling`` to None."""
    plain = {name: value for name, value in config.items() if name not in ("rope_scaling", "rope_parameters")}
    nested = config.get("rope_parameters")
    if isinstance(nested, dict) and "rope_theta" in nested:
        plain["rope_theta"] = nested["rope_theta"]
    return read_qwen2(plain)


def scaling_remarks(config: Json) -> tuple[str, ...]:
    """Says so if :func:`unscaled_decoder` ignored something."""
    nested = config.get("rope_parameters")
    scaling = config.get("rope_scaling")
    if isinstance(nested, dict) and nested.get("rope_type", "default") != "default":
        scaling = nested
    if scaling is None:
        return ()
    return (f"RoPE scaling {scaling} of config.json is ignored, as the original code does.",)
