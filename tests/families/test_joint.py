"""Whole models: what their config.json says alike, and what is refused. No weights, no torch."""

import dataclasses

import pytest

from gaze_jax.convert.source import leaf_shapes
from gaze_jax.errors import UserError
from gaze_jax.families import CONVERSIONS, MODELS, TOWERS, conversion_of
from gaze_jax.models.config import GazeConfig
from tests.helpers.model_configs import CAMBRIAN, HUB, NEXT, SMALL, computing, read


def test_published_configs_are_the_published_models():
    """The three layouts of the 7B sizes. LLaVA-NeXT's has no added tokens and lists widths first."""
    assert read(HUB) == computing("llava-onevision-qwen2-7b")
    assert read(CAMBRIAN) == computing("cambrian-s-7b")
    original = computing("llava-onevision-qwen2-7b")
    across = tuple((height, width) for width, height in original.views.canvases)
    assert read(NEXT) == dataclasses.replace(
        original,
        decoder=dataclasses.replace(original.decoder, vocab_size=152064),
        views=dataclasses.replace(original.views, canvases=across),
    )


def test_a_converted_model_computes_what_the_original_does():
    """Dense, no context tokens, every visual token sees all earlier ones; 16 regions of an image."""
    for config in (HUB, NEXT, CAMBRIAN):
        found = read(config)
        assert found.gaze == GazeConfig((7, 7), context_tokens=0, visual_scope="all", visual_causal=True)
        assert found.gaze.top_k is None and found.layout.regions == 16
    small = HUB["vision_config"] | {"image_size": 48, "patch_size": 16}
    few = HUB | {"vision_config": small, "image_grid_pinpoints": [[48, 48]]}
    assert read(few).gaze.region == (3, 3)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
    ],
)
@pytest.mark.parametrize("config", [NEXT, CAMBRIAN])
def test_scaled_rope_is_ignored_and_said_so(config, scaling):
    """Their code sets rope_scaling to None before it builds the model."""
    assert read(config | scaling) == read(config)
    (remark,) = conversion_of(config, "x").remarks(config | scaling)
    assert "yarn" in remark and "is ignored, as the original code does" in remark
    assert not conversion_of(config, "x").remarks(config | {"rope_parameters": {"rope_type": "default"}})
    assert not conversion_of(config, "x").remarks(config)


@pytest.mark.parametrize("config", [NEXT, CAMBRIAN])
def test_a_named_tower(config):
    """By the last part of its name; an unknown one must be described, a known one cannot be another."""
    is_next = config is NEXT
    field = "mm_vision_tower" if is_next else "mm_vision_tower_aux_list"

    def named(name):
        fields = {field: name if is_next else [name]}
        return config | fields | {"image_grid_pinpoints": [[24, 24]], "mm_hidden_size": None}

    path = {field: "/models/siglip-so400m-patch14-384/" if is_next else ["/x/siglip-so400m-patch14-384"]}
    assert read(config | path).vision == TOWERS["siglip-so400m-patch14-384"]
    with pytest.raises(UserError, match=r"does not describe its image tower 'a/tiny'.*with --vision"):
        read(named("a/tiny"))
    small = named("a/tiny") | {"mm_vision_tower_aux_token_len_list": [36], "image_aspect_ratio": "anyres"}
    assert read(small, SMALL).vision == SMALL
    with pytest.raises(UserError, match=r"names the tower google/.* has image_size=24 instead of 384"):
        read(config, SMALL)
    with pytest.raises(UserError, match="mm_hidden_size=1152 but its tower 'a/tiny' has 48"):
        read(small | {"mm_hidden_size": 1152}, SMALL)


@pytest.mark.parametrize("name", ["llava_onevision", "llava_qwen", "cambrian_qwen"])
def test_whole_tables_fill_every_parameter_once(name):
    """No tensor twice, no parameter forgotten, under the names of each layout."""
    config = MODELS["llava-onevision-qwen2-0.5b"]
    rules = CONVERSIONS[name].rules(config)
    assert sorted(rule.leaf for rule in rules) == sorted(leaf_shapes(config))
    tensors = [tensor for rule in rules for tensor in rule.tensors]
    assert len(tensors) == len(set(tensors)) == 24 * 12 + 2 + 26 * 16 + 3 + 4 + 1
