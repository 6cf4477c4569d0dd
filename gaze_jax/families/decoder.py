"""Shared by the language models: transformers' tensor names, fields of config.json, conversion rules."""

from collections.abc import Callable, Mapping

from gaze_jax.errors import UserError
from gaze_jax.families.table import Conversion, Fields, Json, Rule, linear
from gaze_jax.models.config import DecoderConfig


def _rope_theta(fields: Fields, config: Json) -> float:
    """The RoPE base: transformers 5 nests it, older versions have it at the top level; 10000 by default.

    Scaling is judged by what it does: its type "default", or a linear factor of 1, changes nothing.
    """
    nested, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    theta = float(fields.get("rope_theta", float, 10_000.0))
    for name, value in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if value is None:
            continue
        if not isinstance(value, dict):
            raise UserError(f"{fields.where} has {name}={value!r}, which should be a JSON object.")
        inner = Fields(value, f"{fields.where}: {name}")
        kind = value.get("rope_type", value.get("type"))
        if not (kind == "linear" and value.get("factor") in (1, 1.0)):
            inner.only("rope_type" if "rope_type" in value else "type", "default")
        theta = float(inner.get("rope_theta", float, theta))
    return theta


def read_decoder(
    config: Json,
    where: str = "config.json",
    *,
    qk_norm: bool,
    qkv_bias: bool,
    kv_heads: int | None = None,
    head_dim: int | None = None,
) -> DecoderConfig:
    """The language model that ``config`` describes.

    Args:
      config: as transformers writes it.
      where: the file's name in error messages.
      qk_norm, qkv_bias: whether the family has them.
      kv_heads: the family's default where the field is absent; None, and a field that is null: as many as
        query heads.
      head_dim: the family's default; None: the width divided by the number of heads.

    Raises:
      UserError: a field is missing, has the wrong type, or asks for an unsupported computation.
    """
    fields = Fields(config, where)
    width, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    depth = fields.get("num_hidden_layers", int)
    fields.only("hidden_act", "silu")
    fields.only("use_sliding_window", False)
    if not qkv_bias:
        fields.only("attention_bias", None, False)
    fields.only("mlp_bias", None, False)
    fields.only("quantization_config", None)
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * depth:
        other = [kind for kind in kinds if kind != "full_attention"] if isinstance(kinds, list) else [kinds]
        what = f"{other[0]!r} in {len(other)} of {depth}" if other else f"{len(kinds)} of {depth}"
        raise UserError(f"{where}: layer_types has {what} layers; only 'full_attention' in all is supported.")
    default = heads if kv_heads is None or "num_key_value_heads" in config else kv_heads
    return DecoderConfig(
        vocab_size=fields.get("vocab_size", int),
        width=width,
        depth=depth,
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads", int, default),
        head_dim=fields.get("head_dim", int, width // heads if head_dim is None else head_dim),
        mlp_dim=fields.get("intermediate_size", int),
        rope_theta=_rope_theta(fields, config),
        norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
    )


def write_decoder(config: DecoderConfig, model_type: str, architecture: str) -> dict[str, object]:
    """The inverse of :func:`read_decoder`, for a class of transformers."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
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
    """The conversion rules of a language model, for the parameters that ``config`` has."""
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
    """The tensor of a tied head, which a file may repeat, and the embedding table that it must equal."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {}


def decoder_conversion(
    read: Callable[[Json], DecoderConfig],
    write: Callable[[DecoderConfig], dict[str, object]],
    *,
    qk_norm: bool,
    qkv_bias: bool,
) -> Conversion:
    """The conversion of language models with the given norms and biases."""
    return Conversion(
        part="decoder",
        read_config=read,
        write_config=write,
        writes=lambda config: (config.qk_norm, config.qkv_bias) == (qk_norm, qkv_bias),
        rules=decoder_rules,
        left_out={"*.rotary_emb.inv_freq": "a buffer that is computed from rope_theta"},
        implied=implied_head,
    )
