"""Media in the forms that people have them; options and answers of the Python API."""

import io

import numpy as np
import pytest
from PIL import Image

import gaze_jax
from gaze_jax.errors import UserError
from gaze_jax.infer import loaded
from gaze_jax.infer.answer import Answer
from gaze_jax.infer.inputs import as_image, as_video
from gaze_jax.infer.loaded import _listed, check_gaze_fields
from gaze_jax.media.images import read_image
from gaze_jax.media.video import FrameSampling, open_video
from tests.helpers import traces
from tests.helpers.videos import write_video

PIXELS = np.random.default_rng(0).integers(256, size=(12, 20, 3), dtype=np.uint8)
EVERY = FrameSampling()


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_an_image_in_every_form_is_the_same(picture):
    expected = read_image(picture)
    data = picture.read_bytes()
    with picture.open("rb") as file, Image.open(picture) as image:
        forms = [picture, str(picture), data, bytearray(data), io.BytesIO(data), file, image]
        for form in (*forms, Image.fromarray(PIXELS), PIXELS):
            np.testing.assert_array_equal(as_image(form, "images[0]"), expected)


def test_an_image_of_pillow_is_turned_and_not_changed():
    image = Image.new("RGBA", (4, 8), (255, 0, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    opened = Image.open(io.BytesIO(file.getvalue()))
    found = as_image(opened, "images[0]")
    assert found.shape == (4, 8, 3) and (found == 255).all()
    assert opened.size == (4, 8) and opened.mode == "RGBA"


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (3, r"images\[0\] is a int; give a path, bytes, an open file"),
        ([1], r"images\[0\] is a list"),
        (b"", r"'images\[0\]' is empty"),
        (b"nonsense", r"'images\[0\]' is none of JPEG"),
        (io.StringIO("text"), r"images\[0\] is a file opened as text; open it with mode 'rb'"),
        (None, r"images\[0\] is a NoneType"),
    ],
)
def test_what_is_no_image_is_refused(value, match):
    with pytest.raises(UserError, match=match):
        as_image(value, "images[0]")


def test_a_video_in_every_form_is_the_same(tmp_path):
    file = write_video(tmp_path / "a.mp4", 12)
    expected = np.stack(list(open_video(file, EVERY)))
    data = file.read_bytes()
    with file.open("rb") as opened:
        for form in (file, str(file), data, io.BytesIO(data), opened, open_video(file, EVERY), expected):
            np.testing.assert_array_equal(np.stack(list(as_video(form, EVERY, "video"))), expected)
    images = [Image.fromarray(frame) for frame in expected]
    np.testing.assert_array_equal(np.stack(list(as_video(images, EVERY, "video"))), expected)
    assert len(as_video(data, FrameSampling(max_frames=3), "video")) == 3


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (3, "video is a int; give a path"),
        ({}, "video is a dict"),
        (b"", "'video' is empty"),
        (b"nonsense " * 9, "'video' is none of MP4"),
        ([3], r"video\[0\] is a int"),
    ],
)
def test_what_is_no_video_is_refused(value, match):
    with pytest.raises(UserError, match=match):
        as_video(value, EVERY, "video")


def test_none_is_none_and_a_single_medium_is_no_list():
    assert _listed(None, "images") == [] and len(_listed(np.zeros((2, 4, 4, 3)), "images")) == 2
    for value in ("a.png", b"x", Image.new("L", (2, 2)), np.zeros((4, 4, 3))):
        with pytest.raises(UserError, match="must be a list of images; put brackets around it"):
            _listed(value, "images")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"selectper": "head"}, "'selectper' is no field of GazeConfig; did you mean 'select_per'"),
        ({"zzz": 1}, "'zzz' is no field of GazeConfig; known are region"),
        ({"select_per": "x"}, "gaze.select_per='x' must be one of"),
        ({"region": 3}, "is of the wrong type"),
        ({"context_tokens": 1}, "context_tokens are parameters of the checkpoint"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(fields, match):
    with pytest.raises(UserError, match=match):
        gaze_jax.load("no/such/checkpoint/anywhere", **fields)
    with pytest.raises(UserError, match=match):
        check_gaze_fields(fields)


def test_the_package_lists_its_names():
    assert dir(gaze_jax) == ["Answer", "GazeOptions", "LookAt", "Sampler", "__version__", "load"]


def test_an_answer_shows_and_saves_itself(tmp_path):
    plain = Answer("a <b>", ("a",), "stop", None, 4, 2)
    assert repr(plain) == "Answer('a <b>', 1 tokens, finish_reason='stop')"
    assert plain._repr_html_() == "<p>a &lt;b&gt;</p>"
    with pytest.raises(UserError, match="generate it with return_trace=True"):
        plain.save(tmp_path / "a.html")
    assert repr(Answer("x" * 100, ("a",), "stop", None, 4, 2)).count("x") == 57
    traced = Answer("a", ("a",), "stop", None, 4, 2, traces.make_trace())
    assert gaze_jax.Answer is Answer and traced._repr_html_().count("<iframe srcdoc=") == 1
    for suffix, head in ((".html", b"<!doctype html>"), (".png", b"\x89PNG"), (".gaze", b"PK")):
        traced.save(tmp_path / f"a{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes().startswith(head)
    with pytest.raises(UserError, match=r"must end in one of \.html"):
        traced.save(tmp_path / "a.txt")
    with pytest.raises(UserError, match="cannot be written"):
        traced.save(tmp_path / "absent" / "a.html")


def test_a_checkpoint_of_the_hub_is_named_by_its_id_and_commit(tmp_path):
    where = tmp_path / "models--Qwen--Qwen3-4B" / "snapshots" / ("c" * 40)
    where.mkdir(parents=True)
    assert loaded._name(where) == "Qwen/Qwen3-4B@ccccccc"
    assert loaded._name(tmp_path) == tmp_path.name


def test_a_sequence_longer_than_the_model_was_trained_with_is_said_once(tmp_path, caplog):
    assert loaded._max_positions(tmp_path) is None
    (tmp_path / "config.json").write_text('{"text_config": {"max_position_embeddings": 32}}')
    assert loaded._max_positions(tmp_path) == 32
    with caplog.at_level("WARNING", logger="absl"):
        for tokens in (40, 41, 50):  # an answer that grows, another question
            loaded._warn_of_length("small", tokens, 32)
    assert caplog.text.count("the answer included, exceeds the 32 that small") == 1
    assert "A sequence of 40 tokens" in caplog.text


def test_a_generation_config_that_is_no_json_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(UserError, match=r"generation_config\.json is not a JSON object"):
        loaded._generation_ends(tmp_path)
