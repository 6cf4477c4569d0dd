"""The paper's models."""

import pytest

from gaze_jax.core.layout import VisualLayout
from gaze_jax.families.cambrian import MODELS, dense
from gaze_jax.models.config import VisionConfig


@pytest.mark.parametrize("name", MODELS)
def test_the_papers_models_cut_an_image_into_16_full_regions(name):
    config = MODELS[name]
    tower = config.tower
    layout = VisualLayout(tower.image_size, tower.patch_size, config.gaze.region, config.gaze.context_tokens)
    assert layout.regions == 16 and layout.slots * 16 == layout.tokens
    baseline = dense(config)
    assert baseline.gaze.top_k is None and baseline.gaze.context_tokens == 0
    assert isinstance(baseline.vision, VisionConfig)
