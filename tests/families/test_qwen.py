"""Qwen2, Qwen2.5 and Qwen3: what their config.json says, and what is refused."""

import pytest

from gaze_jax.convert.source import expected_tensors
from gaze_jax.errors import UserError
from gaze_jax.families import CONVERSIONS
from gaze_jax.models.config import DecoderConfig
from tests.helpers.model_configs import QWEN, read, written_and_read


def test_defaults_are_those_of_transformers():
    assert read(QWEN) == DecoderConfig(
        320, 64, 3, 4, 2, 128, 96, rope_theta=10_000.0, qk_norm=True, qkv_bias=False, tie_embeddings=False
    )
    assert read(QWEN | {"model_type": "qwen2"}) == DecoderConfig(
        320, 64, 3, 4, 2, 16, 96, rope_theta=10_000.0, qk_norm=False, qkv_bias=True, tie_embeddings=False
    )


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e6},
        {"rope_theta": 5000000},
        {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}},
        {"rope_theta": 5e6, "rope_scaling": {"type": "default"}},
        {"rope_theta": 5e6, "rope_scaling": {"rope_type": "default", "factor": 1.0}},
        {"rope_theta": 5e6, "rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_theta": 5e6, "rope_scaling": None, "rope_parameters": None},
    ],
)
def test_rope_is_judged_by_its_effect(spelling):
    """Both spellings of the base, and scaling that changes nothing."""
    assert read(QWEN | spelling).rope_theta == 5e6


@pytest.mark.parametrize(
    ("kind", "heads", "expected"),
    [("qwen2", None, 64), ("qwen3", None, 64), ("llama", None, 64), ("qwen2", ..., 32), ("llama", ..., 64)],
)
def test_kv_heads_are_those_that_transformers_fills_in(kind, heads, expected):
    """null is as many as query heads; a field that is absent has the default of the class."""
    config = {"model_type": kind, "num_attention_heads": 64, "hidden_size": 512}
    values = {name: value for name, value in QWEN.items() if name != "num_key_value_heads"} | config
    values |= {"attention_bias": False} if kind == "llama" else {}
    assert read(values if heads is ... else values | {"num_key_value_heads": heads}).num_kv_heads == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling has type='yarn'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type='yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "'sliding_attention' in 1 of 3 layers",
        ),
        ({"hidden_size": "64"}, "hidden_size='64', which should be of type int"),
        ({"num_key_value_heads": 3}, "must be a multiple of"),
    ],
)
def test_what_would_compute_something_else_is_refused(change, message):
    with pytest.raises((UserError, ValueError), match=message):
        read(QWEN | change)


def test_expected_tensors_have_the_shapes_of_the_original():
    config = read(QWEN | {"head_dim": 32})
    expected = expected_tensors(CONVERSIONS["qwen3"].rules(config), config)
    assert expected["model.layers.2.self_attn.q_proj.weight"] == (128, 64)
    assert expected["model.layers.0.self_attn.k_norm.weight"] == (32,)
    assert expected["lm_head.weight"] == (320, 64)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_config_that_is_written_is_read_as_it_was(kind):
    config, found = written_and_read(kind)
    assert found == config
