"""Full sizes without weights: names, shapes and counts of transformers on the meta device, one to one."""

import dataclasses
import math

import pytest

from gaze_jax.convert.source import expected_tensors, leaf_shapes
from gaze_jax.families import CONVERSIONS, DECODERS, MODELS, TOWERS, written_as

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.xdist_group("parity")

COUNTS = {  # tensors in a file, parameters
    "qwen2.5-0.5b": (290, 494_032_768),
    "qwen2.5-1.5b": (338, 1_543_714_304),
    "qwen2.5-3b": (434, 3_085_938_688),
    "qwen2.5-7b": (339, 7_615_616_512),
    "qwen3-4b": (398, 4_022_468_096),
    "qwen3-4b-instruct-2507": (398, 4_022_468_096),
}
WHOLE_COUNTS = {  # tensors in memory of transformers, parameters
    "llava-onevision-qwen2-0.5b": (717, 893_675_552),
    "llava-onevision-qwen2-7b": (765, 8_030_807_584),
}
POST_NORM = 2 * 1152  # in the files of whole models, and not computed with
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
        elif isinstance(config, transformers.LlavaOnevisionConfig):
            model = transformers.LlavaOnevisionForConditionalGeneration(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name):
    config = DECODERS[name]
    conversion = CONVERSIONS[written_as(config)]
    original = meta(transformers.AutoConfig.for_model(**conversion.write_config(config)))
    in_memory = len(original)
    if config.tie_embeddings:
        del original["lm_head.weight"]  # the embedding again, and not in the file
    ours = expected_tensors(conversion.rules(config), config)
    assert ours == original
    tensors, parameters = COUNTS[name]
    assert len(ours) == tensors and in_memory == tensors + config.tie_embeddings
    assert sum(map(math.prod, ours.values())) == parameters
    assert sum(map(math.prod, leaf_shapes(config).values())) == parameters


@pytest.mark.parametrize("name", TOWERS)
def test_tower(name):
    tower = TOWERS[name]
    whole = dataclasses.replace(tower, depth=27, post_norm=True)
    conversion = CONVERSIONS["siglip_vision_model"]
    fields = conversion.write_config(whole) | {"vision_use_head": True}
    original = meta(transformers.SiglipVisionConfig(**fields))
    assert len(original) == 448
    assert sum(map(math.prod, original.values())) == TOWER_COUNTS[name]
    for config in (whole, tower):
        ours = expected_tensors(conversion.rules(config), config)
        unused = {name for name in original if conversion.unused(config, name)}
        assert ours == {name: shape for name, shape in original.items() if name not in unused}
    assert len(unused) == 16 + 2 + 12 - 1  # layer 27, the final norm, the pooling head


def test_token_grids():
    assert {name: tower.grid for name, tower in TOWERS.items()} == {
        "siglip-so400m-patch14-384": 27,
        "siglip2-so400m-patch14-384": 27,
        "siglip2-so400m-patch16-384": 24,
        "siglip2-so400m-patch16-512": 32,
    }


def llava_onevision(config):
    """The config of transformers for a whole model; of its tower the 26 layers that are published."""
    tower = CONVERSIONS["siglip_vision_model"].write_config(config.tower)
    return transformers.LlavaOnevisionConfig(
        text_config=CONVERSIONS["qwen2"].write_config(config.decoder),
        vision_config=tower,
        tie_word_embeddings=config.decoder.tie_embeddings,
    )


@pytest.mark.parametrize("name", WHOLE_COUNTS)
def test_llava_onevision(name):
    """Every tensor of the published sizes, one to one, in memory and as files call it."""
    config = MODELS[name]
    conversion = CONVERSIONS["llava_onevision"]
    theirs = llava_onevision(config)
    assert conversion.read_config(theirs.to_dict()) == dataclasses.replace(
        config, dtype="float32", param_dtype="float32"
    )
    in_memory = meta(theirs)
    original = {conversion.canonical(name): shape for name, shape in in_memory.items()}
    assert len(original) == len(in_memory)
    if config.decoder.tie_embeddings:
        del original["language_model.lm_head.weight"]  # the embedding again
    unused = {name for name in original if conversion.unused(config, name)}
    assert unused == {f"vision_tower.post_layernorm.{end}" for end in ("weight", "bias")}
    ours = expected_tensors(conversion.rules(config), config)
    assert ours == {name: shape for name, shape in original.items() if name not in unused}
    tensors, parameters = WHOLE_COUNTS[name]
    assert len(in_memory) == tensors and sum(map(math.prod, original.values())) == parameters
    assert sum(map(math.prod, leaf_shapes(config).values())) == parameters - POST_NORM


@pytest.mark.parametrize("size", ["0.5b", "1.5b", "3b", "7b"])
def test_cambrian_s(size):
    """Qwen2.5, 26 layers of SigLIP2, two linear layers and a newline, under the names of each layout."""
    config = MODELS[f"cambrian-s-{size}"]
    width = config.decoder.width
    tensors, parameters = COUNTS[f"qwen2.5-{size}"]
    tower = expected_tensors(CONVERSIONS["siglip"].rules(config.tower), config.tower)
    tensors += len(tower) + 5
    parameters += sum(map(math.prod, tower.values())) + 1152 * width + width * width + 3 * width
    for kind in ("cambrian_qwen", "llava_qwen"):
        ours = expected_tensors(CONVERSIONS[kind].rules(config), config)
        assert len(ours) == tensors and sum(map(math.prod, ours.values())) == parameters
    assert sum(map(math.prod, leaf_shapes(config).values())) == parameters


def test_cambrian_s_has_the_size_that_was_published():
    """Cambrian-S-7B-LFP's file: 8,047,327,392 parameters, 16,978,560 of them the next-frame head's."""
    shapes = leaf_shapes(MODELS["cambrian-s-7b"])
    assert sum(map(math.prod, shapes.values())) + POST_NORM == 8_047_327_392 - 16_978_560
