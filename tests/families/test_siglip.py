"""SigLIP and SigLIP2: what their config.json says, and what is refused."""

import pytest

from gaze_jax.errors import UserError
from gaze_jax.families import CONVERSIONS
from gaze_jax.models.config import VisionConfig
from tests.helpers.model_configs import read

SIGLIP = {"model_type": "siglip_vision_model"}


def test_defaults_are_those_of_transformers():
    tower = VisionConfig(224, 16, 768, 12, 12, 3072, post_norm=True)
    assert read(SIGLIP) == read({"model_type": "siglip", "vision_config": {}}) == tower
    nested = {"model_type": "siglip", "vision_config": {"image_size": 512}, "text_config": {"hidden_size": 1}}
    assert read(nested).image_size == 512


def test_towers_of_other_kinds_are_refused():
    with pytest.raises(UserError, match="hidden_act='gelu'"):
        read(SIGLIP | {"hidden_act": "gelu"})
    with pytest.raises(UserError, match="NaFlex"):
        read({"model_type": "siglip2_vision_model"})
    with pytest.raises(UserError, match="NaFlex"):
        read({"model_type": "siglip2"})


def test_a_tower_that_is_written_is_read_as_it_was():
    tower = VisionConfig(20, 4, 24, 2, 3, 40, norm_eps=1e-5, post_norm=True)
    assert read(CONVERSIONS["siglip"].write_config(tower)) == tower
