"""Language models: Qwen2, Qwen2.5, Qwen3 dense and Llama. Names and defaults are those of transformers."""

from collections.abc import Mapping
from typing import Any, Literal

from gaze_jax.errors import UserError
from gaze_jax.families.table import Family, Fields, Json, Rule, linear
from gaze_jax.models.config import DecoderConfig

Kind = Literal["qwen2", "qwen3", "llama"]
"""Decoders that differ in what is around the projections: biases, norms, or neither."""

_CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def _rope_theta(fields: Fields, config: Json) -> float:
    """transformers 5 nests what older versions keep at the top; 10000 is its default."""
    nested = config.get("rope_parameters")
    if nested is None:
        fields.only("rope_scaling", None)
        return float(fields.get("rope_theta", float, 10_000.0))
    inner = Fields(nested, f"{fields.where}: rope_parameters")
    inner.only("rope_type", "default")
    return float(inner.get("rope_theta", float, 10_000.0))


def read_decoder(config: Json, *, kind: Kind, where: str = "config.json") -> DecoderConfig:
    """The language model that ``config`` describes; ``where`` is what to call it in messages."""
    fields = Fields(config, where)
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
        rules += linear(f"{attention}/{name}", f"{layer}.self_attn.{name}", depth, bias=config.qkv_bias)
    rules += linear(f"{attention}/o_proj", f"{layer}.self_attn.o_proj", depth, bias=False)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            rules.append(
                Rule(f"{attention}/{name}/weight", f"{layer}.self_attn.{name}.weight", "same", depth)
            )
    for name in ("gate_proj", "up_proj", "down_proj"):
        rules += linear(f"{block}/mlp/{name}", f"{layer}.mlp.{name}", depth, bias=False)
    for ours, theirs in (
        ("input_norm", "input_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
    ):
        rules.append(Rule(f"{block}/{ours}/weight", f"{layer}.{theirs}.weight", "same", depth))
    rules.append(Rule("decoder/norm/weight", "model.norm.weight"))
    if not config.tie_embeddings:
        rules.append(Rule("decoder/lm_head/kernel", "lm_head.weight", "linear"))
    return tuple(rules)


def implied_head(config: DecoderConfig) -> Mapping[str, str]:
    """The head of a tied model, which a file may repeat, and the table that it must equal."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {}


def _decoder(kind: Kind) -> Family:
    return Family(
        part="decoder",
        read_config=lambda config: read_decoder(config, kind=kind),
        write_config=lambda config: _write_decoder(config, kind=kind),
        rules=decoder_rules,
        left_out={"*.rotary_emb.inv_freq": "a buffer that is computed from rope_theta"},
        implied=implied_head,
    )


DECODERS: Mapping[str, Family] = {
    "qwen2": _decoder("qwen2"),
    "qwen3": _decoder("qwen3"),
    "llama": _decoder("llama"),
}
"""``model_type`` -> family of the language models."""


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
