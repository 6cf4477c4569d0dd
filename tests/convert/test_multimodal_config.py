"""config.json of whole multimodal models: what is read, and what is refused. No weights, no torch."""

import dataclasses

import pytest

from gaze_jax.core.layout import ViewConfig
from gaze_jax.errors import UserError
from gaze_jax.families import FAMILIES, family_of, family_type
from gaze_jax.models.config import GazeConfig, VisionConfig
from gaze_jax.models.published import MODELS, TOWERS

QWEN_7B = {
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "use_sliding_window": False,
}
PINPOINTS = [[height * 384, width * 384] for height in range(1, 7) for width in range(1, 7)]
HUB = {
    "model_type": "llava_onevision",
    "architectures": ["LlavaOnevisionForConditionalGeneration"],
    "image_grid_pinpoints": PINPOINTS,
    "image_token_index": 151646,
    "projector_hidden_act": "gelu",
    "text_config": QWEN_7B | {"model_type": "qwen2", "vocab_size": 152128},
    "tie_word_embeddings": False,
    "vision_aspect_ratio": "anyres_max_9",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 26,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
"""llava-hf/llava-onevision-qwen2-7b-ov-hf, as transformers 4 wrote it."""

NEXT = QWEN_7B | {
    "model_type": "llava",
    "architectures": ["LlavaQwenForCausalLM"],
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": PINPOINTS,
    "mm_hidden_size": 1152,
    "mm_newline_position": "one_token",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
"""lmms-lab/llava-onevision-qwen2-7b-ov."""

CAMBRIAN = QWEN_7B | {
    "model_type": "cambrian_qwen",
    "architectures": ["CambrianQwenForCausalLM"],
    "anyres_max_subimages": 9,
    "connector_only": True,
    "image_aspect_ratio": "anyres",
    "miv_token_len": 64,
    "mm_hidden_size": 1152,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_newline_token": True,
    "mm_use_im_start_end": False,
    "mm_vision_select_layer": -2,
    "mm_vision_tower_aux_list": ["google/siglip2-so400m-patch14-384"],
    "mm_vision_tower_aux_token_len_list": [729],
    "nfp_head": True,
    "si_token_len": 729,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}

SMALL = VisionConfig(24, 4, 48, depth=2, num_heads=4, mlp_dim=80)


def read(config, *tower):
    return family_of(config, "config.json").read_config(config, *tower)


def computing(name):
    """A published model in the dtype that a config.json alone stands for."""
    return dataclasses.replace(MODELS[name], dtype="float32", param_dtype="float32")


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


@pytest.mark.parametrize(("layers", "layer"), [(26, -1), (27, -2), (28, -3)])
def test_the_feature_layer_says_how_many_layers_run(layers, layer):
    """A 27-layer tower read one layer early is the 26-layer one."""
    vision = HUB["vision_config"] | {"num_hidden_layers": layers}
    tower = read(HUB | {"vision_config": vision, "vision_feature_layer": layer}).vision
    assert tower == TOWERS["siglip-so400m-patch14-384"]


def test_defaults_are_filled_in():
    """Nested configs list what is not default, at both levels."""
    few = {name: HUB[name] for name in ("model_type", "text_config", "vision_config")}
    assert read(few) == read(HUB)
    text = {name: value for name, value in HUB["text_config"].items() if name != "vocab_size"}
    assert read(HUB | {"text_config": text}).decoder.vocab_size == 151936
    text = HUB["text_config"] | {"rope_theta": None, "rope_parameters": {"rope_theta": 5e6}}
    assert read(HUB | {"text_config": text}).decoder.rope_theta == 5e6


def test_llava_next_is_known_by_its_class():
    """Its model_type is also that of another model in transformers, or of the language model."""
    for kind in ("llava", "qwen2", "llava_qwen"):
        assert family_type(NEXT | {"model_type": kind}, "x") == "llava_qwen"
    with pytest.raises(UserError, match="model_type 'llava'; the families"):
        family_type(NEXT | {"architectures": ["LlavaForConditionalGeneration"]}, "x")
    assert family_type(NEXT | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "x") == "qwen2"


def test_llava_next_pinpoints():
    """A list of (width, height), or the first and last count of tiles; the order breaks ties and is kept."""
    wide = read(NEXT | {"image_grid_pinpoints": [[768, 384], [384, 1152]]})
    assert wide.views.canvases == ((384, 768), (1152, 384))
    short = read(NEXT | {"image_grid_pinpoints": "(1x1),...,(2x3)"})
    assert short.views.canvases == tuple(
        (h * 384, w * 384) for w, h in ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3))
    )
    assert set(read(NEXT | {"image_grid_pinpoints": "(1x1),...,(6x6)"}).views.canvases) == set(
        read(NEXT).views.canvases
    )


def test_llava_next_may_have_no_limit_of_tokens():
    """ "anyres" without "max": tile grids are never shrunk."""
    assert read(NEXT | {"image_aspect_ratio": "anyres"}).views.max_tiles is None
    assert read(NEXT | {"image_aspect_ratio": "anyres_max_4"}).views.max_tiles == 4


def test_cambrian_views():
    """Tiles by width first, as its code tries them, none where images are padded; sides of token counts."""
    views = read(CAMBRIAN | {"anyres_max_subimages": 3, "miv_token_len": 196}).views
    assert views == ViewConfig(
        "cambrian_s",
        ((384, 384), (768, 384), (1152, 384), (384, 768), (384, 1152)),
        image_side=27,
        frame_side=14,
    )
    padded = {name: value for name, value in CAMBRIAN.items() if name != "anyres_max_subimages"}
    assert read(padded | {"image_aspect_ratio": "pad"}).views.canvases == ()


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
    (remark,) = family_of(config, "x").remarks(config | scaling)
    assert "yarn" in remark and "is ignored, as the original code does" in remark
    assert not family_of(config, "x").remarks(config | {"rope_parameters": {"rope_type": "default"}})
    assert not family_of(config, "x").remarks(config)


def test_transformers_does_not_ignore_a_scaled_rope():
    """So its layout refuses one, naming the inner config."""
    text = HUB["text_config"] | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    with pytest.raises(UserError, match=r"text_config has rope_scaling="):
        read(HUB | {"text_config": text})


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy='default'"),
        ({"projector_hidden_act": "silu"}, "projector_hidden_act='silu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias=False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"text_config": QWEN_7B | {"model_type": "llama"}}, "text_config has model_type='llama'"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "vision_config has model_type='clip"),
        ({"vision_config": None}, "lacks vision_config"),
        ({"vision_feature_layer": [-1, -2]}, r"vision_feature_layer=\[-1, -2\], which should be of type int"),
        ({"vision_feature_layer": 26}, "vision_feature_layer=26 must be between -26 and -1"),
        ({"vision_aspect_ratio": "pad"}, "only 'anyres_max_N' is"),
        ({"vision_aspect_ratio": "anyres_max_0"}, "only 'anyres_max_N' is"),
        ({"image_grid_pinpoints": [[384]]}, "should be a list of"),
        ({"image_grid_pinpoints": []}, "should be a list of"),
        ({"image_grid_pinpoints": [[384, 400]]}, "must be multiples of the tower's 384 pixels"),
    ],
)
def test_llava_onevision_refuses_what_would_compute_something_else(change, message):
    """Each by the name of its field."""
    with pytest.raises(ValueError, match=message):
        read(HUB | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear'"),
        ({"mm_projector_type": None}, "mm_projector_type=None"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type='flat'"),
        ({"mm_newline_position": "grid"}, "mm_newline_position='grid'"),
        ({"mm_spatial_pool_mode": "average"}, "mm_spatial_pool_mode='average'"),
        ({"mm_spatial_pool_stride": 4}, "mm_spatial_pool_stride=4"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer=-1"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type='qformer'"),
        ({"add_faster_video": True}, "add_faster_video=True"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio='pad'"),
        ({"image_grid_pinpoints": "all"}, r"expected such as '\(1x1\)"),
        ({"image_grid_pinpoints": None}, "lacks image_grid_pinpoints"),
        ({"mm_vision_tower": None}, "lacks mm_vision_tower"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
    ],
)
def test_llava_next_refuses_what_would_compute_something_else(change, message):
    """Each by the name of its field."""
    with pytest.raises(UserError, match=message):
        read(NEXT | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "sva"}, "mm_projector_type='sva'"),
        ({"connector_only": False}, "connector_only=False"),
        ({"connector_only": None}, "connector_only=None"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer=-1"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
        ({"mm_use_im_newline_token": False}, "mm_use_im_newline_token=False"),
        ({"mm_vision_tower_aux_list": ["a", "b"]}, "one tower is supported"),
        ({"mm_vision_tower_aux_token_len_list": [576]}, r"mm_vision_tower_aux_token_len_list=\[576\]"),
        ({"image_aspect_ratio": "square"}, "image_aspect_ratio='square'"),
        ({"anyres_max_subimages": None}, "lacks anyres_max_subimages"),
        ({"si_token_len": 700}, "si_token_len=700, which is no positive square"),
        ({"miv_token_len": 0}, "miv_token_len=0, which is no positive square"),
        ({"miv_token_len": None}, "lacks miv_token_len"),
    ],
)
def test_cambrian_refuses_what_would_compute_something_else(change, message):
    """Each by the name of its field."""
    with pytest.raises(UserError, match=message):
        read(CAMBRIAN | change)


@pytest.mark.parametrize("name", ["llava_onevision", "llava_qwen", "cambrian_qwen"])
def test_whole_tables_fill_every_parameter_once(name):
    """No tensor twice, no parameter forgotten, under the names of each layout."""
    from gaze_jax.convert.source import leaf_shapes

    config = MODELS["llava-onevision-qwen2-0.5b"]
    rules = FAMILIES[name].rules(config)
    assert sorted(rule.leaf for rule in rules) == sorted(leaf_shapes(config))
    tensors = [tensor for rule in rules for tensor in rule.tensors]
    assert len(tensors) == len(set(tensors)) == 24 * 12 + 2 + 26 * 16 + 3 + 4 + 1
