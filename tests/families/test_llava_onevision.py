"""LLaVA-OneVision: views against transformers, config.json in both layouts, conversations."""

import math
import types

import numpy as np
import pytest

from gaze_jax.core.layout import ViewConfig, VisualLayout
from gaze_jax.data.sample import Image, Video
from gaze_jax.errors import UserError
from gaze_jax.families import TOWERS, check_views, model_type_of
from gaze_jax.families.llava_onevision import LLAVA_ONEVISION as FAMILY
from gaze_jax.media.video import FrameSampling
from tests.helpers.model_configs import HUB, NEXT, QWEN_7B, read
from tests.helpers.views import (
    LLAVA_ONEVISION,
    NEARLY_WHOLE,
    NEWLINE,
    count,
    features,
    frame_shape,
    image_shapes,
    image_views,
    layout,
    noise,
    pinpoints,
    sequence,
    shapes_of,
    sizes,
    tiny_onevision,
    video_views,
)

torch = pytest.importorskip("torch")
ONEVISION = "transformers.models.llava_onevision"
images = pytest.importorskip(f"{ONEVISION}.image_processing_pil_llava_onevision")
modeling = pytest.importorskip(f"{ONEVISION}.modeling_llava_onevision")
processing = pytest.importorskip(f"{ONEVISION}.processing_llava_onevision")

# Views


def transformers_count(at: VisualLayout, height: int, width: int) -> int:
    """Placeholders that transformers' processor writes for an image that is alone."""
    processor = processing.LlavaOnevisionProcessor.__new__(processing.LlavaOnevisionProcessor)
    processor.image_processor = types.SimpleNamespace(image_grid_pinpoints=pinpoints(at))
    processor.num_image_tokens = at.tokens
    processor.vision_aspect_ratio = f"anyres_max_{at.views.max_tiles}"
    return processor._get_number_of_features(height, width, at.image_size, at.image_size)


@pytest.mark.parametrize("patch", [14, 16], ids=["27x27", "24x24"])
def test_counts_are_the_placeholders_of_transformers(patch):
    """Real numbers, 1500 sizes from 1x1 to 6000x6000, and the strips that leave a tile grid no token."""
    at = layout(LLAVA_ONEVISION, 384, patch)
    strips = [(1, 1), (1, 3000), (3000, 1), (1, 6000), (2, 4000), (6000, 6000), (384, 384), (385, 384)]
    empty = shrunk = 0
    for height, width in [*sizes(1500, 1, 6000), *strips, *NEARLY_WHOLE]:
        shapes, end_newline = image_shapes(at, height, width, alone=True)
        expected = transformers_count(at, height, width)
        if len(shapes) == 1:
            # No token shows the strip. Of one that stands, transformers keeps the newlines, alone.
            assert max(height, width) > at.grid * min(height, width)
            expected -= (expected - at.tokens) * (height > width)
            empty += 1
        else:
            shrunk += shapes[1][0] * shapes[1][1] > 8 * at.tokens
        assert count(shapes, end_newline) == expected, (height, width)
        assert image_shapes(at, height, width, alone=False) == ([(at.grid, at.grid, False)], True)
    assert shrunk > 20
    assert bool(empty) == (at.grid % 2 == 0)


def transformers_model(at: VisualLayout) -> types.SimpleNamespace:
    """As much of a LlavaOnevisionModel as packing its features needs."""
    vision = types.SimpleNamespace(image_size=at.image_size, patch_size=at.patch_size)
    config = types.SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints(at))
    return types.SimpleNamespace(config=config)


def check_onevision(at: VisualLayout, size: tuple[int, int], alone: bool) -> int:
    """Returns the images that the tower reads."""
    views = image_views(at, noise(*size), alone=alone)
    tokens = features(sum(len(view.images) for view in views.views), at.tokens)
    (expected,), _ = modeling.LlavaOnevisionModel.pack_image_features(
        transformers_model(at),
        [torch.from_numpy(tokens)],
        torch.tensor([size]),
        image_newline=torch.from_numpy(NEWLINE),
        vision_aspect_ratio=f"anyres_max_{at.views.max_tiles}",
    )
    np.testing.assert_allclose(sequence(views, tokens), expected.numpy(), rtol=0, atol=1e-6)
    assert shapes_of(views) == image_shapes(at, *size, alone=alone)
    return len(tokens)


REAL_SIZES = [(427, 640), (384, 384), (100, 100), (1, 1), (1150, 1153), (30, 900), (1700, 90), (2000, 2100)]


@pytest.mark.parametrize("size", REAL_SIZES, ids=str)
def test_onevision_features_at_real_size(size):
    """384 pixels in patches of 14; the last one shrinks its tile grid."""
    at = layout(LLAVA_ONEVISION)
    shrunk = size == REAL_SIZES[-1]
    assert (check_onevision(at, size, alone=True) > 20) == shrunk
    (_, (h, w, _)), _ = image_shapes(at, *size, alone=True)
    assert not shrunk or 8.5 * at.tokens < h * w < 9 * at.tokens


@pytest.mark.parametrize("side", [24, 20], ids=["6x6", "5x5"])
@pytest.mark.parametrize("max_tiles", [9, 1])
def test_onevision_features_of_tiny_grids(side, max_tiles):
    """120 sizes, with one tile, with many, shrunk and not, alone and beside others."""
    at = tiny_onevision(max_tiles, side)
    tiles = set()
    for size in [*sizes(120, 4, 200), (side, side), *NEARLY_WHOLE[12:]]:
        tiles.add(check_onevision(at, size, alone=True) - 1)
        assert check_onevision(at, size, alone=False) == 1
    assert tiles == {1, 2, 4, 6}


@pytest.mark.parametrize(("side", "patch"), [(384, 14), (24, 4), (20, 4)], ids=["27", "6", "5"])
def test_onevision_frames_are_pooled_as_transformers_does(side, patch):
    """Even and odd grids; one newline after all frames and none within."""
    at = layout(LLAVA_ONEVISION) if side == 384 else tiny_onevision(9, side, patch)
    views = video_views(at, [noise(30, 40), noise(30, 40)])
    tokens = features(2, at.tokens)
    pooled = modeling.LlavaOnevisionModel.apply_pooling(transformers_model(at), torch.from_numpy(tokens))
    expected = np.concatenate([pooled.numpy().reshape(-1, 3), NEWLINE[None]])
    np.testing.assert_allclose(sequence(views, tokens), expected, rtol=0, atol=1e-6)
    pooled_side = math.ceil((side // patch) / 2)
    assert shapes_of(views) == ([(pooled_side, pooled_side, False)] * 2, True)
    assert frame_shape(at, 30, 40) == (pooled_side, pooled_side, False)


def test_published_numbers_of_tokens():
    """What is known of it: 729 + 1 for one of several images, 196 a frame and one newline."""
    at = layout(LLAVA_ONEVISION)
    assert pinpoints(at) == images.LlavaOnevisionImageProcessorPil.image_grid_pinpoints
    assert count(*image_shapes(at, 480, 640, alone=False)) == 730
    assert count([frame_shape(at, 480, 640)] * 32, FAMILY.views.video_end_newline) == 196 * 32 + 1


def test_a_limit_that_leaves_no_token_is_refused():
    """Rather than a view without tokens."""
    thin = layout(ViewConfig("llava_onevision", ((20, 200),), max_tiles=1), 20, 4)
    assert image_shapes(thin, 20, 200, alone=True) == ([(5, 5, False), (1, 15, True)], False)
    with pytest.raises(UserError, match=r"views\.max_tiles=1 leaves it none") as error:
        image_shapes(thin, 1, 200, alone=True)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_number_that_it_has_no_use_for_is_refused():
    """No option is ignored."""
    with pytest.raises(UserError, match=r"'llava_onevision' pools no image; leave views.image_side empty"):
        check_views(ViewConfig("llava_onevision", image_side=3))


# Conversations and videos


def test_images_come_first_then_videos_then_the_text():
    """Whatever the order in which they were given."""
    assert FAMILY.arrange(("Is ", Video(1), "like ", Image(2), " or ", Image(0), "? ")) == (
        Image(2),
        Image(0),
        Video(1),
        "Is like  or ?",
    )
    assert FAMILY.arrange((" text alone ",)) == (" text alone ",)


def test_it_has_no_system_prompt_and_32_frames():
    """As transformers' template and lmms-eval have it."""
    assert FAMILY.system is None
    assert FAMILY.frames == FrameSampling(max_frames=32)


# config.json


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
        assert model_type_of(NEXT | {"model_type": kind}, "x") == "llava_qwen"
    with pytest.raises(UserError, match="model_type 'llava'; the models"):
        model_type_of(NEXT | {"architectures": ["LlavaForConditionalGeneration"]}, "x")
    assert (
        model_type_of(NEXT | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "x") == "qwen2"
    )


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


def test_transformers_does_not_ignore_a_scaled_rope():
    """So its layout refuses one, naming the inner config."""
    text = HUB["text_config"] | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    with pytest.raises(UserError, match=r"text_config: rope_scaling has type="):
        read(HUB | {"text_config": text})


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
