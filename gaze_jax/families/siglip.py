"""Image towers: SigLIP and fixed-resolution SigLIP2, alone or as part of a complete SigLIP."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from gaze_jax.errors import UserError
from gaze_jax.families.table import Conversion, Fields, Json, Rule, layer_norm, linear
from gaze_jax.models.config import VisionConfig


def _so400m(image_size: int, patch_size: int) -> VisionConfig:
    # Up to layer 26 of 27, whose features multimodal LLMs use.
    return VisionConfig(image_size, patch_size, 1152, depth=26, num_heads=16, mlp_dim=4304)


TOWERS: Mapping[str, VisionConfig] = {
    "siglip-so400m-patch14-384": _so400m(384, 14),
    "siglip2-so400m-patch14-384": _so400m(384, 14),
    "siglip2-so400m-patch16-384": _so400m(384, 16),
    "siglip2-so400m-patch16-512": _so400m(512, 16),
}
"""Published sizes, up to the penultimate layer."""


def _tower_fields(config: Json) -> Json:
    """The vision part, which a complete SigLIP nests; both forms omit default values."""
    nested = config.get("vision_config")
    return config if nested is None else nested


def read_siglip(config: Json) -> VisionConfig:
    """The tower described by a ``config.json``, at its top or in ``vision_config``, with all its layers."""
    fields = Fields(_tower_fields(config), "config.json")
    fields.only("hidden_act", "gelu_pytorch_tanh")
    fields.only("num_channels", 3)
    fields.only("quantization_config", None)
    return VisionConfig(
        image_size=fields.get("image_size", int, 224),
        patch_size=fields.get("patch_size", int, 16),
        width=fields.get("hidden_size", int, 768),
        depth=fields.get("num_hidden_layers", int, 12),
        num_heads=fields.get("num_attention_heads", int, 12),
        mlp_dim=fields.get("intermediate_size", int, 3072),
        norm_eps=fields.get("layer_norm_eps", float, 1e-6),
        post_norm=True,
    )


def _write_siglip(config: VisionConfig) -> dict[str, object]:
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
        "vision_use_head": False,
    }


def siglip_rules(config: VisionConfig) -> tuple[Rule, ...]:
    """Rules of SigLIP and fixed-resolution SigLIP2, for the encoder layers that the features need."""
    block, layer, depth = "vision/layers", "encoder.layers.{}", config.depth
    rules = [
        Rule("vision/patch_embedding/kernel", "embeddings.patch_embedding.weight", "conv"),
        Rule("vision/patch_embedding/bias", "embeddings.patch_embedding.bias"),
        Rule("vision/position_embedding", "embeddings.position_embedding.weight"),
        *layer_norm(f"{block}/layer_norm1", f"{layer}.layer_norm1", depth),
        *layer_norm(f"{block}/layer_norm2", f"{layer}.layer_norm2", depth),
    ]
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        rules += linear(f"{block}/{name}", f"{layer}.self_attn.{name}", depth, bias=True)
    for name in ("fc1", "fc2"):
        rules += linear(f"{block}/{name}", f"{layer}.mlp.{name}", depth, bias=True)
    if config.post_norm:
        rules += layer_norm("vision/post_layernorm", "post_layernorm")
    return tuple(rules)


def _siglip_own_config(config: Json) -> Json:
    if "vision_config" not in config:
        return config
    own = {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model"}
    stated = {name: config[name] for name in ("dtype", "torch_dtype") if name in config}
    return {**stated, **config["vision_config"], **own}


def _identity_norm(config: VisionConfig) -> Mapping[str, np.ndarray]:
    if config.post_norm:
        return {}
    width = config.width
    return {
        "post_layernorm.weight": np.ones(width, np.float32),
        "post_layernorm.bias": np.zeros(width, np.float32),
    }


def _siglip_name(name: str) -> str:
    return name.removeprefix("vision_model.")


def siglip_unused(config: VisionConfig, name: str) -> bool:
    """Whether this is a tensor of the tower that the features up to ``config.depth`` do not need."""
    if name.startswith("head."):
        return True
    if name.startswith("post_layernorm."):
        return not config.post_norm
    layer = name.removeprefix("encoder.layers.").split(".")[0]
    return name.startswith("encoder.layers.") and layer.isdigit() and int(layer) >= config.depth


_SIGLIP = Conversion(
    part="vision",
    read_config=read_siglip,
    write_config=_write_siglip,
    rules=siglip_rules,
    canonical=_siglip_name,
    unused=siglip_unused,
    own_config=_siglip_own_config,
    defaults=_identity_norm,
    left_out={
        "text_model.*": "the text tower, which a multimodal LLM does not use",
        "logit_*": "the contrastive head, which a multimodal LLM does not use",
    },
)

CONVERSIONS: Mapping[str, Conversion] = {
    "siglip": _SIGLIP,
    "siglip_vision_model": dataclasses.replace(_SIGLIP, writes=lambda config: True),
}
"""``model_type`` -> conversion: a complete SigLIP, of which only the tower is used, or a tower alone."""

_NAFLEX = (
    "is a NaFlex SigLIP2, which takes images of any shape and is not supported; use a fixed-resolution "
    "SigLIP2, whose model_type is 'siglip'"
)
REFUSED: Mapping[str, str] = {"siglip2": _NAFLEX, "siglip2_vision_model": _NAFLEX}
"""``model_type`` -> why it is not converted, as the predicate of a sentence."""


def feature_tower(config: VisionConfig, feature_layer: int, setting: str = "--feature_layer") -> VisionConfig:
    """The tower up to the layer whose features a language model uses.

    Args:
      config: the tower with all its layers.
      feature_layer: index into the hidden states, as in ``vision_feature_layer``: -1 is after the last
        layer, -2 the one before. The final LayerNorm is omitted.
      setting: name of ``feature_layer`` in error messages.

    Raises:
      UserError: the layer does not exist.
    """
    depth = config.depth + 1 + feature_layer
    if not (feature_layer < 0 < depth):
        raise UserError(
            f"{setting}={feature_layer} must be between {-config.depth} and -1 for a tower of "
            f"{config.depth} layers."
        )
    return dataclasses.replace(config, depth=depth, post_norm=False)
