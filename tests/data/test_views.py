"""Views against the originals: transformers' processors and models, and torch for Cambrian-S."""

import math
import types
import weakref

import numpy as np
import pytest
import torch
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from gaze_jax.core.layout import ViewConfig, VisualLayout
from gaze_jax.data.pixels import normalise
from gaze_jax.data.views import (
    frame_shape,
    image_shapes,
    image_views,
    video_end_newline,
    video_views,
)
from gaze_jax.errors import UserError
from gaze_jax.models.published import cambrian_canvases
from tests.helpers.views import (
    CAMBRIAN_S,
    LLAVA_ONEVISION,
    cambrian_canvas,
    cambrian_grid,
    layout,
    noise,
    pinpoints,
    pixels,
    tiny_cambrian,
    tiny_onevision,
)

# --- counts ------------------------------------------------------------------------------------------------


def transformers_count(at: VisualLayout, height: int, width: int) -> int:
    """Placeholders that transformers' processor writes for an image that is alone."""
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.image_processor = types.SimpleNamespace(image_grid_pinpoints=pinpoints(at))
    processor.num_image_tokens = at.tokens
    processor.vision_aspect_ratio = f"anyres_max_{at.views.max_tiles}"
    return processor._get_number_of_features(height, width, at.image_size, at.image_size)


# (height, width) of images that fill a whole number of rows or columns, less 1e-14 in floats: transformers
# rounds, Cambrian-S cuts the fraction off. The first belong to 27 tokens a side, then 24, 8, and tiny grids.
NEARLY_WHOLE = [(423, 188), (188, 423), (1323, 196), (196, 1323), (98, 1323), (820, 1107)]
NEARLY_WHOLE += [(110, 176), (984, 205), (693, 1848), (147, 392), (392, 147), (343, 392)]
NEARLY_WHOLE += [(22, 55), (55, 22), (39, 117), (117, 39), (98, 147), (147, 98), (49, 98)]


def count(shapes: list[tuple[int, int, bool]], end_newline: bool) -> int:
    return sum(h * (w + newlines) for h, w, newlines in shapes) + end_newline


def sizes(number: int, smallest: int, largest: int) -> list[tuple[int, int]]:
    """(height, width), every order of magnitude alike."""
    low, high = math.log(smallest), math.log(largest + 1)
    drawn = np.exp(np.random.default_rng(number).uniform(low, high, (number, 2))).astype(int)
    return [(int(height), int(width)) for height, width in drawn]


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


def test_published_numbers():
    """What is known of both models: 729 + 1, 196 a frame; 72, 54 and 36 a frame."""
    assert pinpoints(layout(LLAVA_ONEVISION)) == LlavaOnevisionImageProcessorPil.image_grid_pinpoints
    ov, cambrian = layout(LLAVA_ONEVISION), layout(CAMBRIAN_S)
    assert count(*image_shapes(ov, 480, 640, alone=False)) == 730
    assert count([frame_shape(ov, 480, 640)] * 32, video_end_newline(ov)) == 196 * 32 + 1
    frames = [frame_shape(cambrian, *size) for size in [(500, 500), (480, 640), (1080, 1920)]]
    assert [count([frame], video_end_newline(cambrian)) for frame in frames] == [72, 54, 36]
    assert len(CAMBRIAN_S.canvases) == 23
    assert set(cambrian_canvases(2, 3)) == {(2, 2), (2, 4), (2, 6), (4, 2), (6, 2)}
    # Several images of Cambrian-S keep the tokens of a single one; only frames have fewer.
    assert image_shapes(cambrian, 480, 640, alone=False) == ([(21, 27, True)], False)


# --- features ----------------------------------------------------------------------------------------------


def features(tiles: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(tiles).normal(size=(tiles, tokens, 3)).astype(np.float32)


NEWLINE = np.array([7.0, -5.0, 3.0], np.float32)


def weigh(view, tokens: np.ndarray) -> np.ndarray:
    """A view's tokens, float32 [h, w, M], from those of the tower."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    assert view.pool_indices.dtype == np.int32 and view.pool_weights.dtype == np.float32
    assert view.pool_indices.shape == view.pool_weights.shape == (*view.pool_indices.shape[:2], 4)
    assert view.pool_indices.min() >= 0 and view.pool_indices.max() < len(flat)
    assert not view.pool_indices[view.pool_weights == 0].any() and view.pool_weights.min() >= 0
    np.testing.assert_allclose(view.pool_weights.sum(-1), 1, atol=3e-7)
    return (flat[view.pool_indices] * view.pool_weights[..., None]).sum(2)


def sequence(views, tokens: np.ndarray) -> np.ndarray:
    """Everything that the decoder would see, float32 [n, M]; ``tokens`` are of the views' images in order."""
    out, start = [], 0
    for view in views.views:
        grid = weigh(view, tokens[start : start + len(view.images)])
        start += len(view.images)
        if view.newlines:
            grid = np.concatenate([grid, np.broadcast_to(NEWLINE, (len(grid), 1, len(NEWLINE)))], axis=1)
        out.append(grid.reshape(-1, grid.shape[-1]))
    assert start == len(tokens)
    return np.concatenate([*out, NEWLINE[None]] if views.end_newline else out)


def shapes_of(views) -> tuple[list[tuple[int, int, bool]], bool]:
    return [(*view.pool_indices.shape[:2], view.newlines) for view in views.views], views.end_newline


def transformers_model(at: VisualLayout) -> types.SimpleNamespace:
    """As much of a LlavaOnevisionModel as packing its features needs."""
    vision = types.SimpleNamespace(image_size=at.image_size, patch_size=at.patch_size)
    config = types.SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints(at))
    return types.SimpleNamespace(config=config)


def check_onevision(at: VisualLayout, size: tuple[int, int], alone: bool) -> int:
    """Returns the images that the tower reads."""
    views = image_views(at, noise(*size), alone=alone)
    tokens = features(sum(len(view.images) for view in views.views), at.tokens)
    (expected,), _ = LlavaOnevisionModel.pack_image_features(
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
    pooled = LlavaOnevisionModel.apply_pooling(transformers_model(at), torch.from_numpy(tokens))
    expected = np.concatenate([pooled.numpy().reshape(-1, 3), NEWLINE[None]])
    np.testing.assert_allclose(sequence(views, tokens), expected, rtol=0, atol=1e-6)
    pooled_side = math.ceil((side // patch) / 2)
    assert shapes_of(views) == ([(pooled_side, pooled_side, False)] * 2, True)
    assert frame_shape(at, 30, 40) == (pooled_side, pooled_side, False)


def pooled(tokens: np.ndarray, side: int, tiles: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    return cambrian_grid(torch.from_numpy(tokens), side, tiles, size, torch.from_numpy(NEWLINE)).numpy()


def check_cambrian(at: VisualLayout, size: tuple[int, int]) -> int:
    """Returns the tiles of an image of this size, alone."""
    image_side, frame_side = at.views.image_side or at.grid, at.views.frame_side or at.grid
    views = image_views(at, noise(*size), alone=True)
    tiles = len(views.views[1].images)
    tokens = features(1 + tiles, at.tokens)
    snapshot = pooled(tokens[:1], image_side, (1, 1), size)
    wide, tall = cambrian_canvas(
        size, at.image_size, max(width for _, width in at.views.canvases) // at.image_size
    )
    shape = tall // at.image_size, wide // at.image_size
    both = np.concatenate([snapshot, pooled(tokens[1:], image_side, shape, size)])
    np.testing.assert_allclose(sequence(views, tokens), both, rtol=0, atol=1e-6)
    assert shapes_of(views) == image_shapes(at, *size, alone=True)

    several = image_views(at, noise(*size), alone=False)
    np.testing.assert_allclose(sequence(several, tokens[:1]), snapshot, rtol=0, atol=1e-6)
    assert shapes_of(several) == image_shapes(at, *size, alone=False)

    frame = video_views(at, [noise(*size)])
    expected = pooled(tokens[:1], frame_side, (1, 1), size)
    np.testing.assert_allclose(sequence(frame, tokens[:1]), expected, rtol=0, atol=1e-6)
    assert shapes_of(frame) == ([frame_shape(at, *size)], video_end_newline(at))
    return tiles


@pytest.mark.parametrize(
    "size", [(427, 640), (384, 384), (70, 500), (423, 188), (147, 392), (820, 1107)], ids=str
)
def test_cambrian_features_at_real_size(size):
    """The published numbers: 27 a side for images, 8 for frames."""
    check_cambrian(layout(CAMBRIAN_S), size)


@pytest.mark.parametrize(("image_side", "frame_side", "side"), [(None, None, 24), (4, 3, 24), (3, 2, 20)])
def test_cambrian_features_of_tiny_grids(image_side, frame_side, side):
    """80 sizes; tiles are pooled one by one, before they are joined."""
    at = tiny_cambrian(image_side, frame_side, side)
    limit = min(image_side or 6, frame_side or 6)
    found = set()
    for height, width in [*sizes(80, 8, 150), *NEARLY_WHOLE[11:]]:
        if max(height, width) < limit * min(height, width):
            found.add(check_cambrian(at, (height, width)))
    assert found >= {1, 2, 4}


def test_square_tokens_are_the_towers():
    """The first tap is the token itself and nothing else has a weight; no newline anywhere."""
    at = layout(ViewConfig(), 24, 4)
    for views in (image_views(at, noise(9, 30), alone=True), video_views(at, [noise(9, 30)])):
        (view,) = views.views
        assert not view.newlines and not views.end_newline
        np.testing.assert_array_equal(view.pool_indices[..., 0], np.arange(36).reshape(6, 6))
        np.testing.assert_array_equal(view.pool_weights, np.broadcast_to([1, 0, 0, 0], (6, 6, 4)))
    assert image_shapes(at, 9, 30, alone=True) == ([(6, 6, False)], False)
    assert frame_shape(at, 9, 30) == (6, 6, False)


# --- the rest ----------------------------------------------------------------------------------------------


def test_corners_are_in_pixels_of_the_original():
    """The whole image wherever padding was cut off; the padded square where it was kept."""
    image = noise(31, 50)
    for at in (tiny_onevision(9), tiny_cambrian(4, 3), layout(ViewConfig(), 24, 4)):
        views = image_views(at, image, alone=True).views + video_views(at, [image]).views
        assert {view.corners for view in views} == {(0, 0, 50, 31)}
    (view,) = image_views(tiny_onevision(9), image, alone=False).views
    assert view.corners == (0, -9, 50, 41)
    (view,) = image_views(tiny_onevision(9), noise(50, 31), alone=False).views
    assert view.corners == (-9, 0, 41, 50)


def test_without_canvases_an_image_alone_is_one_of_several():
    """No tiles, whatever else the style does."""
    for style in ("llava_onevision", "cambrian_s"):
        at = layout(ViewConfig(style), 24, 4)
        one, several = (image_views(at, noise(31, 50), alone=alone) for alone in (True, False))
        assert shapes_of(one) == shapes_of(several) == image_shapes(at, 31, 50, alone=True)
        np.testing.assert_array_equal(pixels(one), pixels(several))


@pytest.mark.parametrize("at", [tiny_onevision(9), tiny_cambrian(4, 3), layout(ViewConfig(), 24, 4)])
def test_frames_come_one_by_one_and_are_not_kept(at):
    """A decoder may give frames lazily and into one buffer; what remains is uint8 of the tower's size."""
    given: list[weakref.ref] = []

    def decode():
        for _ in range(20):
            frame = noise(24, 24)
            given.append(weakref.ref(frame))
            assert sum(reference() is not None for reference in given) <= 2
            yield frame

    views = video_views(at, decode())
    assert len(given) == len(views.views) == 20
    assert all(view.images.dtype == np.uint8 and view.images.shape == (1, 24, 24, 3) for view in views.views)
    assert all(view.pool_indices is views.views[0].pool_indices for view in views.views)
    assert not any(reference() is not None for reference in given)

    buffer = noise(24, 24)
    views = [video_views(at, [buffer]).views[0], image_views(at, buffer, alone=True).views[-1]]
    before = [view.images.copy() for view in views]
    buffer[:] = 0
    for view, images in zip(views, before, strict=True):
        np.testing.assert_array_equal(view.images, images)


def test_pool_indices_are_read_only():
    """They are shared by every image of a size."""
    (view, *_) = image_views(tiny_onevision(9), noise(31, 50), alone=True).views
    for array in (view.pool_indices, view.pool_weights):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0, 0] = 1


BAD = {
    "float32 .4, 4, 3.": np.zeros((4, 4, 3), np.float32),
    "uint8 .4, 4.": np.zeros((4, 4), np.uint8),
    "uint8 .4, 4, 4.": np.zeros((4, 4, 4), np.uint8),
    "uint8 .0, 4, 3.": np.zeros((0, 4, 3), np.uint8),
    "uint8 .4, 0, 3.": np.zeros((4, 0, 3), np.uint8),
    "not a list": [[[0, 0, 0]]],
}


def sentence(error) -> None:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")


@pytest.mark.parametrize("match", BAD)
def test_what_is_no_image_is_refused(match):
    """A sentence that says what came, and which frame it was."""
    at = tiny_cambrian(4, 3)
    with pytest.raises(ValueError, match=f"^An image must be .*{match}") as error:
        image_views(at, BAD[match], alone=True)
    sentence(error)
    with pytest.raises(ValueError, match=f"^Frame 1 of a video must be .*{match}") as error:
        video_views(at, [noise(8, 8), BAD[match]])
    sentence(error)


def test_other_bad_input_is_refused():
    """No frames, sizes of nothing, pixels that are normalised already."""
    at = tiny_cambrian(4, 3)
    with pytest.raises(ValueError, match="no frames"):
        video_views(at, [])
    for size in [(0, 5), (5, -1)]:
        with pytest.raises(ValueError, match="is empty"):
            image_shapes(at, *size, alone=True)
        with pytest.raises(ValueError, match="is empty"):
            frame_shape(at, *size)
    with pytest.raises(ValueError, match="float32"):
        normalise(np.zeros(3, np.float32))


def test_strips_that_no_token_shows():
    """Refused where nothing is left, with pixels or without: the originals would answer about nothing."""
    at = layout(CAMBRIAN_S)
    assert frame_shape(at, 100, 799) == (2, 8, True)
    for call in (lambda: frame_shape(at, 100, 801), lambda: video_views(at, [noise(100, 801)])):
        with pytest.raises(UserError, match=r"A frame of 100x801 pixels .* 8x8 tokens") as error:
            call()
        sentence(error)

    even = tiny_cambrian(4, 3)
    for call in (image_shapes, lambda *_, alone: image_views(even, noise(2, 100), alone=alone)):
        with pytest.raises(UserError, match=r"An image of 2x100 pixels .* 4x4 tokens"):
            call(even, 2, 100, alone=False)
    # The tiles still show what the snapshot does not.
    views = image_views(even, noise(20, 100), alone=True)
    assert [len(view.images) for view in views.views] == [5]
    assert shapes_of(views) == image_shapes(even, 20, 100, alone=True) == ([(4, 20, True)], False)

    thin = layout(ViewConfig("llava_onevision", ((20, 200),), max_tiles=1), 20, 4)
    assert image_shapes(thin, 20, 200, alone=True) == ([(5, 5, False), (1, 15, True)], False)
    with pytest.raises(UserError, match=r"views\.max_tiles=1 leaves it none") as error:
        image_shapes(thin, 1, 200, alone=True)
    sentence(error)


def test_numbers_that_a_style_has_no_use_for_are_refused():
    """No option is ignored."""
    with pytest.raises(ValueError, match="image_side"):
        ViewConfig("llava_onevision", image_side=3)
    with pytest.raises(ValueError, match="max_tiles"):
        ViewConfig("cambrian_s", max_tiles=9)


@pytest.mark.parametrize("canvas", [(0, 384), (384,), (384, 384, 384), (-384, 384)])
def test_canvases_that_are_no_sizes_are_refused(canvas):
    """Two positive numbers each."""
    with pytest.raises(ValueError, match=r"views\.canvases has .* should be \(height, width\) in pixels"):
        ViewConfig("llava_onevision", canvases=((384, 384), canvas))
