"""The tables of all families: complete, without repetition, and one clear sentence for what is unknown."""

import pickle

import flax.linen as nn
import pytest

from gaze_jax.convert.checkpoint import flat_leaves
from gaze_jax.convert.source import leaf_shapes
from gaze_jax.core.layout import ViewConfig
from gaze_jax.errors import UserError
from gaze_jax.families import (
    CONVERSIONS,
    DECODERS,
    FAMILIES,
    MODELS,
    TOWERS,
    check_views,
    conversion_of,
    get_family,
    joint_rules,
    written_as,
)
from gaze_jax.models import DUMMY
from gaze_jax.models.config import VisionConfig
from gaze_jax.models.parameters import boxed_params


@pytest.mark.parametrize("kind", ["clip", None, "Qwen2", 3])
def test_an_unknown_model_type_names_the_known_ones(kind):
    with pytest.raises(UserError, match=f"has model_type {kind!r}; .* qwen2, qwen3, llama, siglip"):
        conversion_of({"model_type": kind}, "config.json")


def test_an_unknown_style_names_the_known_ones():
    """By name and in a config that comes from a file."""
    match = r"^views.style='qwen' names no family; the families are square, llava_onevision, cambrian_s\.$"
    with pytest.raises(UserError, match=match):
        get_family("qwen")
    with pytest.raises(UserError, match=match):
        check_views(ViewConfig("qwen"))


def test_the_names_of_styles_are_those_that_checkpoints_hold():
    """Stored configs and published models have nothing but these."""
    assert list(FAMILIES) == ["square", "llava_onevision", "cambrian_s"]
    for config in MODELS.values():
        check_views(config.views)


@pytest.mark.parametrize("name", FAMILIES)
def test_workers_can_be_sent_the_views_of_a_family(name):
    """grain pickles the processor that holds them."""
    views = FAMILIES[name].views
    assert pickle.loads(pickle.dumps(views)) == views


CONFIGS = {**DECODERS, **TOWERS, "post_norm": VisionConfig(20, 4, 24, 2, 3, 40, post_norm=True)}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_table_fills_every_parameter_once(name):
    config = CONFIGS[name]
    rules = CONVERSIONS[written_as(config)].rules(config)
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


def test_a_decoder_that_transformers_has_no_class_for():
    assert DUMMY.decoder.qk_norm and DUMMY.decoder.qkv_bias
    with pytest.raises(
        UserError, match="is none of qwen2, qwen3, llama, so transformers has no class for it"
    ):
        written_as(DUMMY.decoder)
