import numpy as np
import PIL.Image
import pytest

from gaze_jax.data.sample import Box, Image, Sample, Text, Video

CORNERS = (0.0, 0.0, 1.0, 1.0)
LARGEST_ID = 2**31 - 1


def pixels(height=2, width=3):
    return np.zeros((height, width, 3), np.uint8)


def sample(**change):
    fields = {"id": 0, "images": (pixels(),), "parts": (Image(0), Text("a")), "family": "read"}
    return Sample(**{**fields, **change})


@pytest.mark.parametrize(("start", "end"), [(-1, 1), (0, 0), (2, 1), (0, 4), (3, 4)])
def test_a_box_outside_of_its_text_is_refused(start, end):
    with pytest.raises(ValueError, match=rf"characters {start}\.\.{end} lies outside the text 'abc' of 3"):
        Text("abc", boxes=(Box(0, 3, CORNERS), Box(start, end, CORNERS)))


def test_empty_text_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Text("")


@pytest.mark.parametrize(
    "image",
    [
        pixels().astype(np.float32),
        pixels().astype(np.int8),
        pixels()[..., 0],
        pixels()[..., :2],
        np.zeros((2, 3, 4), np.uint8),
        pixels()[None],
        pixels(height=0),
        pixels(width=0),
    ],
    ids=lambda image: f"{image.dtype}{list(image.shape)}",
)
def test_an_image_of_another_shape_or_dtype_is_refused_by_its_number(image):
    with pytest.raises(ValueError, match="Image 1 of sample 5") as error:
        sample(id=5, images=(pixels(), image))
    assert f"{image.dtype} {list(image.shape)}" in str(error.value)


@pytest.mark.parametrize(("mode", "size"), [("RGBA", (3, 2)), ("L", (3, 2)), ("RGB", (3, 0))])
def test_a_pillow_image_must_be_rgb_and_have_pixels(mode, size):
    sample(images=(PIL.Image.new("RGB", (3, 2)),))
    with pytest.raises(
        ValueError, match=f"Image 0 of sample 5 must be .*; this is Pillow's {mode} {size[1]}x{size[0]}"
    ):
        sample(id=5, images=(PIL.Image.new(mode, size),))


@pytest.mark.parametrize("index", [-1, 1])
def test_showing_an_image_that_is_not_there_is_refused(index):
    with pytest.raises(ValueError, match=f"shows image {index} but holds 1"):
        sample(parts=(Image(0), Image(index), Text("a")))


@pytest.mark.parametrize("index", [-1, 1])
def test_showing_a_video_that_is_not_there_is_refused(index):
    """An image of that number does not make up for it."""
    with pytest.raises(ValueError, match=f"shows video {index} but holds 1 videos"):
        sample(images=(pixels(), pixels()), videos=([pixels()],), parts=(Video(0), Video(index)))


def test_a_video_without_frames_is_refused_by_its_number():
    """Frames are counted and not looked at, since reading them may cost."""
    with pytest.raises(ValueError, match="Video 1 of sample 5 has no frames"):
        sample(id=5, videos=(range(1), range(0)))
    assert sample(videos=(range(3),), parts=(Video(0), Image(0), Video(0))).videos == (range(3),)


@pytest.mark.parametrize(
    "targets", [((-1, 2),), ((0, 0),), ((2, 1),), ((0, 4),), ((1, 2), (0, 1)), ((0, 2), (1, 3))]
)
def test_targets_must_be_ranges_of_the_text_in_order(targets):
    """Ranges may touch."""
    with pytest.raises(ValueError, match="are not ranges of the 3 characters"):
        Text("abc", targets=targets)
    assert Text("abc", targets=((0, 1), (1, 3))).targets == ((0, 1), (1, 3))


def test_targets_in_a_text_that_is_supervised_as_a_whole_are_refused():
    """Since one of the two is a mistake."""
    with pytest.raises(ValueError, match="supervised as a whole"):
        Text("abc", supervised=True, targets=((0, 1),))


@pytest.mark.parametrize(
    "parts",
    [
        (Text("a", boxes=(Box(0, 1, CORNERS, image=1),)),),
        (Image(0), Text("a", boxes=(Box(0, 1, CORNERS, image=1),))),
        (Image(0), Text("a", boxes=(Box(0, 1, CORNERS, image=1),)), Image(1)),
    ],
    ids=["no image shown", "another image shown", "shown too late"],
)
def test_a_box_on_an_image_that_no_earlier_part_shows_is_refused(parts):
    with pytest.raises(ValueError, match="refers to image 1, which no earlier part shows"):
        sample(images=(pixels(), pixels()), parts=parts)


@pytest.mark.parametrize("number", [-1, LARGEST_ID + 1])
def test_an_id_that_is_no_non_negative_int32_is_refused(number):
    with pytest.raises(ValueError, match=f"id {number} must be"):
        sample(id=number)


def test_the_extremes_are_accepted():
    boxes = (Box(0, 1, CORNERS, image=1), Box(2, 3, CORNERS))
    parts = (Image(1), Image(0), Text("abc", boxes=boxes), Image(1), Text("c"))
    for number in (0, LARGEST_ID):
        made = sample(id=number, images=(pixels(1, 1), pixels(1, 9)), parts=parts)
        assert (made.id, made.parts) == (number, parts)
    assert sample(images=(), parts=()).parts == ()
