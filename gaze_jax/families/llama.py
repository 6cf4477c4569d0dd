"""Llama, whose projections have neither biases nor norms. Names and defaults are those of transformers."""

from collections.abc import Mapping

from gaze_jax.families.decoder import decoder_conversion, read_decoder, write_decoder
from gaze_jax.families.table import Conversion, Json
from gaze_jax.models.config import DecoderConfig


def _read(config: Json) -> DecoderConfig:
    return read_decoder(config, qk_norm=False, qkv_bias=False)


def _write(config: DecoderConfig) -> dict[str, object]:
    return write_decoder(config, "llama", "LlamaForCausalLM")


CONVERSIONS: Mapping[str, Conversion] = {
    "llama": decoder_conversion(_read, _write, qk_norm=False, qkv_bias=False)
}
"""``model_type`` -> conversion."""
