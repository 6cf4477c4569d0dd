"""Full sizes without weights: names, shapes and counts of transformers on the meta device, one to one."""

import dataclasses
import math

import pytest
import torch
import transformers

from gaze_jax.convert.families import FAMILIES, decoder_family
from gaze_jax.convert.source import expected_tensors, leaf_shapes
from gaze_jax.core.layout import VisualLayout
from gaze_jax.models.config import VisionConfig
from gaze_jax.models.published import DECODERS, MODELS, TOWERS, dense

pytestmark = pytest.mark.xdist_group("parity")

COUNTS = {  # tensors in a file, parameters
    "qwen2.5-0.5b": (290, 494_032_768),
    "qwen2.5-1.5b": (338, 1_543_714_304),
    "qwen2.5-3b": (434, 3_085_938_688),
    "qwen2.5-7b": (339, 7_615_616_512),
    "qwen3-4b": (398, 4_022_468_096),
    "qwen3-4b-instruct-2507": (398, 4_022_468_096),
}
TOWER_COUNTS = {  # with the pooling head, parameters
    "siglip-so400m-patch14-384": 428_225_600,
    "siglip2-so400m-patch14-384": 428_225_600,
    "siglip2-so400m-patch16-384": 428_256_704,
    "siglip2-so400m-patch16-512": 428_772_800,
}


def meta(config):
    """Name -> shape of a model of transformers that takes no memory."""
    with torch.device("meta"):
        if isinstance(config, transformers.SiglipVisionConfig):
            model = transformers.SiglipVisionModel(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name):
    config = DECODERS[name]
    kind = decoder_family(config)
    family = FAMILIES[kind]
    original = meta(transformers.AutoConfig.for_model(**family.write_config(config)))
    in_memory = len(original)
    if config.tie_embeddings:
        del original["lm_head.weight"]  # the embedding again, and not in the file
    ours = expected_tensors(family.rules(config), config)
    assert ours == original
    tensors, parameters = COUNTS[name]
    assert len(ours) == tensors and in_memory == tensors + config.tie_embeddings
    assert sum(map(math.prod, ours.values())) == parameters
    assert sum(map(math.prod, leaf_shapes(config).values())) == parameters


@pytest.mark.parametrize("name", TOWERS)
def test_tower(name):
    tower = TOWERS[name]
    whole = dataclasses.replace(tower, depth=27, post_norm=True)
    family = FAMILIES["siglip_vision_model"]
    fields = family.write_config(whole) | {"vision_use_head": True}
    original = meta(transformers.SiglipVisionConfig(**fields))
    assert len(original) == 448
    assert sum(map(math.prod, original.values())) == TOWER_COUNTS[name]
    for config in (whole, tower):
        ours = expected_tensors(family.rules(config), config)
        unused = {name for name in original if family.unused(config, name)}
        assert ours == {name: shape for name, shape in original.items() if name not in unused}
    assert len(unused) == 16 + 2 + 12 - 1  # layer 27, the final norm, the pooling head


def test_token_grids():
    assert {name: tower.grid for name, tower in TOWERS.items()} == {
        "siglip-so400m-patch14-384": 27,
        "siglip2-so400m-patch14-384": 27,
        "siglip2-so400m-patch16-384": 24,
        "siglip2-so400m-patch16-512": 32,
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_papers_models_cut_an_image_into_16_full_regions(name):
    config = MODELS[name]
    tower = config.tower
    layout = VisualLayout(tower.image_size, tower.patch_size, config.gaze.region, config.gaze.context_tokens)
    assert layout.regions == 16 and layout.slots * 16 == layout.tokens
    baseline = dense(config)
    assert baseline.gaze.top_k is None and baseline.gaze.context_tokens == 0
    assert isinstance(baseline.vision, VisionConfig)
