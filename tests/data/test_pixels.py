"""The pixels of views are those of transformers' processors, bit for bit, on photographs."""

import dataclasses
import functools
import math
import tracemalloc

import numpy as np
import PIL.Image
import pytest

from gaze_jax.core.layout import ViewConfig
from gaze_jax.corpora import bundled
from gaze_jax.data import pixels as module
from gaze_jax.data.pixels import GREY, normalise, pad, resize, resize_on_square
from tests.helpers.views import (
    CAMBRIAN_S,
    LLAVA_ONEVISION,
    cambrian_canvas,
    image_views,
    layout,
    noise,
    pinpoints,
    pixels,
    video_views,
)

skimage_data = pytest.importorskip("skimage.data")
transforms = pytest.importorskip("transformers.image_transforms")
onevision = pytest.importorskip("transformers.models.llava_onevision.image_processing_pil_llava_onevision")
siglip_pil = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")

# Cuts of the photographs, (height, width): square, odd, small, tiny, very wide, very tall, and beyond a tile.
CUTS = [(300, 300), (299, 451), (37, 53), (5, 3), (23, 600), (500, 17), (384, 384), (427, 640), (999, 1000)]


@functools.cache
def photographs() -> list[np.ndarray]:
    """Photographs that come with scikit-image and scikit-learn; nothing is downloaded."""
    names = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "retina")
    scikit_image = [getattr(skimage_data, name)() for name in names]
    return scikit_image + [bundled.photo(name) for name in bundled.PHOTOS]


def cuts(number: int, height: int, width: int) -> list[np.ndarray]:
    """``number`` cuts of this size from different photographs."""
    large = [photo for photo in photographs() if photo.shape[0] >= height and photo.shape[1] >= width]
    assert large, "no photograph is so large"
    out = []
    for photo in (large * number)[:number]:
        top, left = (photo.shape[0] - height) // 2, (photo.shape[1] - width) // 3
        out.append(np.ascontiguousarray(photo[top : top + height, left : left + width]))
    return out


def same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


def siglip(images: list[PIL.Image.Image]) -> np.ndarray:
    processor = siglip_pil.SiglipImageProcessorPil(size={"height": 384, "width": 384})
    return np.stack(processor(images=images)["pixel_values"])


def square_on_grey(image: np.ndarray) -> PIL.Image.Image:
    """The image in the middle of a grey square."""
    height, width = image.shape[:2]
    longer = max(height, width)
    out = PIL.Image.new("RGB", (longer, longer), (127, 127, 127))
    out.paste(PIL.Image.fromarray(image), ((longer - width) // 2, (longer - height) // 2))
    return out


def test_every_level_is_normalised_as_transformers_does():
    """All 256 levels, bit for bit, in the shape they came in."""
    levels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    expected = transforms.normalize(
        transforms.rescale(levels[None], 1 / 255), 0.5, 0.5, input_data_format="channels_first"
    )[0]
    same_bits(normalise(levels), expected)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_square_pixels_are_those_of_siglip(cut):
    """A squashed image, alone, beside others or in a video."""
    at = layout(ViewConfig())
    images = cuts(2, *cut)
    expected = siglip([PIL.Image.fromarray(image) for image in images])
    for alone in (True, False):
        for image, wanted in zip(images, expected, strict=True):
            same_bits(pixels(image_views(at, image, alone=alone)), wanted[None])
    same_bits(pixels(video_views(at, images)), expected)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_onevision_pixels_are_those_of_transformers(cut):
    """Base and tiles of an image alone, padded squares of several, squashed frames."""
    at = layout(LLAVA_ONEVISION)
    images = cuts(2, *cut)
    processor = onevision.LlavaOnevisionImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    assert processor.image_grid_pinpoints == pinpoints(at)
    pictures = [PIL.Image.fromarray(image) for image in images]
    alone = processor(images=pictures[:1])["pixel_values"][0]
    same_bits(pixels(image_views(at, images[0], alone=True)), alone)
    several = np.concatenate(processor(images=[pictures])["pixel_values"])
    for image, expected in zip(images, several, strict=True):
        same_bits(pixels(image_views(at, image, alone=False)), expected[None])
    # Its video processor needs torchvision; a frame is squashed as the base of an image is.
    same_bits(pixels(video_views(at, images[:1])), alone[:1])


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_cambrian_pixels_are_padded_with_grey(cut):
    """The padded square and the tiles, made with Pillow's own operations, through SigLIP's processor."""
    # A grid of 27 shows even a strip, which one of 8 does not; the pixels are the same.
    at = layout(dataclasses.replace(CAMBRIAN_S, frame_side=None))
    (image,) = cuts(1, *cut)
    expected = siglip([square_on_grey(image)])
    views = image_views(at, image, alone=True)
    same_bits(pixels(image_views(at, image, alone=False)), expected)
    same_bits(pixels(video_views(at, [image])), expected)
    same_bits(pixels(views)[:1], expected)

    wide, tall = canvas = cambrian_canvas(cut, 384, 9)
    scale = min(wide / cut[1], tall / cut[0])
    size = [min(math.ceil(extent * scale), limit) for extent, limit in zip(cut[::-1], canvas, strict=True)]
    padded = PIL.Image.new("RGB", canvas, (127, 127, 127))
    inside = PIL.Image.fromarray(image).resize(size)
    padded.paste(inside, ((wide - size[0]) // 2, (tall - size[1]) // 2))
    boxes = [(x, y, x + 384, y + 384) for y in range(0, tall, 384) for x in range(0, wide, 384)]
    same_bits(pixels(views)[1:], siglip([padded.crop(box) for box in boxes]))


@pytest.mark.parametrize("size", [(31, 50), (50, 31), (50, 50), (3, 700), (700, 3), (24, 24)], ids=str)
@pytest.mark.parametrize("strip", [1, 2000, module.STRIP_PIXELS])
def test_the_square_need_not_exist(size, strip, monkeypatch):
    """Strip by strip, a row or all rows at a time, the bits are those of padding first."""
    monkeypatch.setattr(module, "STRIP_PIXELS", strip)
    longer = max(size)
    for side in (24, 100):
        expected = resize(pad(noise(*size), (longer, longer), GREY), (side, side))
        np.testing.assert_array_equal(resize_on_square(noise(*size), side, GREY), expected)


def test_a_long_strip_does_not_fill_the_memory():
    """Its square would have 1.2 GB."""
    image = np.zeros((2, 20_000, 3), np.uint8)
    tracemalloc.start()
    views = image_views(layout(CAMBRIAN_S), image, alone=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert views.views[0].pool_indices.shape[:2] == (1, 27)
    assert peak < 40e6
