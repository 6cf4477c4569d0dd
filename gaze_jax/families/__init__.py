"""Model families, one file each, and the tables of all families.

A family of multimodal models is a :class:`gaze_jax.families.family.Family`, identified by ``views.style`` of
a model's config. A checkpoint to convert is identified by ``model_type`` of ``config.json``, never by a name
or a path, and also by the class in ``architectures`` if the original code uses one ``model_type`` twice.
"""

from collections.abc import Mapping

from gaze_jax.core.layout import ViewConfig
from gaze_jax.data.views import check_style
from gaze_jax.errors import UserError
from gaze_jax.families import cambrian, llama, qwen, siglip
from gaze_jax.families.cambrian_s import CAMBRIAN_S
from gaze_jax.families.family import Family
from gaze_jax.families.joint import joint_rules
from gaze_jax.families.llava_onevision import LLAVA_ONEVISION
from gaze_jax.families.siglip import feature_tower
from gaze_jax.families.square import SQUARE
from gaze_jax.families.table import Conversion, Json
from gaze_jax.models.config import DecoderConfig, MLLMConfig, VisionConfig

__all__ = [
    "CONVERSIONS",
    "DECODERS",
    "FAMILIES",
    "MODELS",
    "TOWERS",
    "check_views",
    "conversion_of",
    "feature_tower",
    "get_family",
    "joint_rules",
    "model_type_of",
    "written_as",
]

FAMILIES: Mapping[str, Family] = {
    family.views.name: family for family in (SQUARE, LLAVA_ONEVISION, CAMBRIAN_S)
}
"""``views.style`` -> family of multimodal models."""

DECODERS: Mapping[str, DecoderConfig] = {**qwen.DECODERS}
"""Published name -> language model."""

TOWERS: Mapping[str, VisionConfig] = {**siglip.TOWERS}
"""Published name -> image tower, up to the layer whose features multimodal LLMs use."""

MODELS: Mapping[str, MLLMConfig] = {
    **cambrian.MODELS,
    **{name: config for family in FAMILIES.values() for name, config in family.models.items()},
}
"""Name -> multimodal model."""

CONVERSIONS: Mapping[str, Conversion] = {
    **qwen.CONVERSIONS,
    **llama.CONVERSIONS,
    **siglip.CONVERSIONS,
    **{name: each for family in FAMILIES.values() for name, each in family.conversions.items()},
}
"""``model_type`` -> conversion."""

_REFUSED: Mapping[str, str] = {**siglip.REFUSED}

_ALIASES = {alias: name for name, conversion in CONVERSIONS.items() for alias in conversion.aliases}


def get_family(style: str) -> Family:
    """The family named by ``views.style`` of a model's config.

    Raises:
      UserError: there is no such family.
    """
    if style not in FAMILIES:
        raise UserError(f"views.style={style!r} names no family; the families are {', '.join(FAMILIES)}.")
    return FAMILIES[style]


def check_views(views: ViewConfig) -> None:
    """Check the views of a model's config read from a file.

    Raises:
      UserError: no family has their style, or a field is set that their family would ignore.
    """
    check_style(get_family(views.style).views, views)


def model_type_of(config: Json, where: str) -> str:
    """The key of a ``config.json`` in :data:`CONVERSIONS`: its ``model_type``, unless that is ambiguous.

    Args:
      config: the file's content.
      where: the file's name in error messages.

    Raises:
      UserError: there is no conversion for the model.
    """
    kind, classes = config.get("model_type"), config.get("architectures")
    for alias in _ALIASES:
        if kind == alias[0] and isinstance(classes, list) and alias[1] in classes:
            return _ALIASES[alias]
    if not isinstance(kind, str) or kind not in {**CONVERSIONS, **_REFUSED}:
        raise UserError(
            f"{where} has model_type {kind!r}; the models that can be converted are {', '.join(CONVERSIONS)}."
        )
    if kind in _REFUSED:
        raise UserError(f"{where} has model_type {kind!r}: it {_REFUSED[kind]}.")
    return kind


def conversion_of(config: Json, where: str) -> Conversion:
    """The conversion of a ``config.json``; see :func:`model_type_of`."""
    return CONVERSIONS[model_type_of(config, where)]


def written_as(config: DecoderConfig | VisionConfig) -> str:
    """The ``model_type`` under which a decoder or tower without a source checkpoint is written.

    Raises:
      UserError: no family matches the config.
    """
    part = "vision" if isinstance(config, VisionConfig) else "decoder"
    known = {name: conversion for name, conversion in CONVERSIONS.items() if conversion.part == part}
    for name, conversion in known.items():
        if conversion.writes(config):
            return name
    raise UserError(f"{config} is none of {', '.join(known)}, so transformers has no class for it.")
