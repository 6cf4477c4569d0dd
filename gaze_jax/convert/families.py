"""The families that can be converted. Names, shapes and defaults are those of transformers.

Dispatch is on ``model_type`` of ``config.json``, never on a name or a path.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from gaze_jax.convert.table import Family, Fields, Json, Rule
from gaze_jax.errors import UserError
from gaze_jax.models.config import DecoderConfig, VisionConfig

Kind = Literal["qwen2", "qwen3", "llama"]
"""Decoders that differ in what is around the projections: biases, norms, or neither."""

_CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
_CONFIG = "config.json"


def _linear(leaf: str, tensor: str, layers: int, *, bias: bool) -> tuple[Rule, ...]:
    kernel = Rule(f"{leaf}/kernel", f"{tensor}.weight", "linear", layers)
    return (kernel, Rule(f"{leaf}/bias", f"{tensor}.bias", "same", layers)) if bias else (kernel,)


def _layer_norm(leaf: str, tensor: str, layers: int = 0) -> tuple[Rule, ...]:
    return (
        Rule(f"{leaf}/scale", f"{tensor}.weight", "same", layers),
        Rule(f"{leaf}/bias", f"{tensor}.bias", "same", layers),
    )


def _rope_theta(fields: Fields, config: Json) -> float:
    """transformers 5 nests what older versions keep at the top; 10000 is its default."""
    nested = config.get("rope_parameters")
    if nested is None:
        fields.only("rope_scaling", None)
        return float(fields.get("rope_theta", float, 10_000.0))
    inner = Fields(nested, f"{_CONFIG}: rope_parameters")
    inner.only("rope_type", "default")
    return float(inner.get("rope_theta", float, 10_000.0))


def _read_decoder(config: Json, *, kind: Kind) -> DecoderConfig:
    fields = Fields(config, _CONFIG)
    width, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    depth = fields.get("num_hidden_layers", int)
    fields.only("hidden_act", "silu")
    fields.only("use_sliding_window", False)
    if kind != "qwen2":
        fields.only("attention_bias", None, False)
    fields.only("mlp_bias", None, False)
    fields.only("quantization_config", None)
    fields.only("layer_types", None, ["full_attention"] * depth)
    return DecoderConfig(
        vocab_size=fields.get("vocab_size", int),
        width=width,
        depth=depth,
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads", int),
        head_dim=fields.get("head_dim", int, 128 if kind == "qwen3" else width // heads),
        mlp_dim=fields.get("intermediate_size", int),
        rope_theta=_rope_theta(fields, config),
        norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2",
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
    )


def _write_decoder(config: DecoderConfig, *, kind: Kind) -> dict[str, Any]:
    if kind == "qwen2" and config.head_dim * config.num_heads != config.width:
        raise UserError(
            f"decoder.head_dim={config.head_dim} times decoder.num_heads={config.num_heads} is not "
            f"decoder.width={config.width}; transformers' Qwen2 needs that."
        )
    return {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


def decoder_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Qwen2, Qwen2.5, Qwen3 dense and Llama; what the config has not, the table has not."""
    block, layer = "decoder/layers", "model.layers.{}"
    attention, depth = f"{block}/self_attn", config.depth
    rules = [Rule("decoder/embedding", "model.embed_tokens.weight")]
    for name in ("q_proj", "k_proj", "v_proj"):
        rules += _linear(f"{attention}/{name}", f"{layer}.self_attn.{name}", depth, bias=config.qkv_bias)
    rules += _linear(f"{attention}/o_proj", f"{layer}.self_attn.o_proj", depth, bias=False)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            rules.append(
                Rule(f"{attention}/{name}/weight", f"{layer}.self_attn.{name}.weight", "same", depth)
            )
    for name in ("gate_proj", "up_proj", "down_proj"):
        rules += _linear(f"{block}/mlp/{name}", f"{layer}.mlp.{name}", depth, bias=False)
    for ours, theirs in (
        ("input_norm", "input_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
    ):
        rules.append(Rule(f"{block}/{ours}/weight", f"{layer}.{theirs}.weight", "same", depth))
    rules.append(Rule("decoder/norm/weight", "model.norm.weight"))
    if not config.tie_embeddings:
        rules.append(Rule("decoder/lm_head/kernel", "lm_head.weight", "linear"))
    return tuple(rules)


def _implied_head(config: DecoderConfig) -> Mapping[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {}


def _tower_fields(config: Json) -> Json:
    """The vision part: a whole SigLIP nests it and, like the tower alone, omits what is default."""
    nested = config.get("vision_config")
    return config if nested is None else nested


def _read_siglip(config: Json) -> VisionConfig:
    fields = Fields(_tower_fields(config), _CONFIG)
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


def _write_siglip(config: VisionConfig) -> dict[str, Any]:
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
    """SigLIP and fixed-resolution SigLIP2, as many encoder layers as the features need."""
    block, layer, depth = "vision/layers", "encoder.layers.{}", config.depth
    rules = [
        Rule("vision/patch_embedding/kernel", "embeddings.patch_embedding.weight", "conv"),
        Rule("vision/patch_embedding/bias", "embeddings.patch_embedding.bias"),
        Rule("vision/position_embedding", "embeddings.position_embedding.weight"),
        *_layer_norm(f"{block}/layer_norm1", f"{layer}.layer_norm1", depth),
        *_layer_norm(f"{block}/layer_norm2", f"{layer}.layer_norm2", depth),
    ]
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        rules += _linear(f"{block}/{name}", f"{layer}.self_attn.{name}", depth, bias=True)
    for name in ("fc1", "fc2"):
        rules += _linear(f"{block}/{name}", f"{layer}.mlp.{name}", depth, bias=True)
    if config.post_norm:
        rules += _layer_norm("vision/post_layernorm", "post_layernorm")
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


def joint_rules(context_tokens: int) -> tuple[Rule, ...]:
    """Projector, newline and context tokens, under LLaVA's names where it has them."""
    joint = "multi_modal_projector"
    rules = [
        *_linear("projector/linear_1", f"{joint}.linear_1", 0, bias=True),
        *_linear("projector/linear_2", f"{joint}.linear_2", 0, bias=True),
        Rule("newline", "image_newline"),
    ]
    if context_tokens:
        rules.append(Rule("context", "context_tokens"))
    return tuple(rules)


def _siglip_name(name: str) -> str:
    return name.removeprefix("vision_model.")


def _siglip_unused(config: VisionConfig, name: str) -> bool:
    if name.startswith("head."):
        return True
    if name.startswith("post_layernorm."):
        return not config.post_norm
    layer = name.removeprefix("encoder.layers.").split(".")[0]
    return name.startswith("encoder.layers.") and layer.isdigit() and int(layer) >= config.depth


def _decoder(kind: Kind) -> Family:
    return Family(
        part="decoder",
        read_config=lambda config: _read_decoder(config, kind=kind),
        write_config=lambda config: _write_decoder(config, kind=kind),
        rules=decoder_rules,
        left_out={"*.rotary_emb.inv_freq": "a buffer that is computed from rope_theta"},
        implied=_implied_head,
    )


_SIGLIP = Family(
    part="vision",
    read_config=_read_siglip,
    write_config=_write_siglip,
    rules=siglip_rules,
    canonical=_siglip_name,
    unused=_siglip_unused,
    own_config=_siglip_own_config,
    defaults=_identity_norm,
    left_out={
        "text_model.*": "the text tower, which a multimodal LLM does not use",
        "logit_*": "the contrastive head, which a multimodal LLM does not use",
    },
)

FAMILIES: Mapping[str, Family] = {
    "qwen2": _decoder("qwen2"),
    "qwen3": _decoder("qwen3"),
    "llama": _decoder("llama"),
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
}
"""``model_type`` -> family."""


def family_of(config: Json, where: str) -> Family:
    """The family of a ``config.json``.

    Raises:
      UserError: there is no such family.
    """
    kind = config.get("model_type")
    if kind in ("siglip2", "siglip2_vision_model"):
        raise UserError(
            f"{where} is a NaFlex SigLIP2 (model_type {kind!r}), which takes images of any shape and is not "
            "supported; use a fixed-resolution SigLIP2, whose model_type is 'siglip'."
        )
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{where} has model_type {kind!r}; the families that can be converted are {', '.join(FAMILIES)}."
        )
    return FAMILIES[kind]


def decoder_family(config: DecoderConfig) -> str:
    """The ``model_type`` of a decoder without a source.

    Raises:
      UserError: no family has both q/k norms and q/k/v biases.
    """
    if config.qk_norm and config.qkv_bias:
        raise UserError(
            "A decoder with qk_norm=True and qkv_bias=True is neither a Qwen3 (norms, no biases), a Qwen2 "
            "(biases, no norms) nor a Llama (neither), so transformers has no class for it."
        )
    if config.qk_norm:
        return "qwen3"
    return "qwen2" if config.qkv_bias else "llama"


def feature_tower(config: VisionConfig, feature_layer: int) -> VisionConfig:
    """The tower up to the features that a language model reads.

    Args:
      config: of all layers.
      feature_layer: index into the hidden states, as in ``vision_feature_layer``: -1 is after the last
        layer, -2 the one before. The final LayerNorm is left out.

    Raises:
      UserError: there is no such layer.
    """
    depth = config.depth + 1 + feature_layer
    if not (feature_layer < 0 < depth):
        raise UserError(
            f"--feature_layer={feature_layer} must be between {-config.depth} and -1 for a tower of "
            f"{config.depth} layers."
        )
    return dataclasses.replace(config, depth=depth, post_norm=False)
