"""Qwen2, Qwen2.5 and Qwen3 (dense). Names and defaults are those of transformers."""

from collections.abc import Mapping

from gaze_jax.errors import UserError
from gaze_jax.families.decoder import decoder_conversion, read_decoder, write_decoder
from gaze_jax.families.table import Conversion, Json
from gaze_jax.models.config import DecoderConfig

_QWEN2 = {"qk_norm": False, "qkv_bias": True}
_QWEN3 = {"qk_norm": True, "qkv_bias": False}

DECODERS: Mapping[str, DecoderConfig] = {
    # vocabulary, width, depth, query heads, kv heads, head_dim, mlp
    "qwen2.5-0.5b": DecoderConfig(151936, 896, 24, 14, 2, 64, 4864, **_QWEN2),
    "qwen2.5-1.5b": DecoderConfig(151936, 1536, 28, 12, 2, 128, 8960, **_QWEN2),
    "qwen2.5-3b": DecoderConfig(151936, 2048, 36, 16, 2, 128, 11008, **_QWEN2),
    "qwen2.5-7b": DecoderConfig(152064, 3584, 28, 28, 4, 128, 18944, tie_embeddings=False, **_QWEN2),
    "qwen3-4b": DecoderConfig(151936, 2560, 36, 32, 8, 128, 9728, **_QWEN3),
    "qwen3-4b-instruct-2507": DecoderConfig(151936, 2560, 36, 32, 8, 128, 9728, rope_theta=5e6, **_QWEN3),
}
"""Published sizes; Qwen2's are those of Qwen2.5."""


def read_qwen2(config: Json, where: str = "config.json") -> DecoderConfig:
    """The Qwen2 or Qwen2.5 that ``config`` describes; ``where`` is the file's name in error messages."""
    return read_decoder(config, where, qk_norm=False, qkv_bias=True, kv_heads=32)


def _read_qwen3(config: Json) -> DecoderConfig:
    return read_decoder(config, qk_norm=True, qkv_bias=False, kv_heads=32, head_dim=128)


def _write_qwen2(config: DecoderConfig) -> dict[str, object]:
    if config.head_dim * config.num_heads != config.width:
        raise UserError(
            f"decoder.head_dim={config.head_dim} times decoder.num_heads={config.num_heads} is not "
            f"decoder.width={config.width}; transformers' Qwen2 needs that."
        )
    return write_decoder(config, "qwen2", "Qwen2ForCausalLM")


def _write_qwen3(config: DecoderConfig) -> dict[str, object]:
    return write_decoder(config, "qwen3", "Qwen3ForCausalLM")


CONVERSIONS: Mapping[str, Conversion] = {
    "qwen2": decoder_conversion(read_qwen2, _write_qwen2, qk_norm=False, qkv_bias=True),
    "qwen3": decoder_conversion(_read_qwen3, _write_qwen3, qk_norm=True, qkv_bias=False),
}
"""``model_type`` -> conversion. Qwen2 has biases on q, k and v; Qwen3 has norms on q and k instead."""
