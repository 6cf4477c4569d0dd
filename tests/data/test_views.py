"""Views of every family: what they have in common, and what is refused."""

import dataclasses
import weakref

import numpy as np
import PIL.Image
import pytest

from gaze_jax.core.layout import ViewConfig
from gaze_jax.data import views as module
from gaze_jax.data.pixels import normalise
from gaze_jax.errors import UserError
from gaze_jax.families.square import SQUARE
from tests.helpers.views import (
    CAMBRIAN_S,
    frame_shape,
    image_shapes,
    image_views,
    layout,
    noise,
    pixels,
    shapes_of,
    tiny_cambrian,
    tiny_onevision,
    video_views,
)


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


@pytest.mark.parametrize("size", [(31, 50), (24, 24), (90, 31)])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("at", [tiny_onevision(9), tiny_cambrian(4, 3), layout(ViewConfig(), 24, 4)])
def test_an_image_of_pillow_gives_the_views_of_its_array(at, alone, size):
    image = noise(*size)
    mine, expected = (image_views(at, one, alone=alone) for one in (PIL.Image.fromarray(image), image))
    np.testing.assert_array_equal(pixels(mine), pixels(expected))
    assert [view.corners for view in mine.views] == [view.corners for view in expected.views]


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


@pytest.mark.parametrize("canvas", [(0, 384), (384,), (384, 384, 384), (-384, 384)])
def test_canvases_that_are_no_sizes_are_refused(canvas):
    """Two positive numbers each."""
    with pytest.raises(ValueError, match=r"views\.canvases has .* should be \(height, width\) in pixels"):
        ViewConfig("llava_onevision", canvases=((384, 384), canvas))


def test_views_of_another_style_than_the_layouts_are_refused():
    """What a config says is never read by another family's rules."""
    at = tiny_cambrian(4, 3)
    with pytest.raises(ValueError, match=r"views\.style='cambrian_s' was given the views of style 'square'"):
        module.image_views(SQUARE.views, at, noise(8, 8), alone=True)
    with pytest.raises(ValueError, match=r"views\.style='cambrian_s' was given the views of style 'square'"):
        module.frame_shape(SQUARE.views, at, 8, 8)


def test_a_grid_that_is_pooled_cannot_be_shrunk_too():
    """It would be a sum of more than four tokens of the tower."""
    grid = module.whole_grid(layout(ViewConfig(), 24, 4), (24, 24), 3, "squash")
    small = dataclasses.replace(grid, shape=(2, 2))
    style = dataclasses.replace(SQUARE.views, image_grids=lambda *_: ([small], False))
    with pytest.raises(ValueError, match="pooled grid cannot be shrunk"):
        module.image_views(style, layout(ViewConfig(), 24, 4), noise(24, 24), alone=True)
