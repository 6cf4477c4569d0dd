import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from gaze_jax.infer.trace import LONGEST, Picture, most_concentrated, picture
from gaze_jax.infer.trace_file import load, rounded_down, save
from tests.helpers.traces import make_media, make_trace


def both(seed=0):
    """Media of all kinds: two views of an image, and three frames in slabs of two."""
    return make_media(np.random.default_rng(seed), views=2, frames=3, slab=2)


def equal(one, other):
    """Asserts that two traces hold the same, but for the error of float16."""
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name in ("attention", "dense"):
            assert a.dtype == b.dtype == np.float32
            assert (b <= a).all() and (a - b <= np.maximum(a * 2**-10, 2**-24)).all()
        elif isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        elif field.name == "views":
            for first, second in zip(a, b, strict=True):
                np.testing.assert_array_equal(first.regions, second.regions)
                assert first.regions.dtype == second.regions.dtype
                bare = [dataclasses.replace(view, regions=None) for view in (first, second)]
                assert dataclasses.astuple(bare[0]) == dataclasses.astuple(bare[1])
        elif field.name == "pictures":
            assert [dataclasses.astuple(p) for p in a] == [dataclasses.astuple(p) for p in b]
        else:
            assert a == b, field.name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"selectors": 2, "top_k": 3},
        {"top_k": None},
        {"top_k": (1, 3, 2)},
        {"tokens": ("é\n", "\ufffd", "</script>", "", "日"), "question": "first\nsecond"},
        {"layers": 1, "heads": 1, "top_k": 1, "tokens": ("a",)},
    ],
)
def test_what_is_saved_is_loaded(options, tmp_path):
    """Everything exactly but shares of the softmax; a second round changes nothing at all."""
    trace = make_trace(media=both(), **options)
    save(trace, tmp_path / "a.gaze")
    found = load(tmp_path / "a.gaze")
    equal(trace, found)
    save(found, tmp_path / "b.gaze")
    assert (tmp_path / "a.gaze").read_bytes() == (tmp_path / "b.gaze").read_bytes()


def test_what_was_not_recorded_stays_absent(tmp_path):
    """A trace of before version 3 has no probabilities, prompt or keys of regions; it is written as it is."""
    bare = dataclasses.replace(make_trace(), prompt=(), probabilities=None, region_keys=None)
    save(bare, tmp_path / "a.gaze")
    again = load(tmp_path / "a.gaze")
    assert (again.prompt, again.probabilities, again.region_keys) == ((), None, None)
    equal(bare, again)


def test_shares_are_rounded_towards_zero():
    """By less than the documented error, over the whole range of float32 shares."""
    rng = np.random.default_rng(0)
    shares = np.concatenate([[0, 1], 10 ** rng.uniform(-12, 0, 100_000)]).astype(np.float32)
    found = rounded_down(shares).astype(np.float32)
    assert (found <= shares).all()
    assert (shares - found < np.maximum(shares * 2**-10, 2**-24) + (shares == 0)).all()
    assert found[0] == 0 and found[1] == 1


def test_a_file_is_readable_with_numpy_alone(tmp_path):
    """As docs/viewer.md says: no pickle, ids as small as they fit, JSON in ``meta``."""
    trace = make_trace(media=both(), selectors=2)
    save(trace, tmp_path / "a.gaze")
    with np.load(tmp_path / "a.gaze", allow_pickle=False) as file:
        meta = json.loads(file["meta"].tobytes())
        assert (meta["format"], meta["version"]) == ("gaze_jax.trace", 3)
        assert meta["shape"] == {"T": 5, "L": 3, "Hs": 2, "J": 2, "H": 4, "R": trace.regions}
        assert file["selected"].dtype == np.int16 and file["grids"].dtype == np.int16
        assert file["attention"].dtype == file["dense"].dtype == np.float16
        h, w = meta["views"][0]["grid"]
        np.testing.assert_array_equal(file["grids"][: h * w].reshape(h, w), trace.views[0].regions)
        jpeg = file["jpegs"][: meta["pictures"][0]["bytes"]].tobytes()
        np.testing.assert_array_equal(Image.open(io.BytesIO(jpeg)), trace.pictures[0].pixels())


def test_ids_that_int16_cannot_hold_are_kept(tmp_path):
    """40,000 regions."""
    media = make_media(np.random.default_rng(0))
    views = (dataclasses.replace(media[0][0], regions=np.arange(40_000, dtype=np.int32).reshape(200, 200)),)
    trace = make_trace(media=(views, media[1]), tokens=("a",), layers=1, heads=1, top_k=39_999)
    save(trace, tmp_path / "a.gaze")
    equal(trace, load(tmp_path / "a.gaze"))


def test_a_copy_is_small_and_upright():
    """The longest side is at most 640, the size that of the original."""
    pixels = np.zeros((300, 1600, 3), np.uint8)
    pixels[:, 800:] = 255
    copy = picture(pixels, video=True, index=2, frame=5, seconds=1.5)
    assert copy.size == (300, 1600) and copy.key == (True, 2, 5)
    assert copy.pixels().shape == (120, LONGEST, 3)
    assert copy.pixels()[:, :300].max() < 30 and copy.pixels()[:, 340:].min() > 225
    assert picture(pixels[:9, :7]).pixels().shape == (9, 7, 3)


def test_a_mask_holds_what_was_selected():
    """An unused slot selects nothing."""
    trace = make_trace(media=both(), selectors=2)
    mask = trace.mask()
    assert mask.shape == (5, 3, 2, trace.regions)
    for at in np.ndindex(5, 3, 2):
        assert set(np.flatnonzero(mask[at])) == set(trace.selected[at]) - {-1}


def test_the_most_concentrated_layer_is_where_heads_agree():
    """By how many regions their choices spread over; by attention where they agree equally, or dense."""
    trace = make_trace(layers=4, heads=6, top_k=3, media=both())
    selected, scores = trace.selected.copy(), np.ones_like(trace.scores)
    selected[:] = np.arange(18).reshape(6, 3)  # heads differ
    selected[:, 2, :5] = np.arange(3)  # five of six agree
    attention = np.full_like(trace.attention, 0.2)
    attention[:, 1, 1:] = 0  # all attention is of one head
    trace = dataclasses.replace(trace, selected=selected, scores=scores, attention=attention)
    assert most_concentrated(trace) == 2
    same = np.broadcast_to(np.arange(3, dtype=np.int32), selected.shape).copy()
    attention = np.full_like(trace.attention, 0.2)
    attention[:, 1] = 0.5, 0.05, 0.05
    assert most_concentrated(dataclasses.replace(trace, selected=same, attention=attention)) == 1
    assert most_concentrated(dataclasses.replace(trace, selected=same, attention=0 * attention)) == 0
    dense = np.full_like(trace.dense, 0.5 / trace.regions)
    dense[:, 3, :, 0] += 0.4
    bare = {name: getattr(trace, name)[..., :0] for name in ("selected", "scores", "attention")}
    assert most_concentrated(dataclasses.replace(trace, top_k=None, dense=dense, **bare)) == 3


def test_a_view_finds_its_picture():
    """Views of one image share one."""
    trace = make_trace(media=both())
    assert trace.picture_of(trace.views[0]) is trace.picture_of(trace.views[1]) is trace.pictures[0]
    assert trace.picture_of(trace.views[3]).frame == 1


def changed(name, at, value):
    """The array ``name`` of a trace with one element changed."""
    array = getattr(make_trace(media=both()), name).copy()
    array[at] = value
    return {name: array}


WRONG = {
    "select_per": ({"select_per": "layer"}, "select_per='layer' must be one of head, kv_head"),
    "selectors": ({"select_per": "head", "selectors": 2}, "does not fit 2 selectors of 4 heads"),
    "top_k": ({"top_k": 0}, "top_k=0 must be at least 1"),
    "layer of top_k": ({"top_k": (2, 0, 1)}, r"top_k=\(2, 0, 1\) must be at least 1"),
    "layers of top_k": ({"top_k": (2, 1)}, "top_k has 2 numbers for 3 layers; give one for each"),
    "dense": ({"top_k": None}, "top_k=None but J=2"),
    "tokens": ({"tokens": ("a",)}, "dense has 5 tokens but tokens has 1"),
    "text": ({"answer": "\ud800"}, "half a surrogate pair"),
    "shape": ({"scores": np.zeros((5, 3, 4, 3), np.float32)}, r"scores must be float32 \[5, 3, 4, 2\]"),
    "dtype": ({"visual_tokens": np.full(5, 60)}, r"visual_tokens must be int32 \[5\], got int64"),
    "axes": ({"dense": np.zeros((5, 3, 4), np.float32)}, r"dense must be \[T, L, H, R\]"),
    "none": ({"views": (), "pictures": ()}, "nothing to look at"),
    "picture": ({"pictures": both()[1][:-1]}, "for each image and frame"),
    "twice": ({"pictures": (*both()[1], both()[1][0])}, "for each image and frame"),
    "high": (changed("selected", (1, 1, 1, 0), 99), "selected must be between -1 and"),
    "low": (changed("selected", (1, 1, 1, 0), -2), "selected must be between -1 and"),
    "hole": (changed("selected", (1, 1, 1, 0), -1), "unused slot, -1, before a used"),
    "scores": (changed("scores", (1, 1, 1, 0), np.nan), "scores must be finite"),
    "unused score": (changed("scores", (0, 0, 0, 1), 1), "scores must be finite, and 0"),
    "unused share": (changed("attention", (0, 0, 0, 1), 0.1), "attention must be 0 in unused"),
    "negative": (changed("dense", (0, 0, 0, 0), -0.1), "dense must hold shares"),
    "nan": (changed("attention", (1, 0, 0, 0), np.nan), "attention must hold shares"),
    "much": (changed("dense", (0, 0, 0, 0), 1.0), "dense must hold shares"),
    "entries": (changed("entries", (0, 0, 3), -1), "at least 0"),
    "visual": (changed("entries", (0, 0, 0), 1000), "more visual keys than visual_tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_trace_that_contradicts_itself_is_refused(case):
    """One sentence each."""
    change, message = WRONG[case]
    options = {"selectors": change["selectors"]} if "selectors" in change else {}
    trace = make_trace(media=both(), **options)
    change = {name: value for name, value in change.items() if name != "selectors"}
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(trace, **change)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_region_selected_twice_is_refused():
    """By one query."""
    trace = make_trace(media=both())
    selected = trace.selected.copy()
    selected[2, 1, 3, 1] = selected[2, 1, 3, 0]
    with pytest.raises(ValueError, match="twice"):
        dataclasses.replace(trace, selected=selected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regions": np.full((1, 1), 99, np.int32)}, "outside of 0 to"),
        ({"regions": np.full((1, 1), -1, np.int32)}, "outside of 0 to"),
        ({"regions": np.zeros(3, np.int32)}, r"regions \[h, w\]"),
        ({"corners": (0.0, 0.0, 0.0, 1.0)}, "no rectangle"),
        ({"corners": (0.0, 0.0, np.inf, 1.0)}, "no rectangle"),
    ],
)
def test_a_view_that_cannot_be_drawn_is_refused(change, message):
    """Its regions and its corners."""
    trace = make_trace(media=both())
    views = (dataclasses.replace(trace.views[0], **change), *trace.views[1:])
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(trace, views=views)


def png():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


def large():
    file = io.BytesIO()
    Image.new("RGB", (LONGEST + 1, 4)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": 1.0}, "an image has none"),
        ({"video": True}, "a frame has a time"),
        ({"video": True, "seconds": float("nan")}, "give a number"),
        ({"size": (0, 5)}, "at least 1"),
        ({"jpeg": b"no"}, "not a JPEG"),
        ({"jpeg": png()}, "not a JPEG"),
        ({"jpeg": large()}, "641x4 pixels"),
    ],
)
def test_a_picture_that_is_none_is_refused(change, message):
    """Also another format than the viewers are told of."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(
            Picture(False, 0, 0, None, (4, 4), picture(np.zeros((4, 4, 3), np.uint8)).jpeg), **change
        )
