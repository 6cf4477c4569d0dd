"""Reading config.json, and the tables: complete, without repetition, and their own inverse."""

import flax.linen as nn
import numpy as np
import pytest

from gaze_jax.convert.checkpoint import flat_leaves
from gaze_jax.convert.source import expected_tensors, leaf_shapes
from gaze_jax.errors import UserError
from gaze_jax.families import FAMILIES, decoder_family, family_of, joint_rules
from gaze_jax.families.table import Rule
from gaze_jax.models import DUMMY
from gaze_jax.models.config import DecoderConfig, VisionConfig
from gaze_jax.models.parameters import boxed_params
from gaze_jax.models.published import DECODERS, MODELS, TOWERS

QWEN = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
}
SIGLIP = {"model_type": "siglip_vision_model"}


def read(config):
    return family_of(config, "config.json").read_config(config)


def test_defaults_are_those_of_transformers():
    assert read(QWEN) == DecoderConfig(
        320, 64, 3, 4, 2, 128, 96, rope_theta=10_000.0, qk_norm=True, qkv_bias=False, tie_embeddings=False
    )
    assert read(QWEN | {"model_type": "qwen2"}) == DecoderConfig(
        320, 64, 3, 4, 2, 16, 96, rope_theta=10_000.0, qk_norm=False, qkv_bias=True, tie_embeddings=False
    )
    tower = VisionConfig(224, 16, 768, 12, 12, 3072, post_norm=True)
    assert read(SIGLIP) == read({"model_type": "siglip", "vision_config": {}}) == tower
    nested = {"model_type": "siglip", "vision_config": {"image_size": 512}, "text_config": {"hidden_size": 1}}
    assert read(nested).image_size == 512


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e6},
        {"rope_theta": 5000000},
        {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}},
    ],
)
def test_rope_theta_is_read_in_both_spellings(spelling):
    assert read(QWEN | spelling).rope_theta == 5e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias=True"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling="),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type='yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types="),
        ({"num_key_value_heads": None}, "lacks num_key_value_heads"),
        ({"hidden_size": "64"}, "hidden_size='64', which should be of type int"),
        ({"num_key_value_heads": 3}, "must be a multiple of"),
    ],
)
def test_what_would_compute_something_else_is_refused(change, message):
    with pytest.raises((UserError, ValueError), match=message):
        read(QWEN | change)


def test_towers_of_other_kinds_are_refused():
    with pytest.raises(UserError, match="hidden_act='gelu'"):
        read(SIGLIP | {"hidden_act": "gelu"})
    with pytest.raises(UserError, match="NaFlex"):
        read({"model_type": "siglip2_vision_model"})
    with pytest.raises(UserError, match="NaFlex"):
        read({"model_type": "siglip2"})


@pytest.mark.parametrize("kind", ["clip", None, "Qwen2", 3])
def test_an_unknown_model_type_names_the_known_ones(kind):
    with pytest.raises(UserError, match=f"has model_type {kind!r}; .* qwen2, qwen3, llama, siglip"):
        family_of({"model_type": kind}, "config.json")


CONFIGS = {**DECODERS, **TOWERS, "post_norm": VisionConfig(20, 4, 24, 2, 3, 40, post_norm=True)}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_table_fills_every_parameter_once(name):
    config = CONFIGS[name]
    kind = "siglip" if isinstance(config, VisionConfig) else decoder_family(config)
    rules = FAMILIES[kind].rules(config)
    assert sorted(rule.leaf for rule in rules) == sorted(leaf_shapes(config))
    names = [tensor for rule in rules for tensor in rule.tensors]
    assert len(names) == len(set(names))
    for rule in rules:
        assert rule.layers == (config.depth if "/layers/" in rule.leaf else 0)


@pytest.mark.parametrize("name", MODELS)
def test_what_joins_the_parts_completes_a_model(name):
    config = MODELS[name]
    whole = set(flat_leaves(nn.meta.unbox(boxed_params(config))))
    parts = {*leaf_shapes(config.decoder), *leaf_shapes(config.tower)}
    joint = {rule.leaf for rule in joint_rules(config.gaze.context_tokens)}
    assert whole == parts | joint and not parts & joint


@pytest.mark.parametrize("layout", ["same", "linear", "conv"])
def test_rules_are_their_own_inverse(layout):
    shape = {"same": (5,), "linear": (300, 7), "conv": (6, 3, 2, 4)}[layout]
    tensor = np.random.default_rng(0).normal(size=shape)
    rule = Rule("a/b", "a.b", layout)
    leaf = rule.to_leaf(tensor)
    np.testing.assert_array_equal(rule.to_tensor(leaf), tensor)
    assert rule.to_tensor(leaf).flags.c_contiguous
    assert rule.tensor_shape(leaf.shape) == tensor.shape
    stacked = Rule("a/b", "a.{}.b", layout, layers=9)
    assert stacked.tensor_shape((9, *leaf.shape)) == tensor.shape
    assert stacked.tensors == tuple(f"a.{i}.b" for i in range(9))


def test_a_linear_weight_is_transposed_and_a_patch_embedding_is_hwio():
    assert Rule("a", "a", "linear").to_leaf(np.zeros((2, 3))).shape == (3, 2)
    tensor = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    leaf = Rule("a", "a", "conv").to_leaf(tensor)
    assert leaf.shape == (4, 5, 3, 2) and leaf[3, 2, 1, 0] == tensor[0, 1, 3, 2]


def test_a_decoder_that_transformers_has_no_class_for():
    with pytest.raises(UserError, match="neither a Qwen3"):
        decoder_family(DUMMY.decoder)


def test_expected_tensors_have_the_shapes_of_the_original():
    config = read(QWEN | {"head_dim": 32})
    expected = expected_tensors(FAMILIES["qwen3"].rules(config), config)
    assert expected["model.layers.2.self_attn.q_proj.weight"] == (128, 64)
    assert expected["model.layers.0.self_attn.k_norm.weight"] == (32,)
    assert expected["lm_head.weight"] == (320, 64)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_a_config_that_is_written_is_read_as_it_was(kind):
    config = DecoderConfig(
        320,
        64,
        3,
        4,
        2,
        16,
        96,
        rope_theta=5e5,
        norm_eps=1e-5,
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2",
    )
    assert decoder_family(config) == kind
    family = FAMILIES[kind]
    assert family.read_config(family.write_config(config)) == config


def test_a_tower_that_is_written_is_read_as_it_was():
    tower = VisionConfig(20, 4, 24, 2, 3, 40, norm_eps=1e-5, post_norm=True)
    assert read(FAMILIES["siglip"].write_config(tower)) == tower
