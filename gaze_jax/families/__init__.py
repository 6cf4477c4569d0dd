"""The families that can be converted. Names, shapes and defaults are those of the original code.

Dispatch is on ``model_type`` of ``config.json``, never on a name or a path; where the original code calls two
kinds of model alike, on the class in ``architectures`` too.
"""

from collections.abc import Mapping

from gaze_jax.errors import UserError
from gaze_jax.families.cambrian import CAMBRIAN_QWEN
from gaze_jax.families.decoder import DECODERS, decoder_family
from gaze_jax.families.llava import LLAVA_ONEVISION, LLAVA_QWEN
from gaze_jax.families.multimodal import joint_rules
from gaze_jax.families.table import Family, Json
from gaze_jax.families.tower import SIGLIP, feature_tower

__all__ = ["FAMILIES", "decoder_family", "family_of", "family_type", "feature_tower", "joint_rules"]

FAMILIES: Mapping[str, Family] = {
    **DECODERS,
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "llava_onevision": LLAVA_ONEVISION,
    "llava_qwen": LLAVA_QWEN,
    "cambrian_qwen": CAMBRIAN_QWEN,
}
"""``model_type`` -> family."""

_LLAVA_NEXT = "LlavaQwenForCausalLM"


def family_type(config: Json, where: str) -> str:
    """The key in :data:`FAMILIES` of a ``config.json``: its ``model_type``, unless that says too little.

    Raises:
      UserError: there is no such family.
    """
    kind = config.get("model_type")
    if kind in ("siglip2", "siglip2_vision_model"):
        raise UserError(
            f"{where} is a NaFlex SigLIP2 (model_type {kind!r}), which takes images of any shape and is not "
            "supported; use a fixed-resolution SigLIP2, whose model_type is 'siglip'."
        )
    # LLaVA-NeXT's code writes "llava", which is another model in transformers, or the language model's type.
    classes = config.get("architectures")
    if kind in ("llava", "qwen2") and isinstance(classes, list) and _LLAVA_NEXT in classes:
        return "llava_qwen"
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{where} has model_type {kind!r}; the families that can be converted are {', '.join(FAMILIES)}."
        )
    return kind


def family_of(config: Json, where: str) -> Family:
    """The family of a ``config.json``; see :func:`family_type`."""
    return FAMILIES[family_type(config, where)]
