"""Clips of a trace, decoded again."""

import dataclasses
import sys

import numpy as np
import pytest

from gaze_jax.errors import UserError
from gaze_jax.viewer.answer_sheet import most_looked_at
from gaze_jax.viewer.contact_sheet import SELECTED, _veiled
from gaze_jax.viewer.video import FPS, WIDTH, _arranged, clip_pages, write_clip
from tests.helpers.traces import make_media, make_trace

av = pytest.importorskip("av")


def decoded(path):
    """The stream's codec and pixel format, and uint8 [N, H, W, 3]."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frames = list(file.decode(stream))
        times = [float(frame.pts * frame.time_base) for frame in frames]
        np.testing.assert_allclose(times, np.arange(len(frames)) / FPS, atol=1e-3)
        pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
        return stream.codec_context.name, frames[0].format.name, pixels


def test_a_clip_steps_through_the_tokens(tmp_path):
    """H.264 of even sizes that any player reads; each token for its time, as its page was drawn."""
    trace = make_trace(selectors=2, tokens=("A", " cat", "."))
    write_clip(trace, tmp_path / "a.mp4", layer=1, seconds=0.3)
    codec, pixel_format, frames = decoded(tmp_path / "a.mp4")
    assert (codec, pixel_format) == ("h264", "yuv420p")
    assert len(frames) == 3 * 3
    assert frames.shape[2] == WIDTH and frames.shape[1] % 2 == 0
    pages = [np.asarray(page).astype(int) for page in clip_pages(trace, layer=1, views=8)]
    for number, frame in enumerate(frames.astype(int)):
        off = [np.abs(frame - page).mean() for page in pages]
        assert np.argmin(off) == number // 3
        assert min(off) < 4


def test_a_page_shows_what_each_token_looked_at():
    """Clear where the heads of the layer selected, veiled by those that did not; one picture is large."""
    trace = make_trace(tokens=("A", " cat", "."))
    view = trace.views[0]
    clear = trace.picture_of(view).pixels().repeat(13, 0).repeat(13, 1)  # 13 x 48 fits 640 pixels
    for layer in (0, None):
        mask = trace.mask() if layer is None else trace.mask()[:, layer : layer + 1]
        most = mask.astype(np.float32).mean(axis=(1, 2)).max()
        for token, page in enumerate(clip_pages(trace, layer=layer, views=8)):
            fraction = mask[token].astype(np.float32).mean(axis=(0, 1))[view.regions] / most
            shares = fraction.repeat(clear.shape[0] // 4, 0).repeat(clear.shape[1] // 4, 1)
            wanted = _veiled(clear, shares)
            pixels = np.asarray(page)
            left, top = (WIDTH - clear.shape[1]) // 2, len(pixels) - 32 - clear.shape[0]
            found = best_match(pixels, wanted, left, top)
            outline = (found == SELECTED).all(-1)
            assert np.abs(found.astype(int) - wanted)[~outline].max() == 0
            assert not (outline & (shares >= 0.5)).any()


def best_match(pixels, wanted, left, top):
    """The window nearest to ``wanted`` within a pixel of (left, top)."""
    height, width = wanted.shape[:2]
    windows = [
        pixels[y : y + height, x : x + width]
        for y in range(top - 1, top + 2)
        for x in range(left - 1, left + 2)
    ]
    return min(windows, key=lambda window: np.abs(window.astype(int) - wanted).mean())


def test_a_clip_shows_the_most_selected_views():
    """As large as they fit; all pages have one even size."""
    trace = make_trace(media=make_media(np.random.default_rng(0), views=0, frames=7), tokens=("A", "b"))
    for views in (2, 4, 8):
        (size,) = {page.size for page in clip_pages(trace, layer=0, views=views)}
        assert size[0] == WIDTH and size[1] % 2 == 0
    for height in (13, 14, 15):  # of them some would make an odd page
        flat = make_trace(media=make_media(np.random.default_rng(0), size=(height, 64)), tokens=("A",))
        (page,) = clip_pages(flat, layer=0, views=1)
        assert page.height % 2 == 0
    (view,) = most_looked_at(trace.views, trace.mask()[:, 0], 1)
    alone = dataclasses.replace(trace, views=(view,), prompt=(), pictures=(trace.picture_of(view),))
    for page, other in zip(clip_pages(trace, layer=0, views=1), clip_pages(alone, layer=0, views=8)):
        np.testing.assert_array_equal(page, other)


@pytest.mark.parametrize("count", [1, 2, 9, 130, 1200])
@pytest.mark.parametrize("size", [(90, 90), (40, 160), (160, 40)])
def test_any_number_of_pictures_fits_the_width(count, size):
    """Many are small, never smaller than can be seen; the page becomes longer."""
    columns, panel = _arranged([size] * count, 26)
    width = panel * size[1] / max(size)
    assert 1 <= columns <= count and panel >= 48
    assert columns * (width + 16) - 16 <= WIDTH - 64


def test_a_question_of_several_lines_is_headed_by_them():
    """A choice below a question is not shown with signs for its line ends."""
    separate, joined = (
        make_trace(tokens=("a",), layers=1, question=q) for q in ("Which?\nA. cat", "Which? A. cat")
    )
    (one,), (other,) = (clip_pages(trace, layer=0, views=1) for trace in (separate, joined))
    assert one.height > other.height


@pytest.mark.parametrize("tokens", [("a", "\n", "b"), ("w" * 200, " x"), ("",), (" " + "w" * 60,) * 7])
def test_captions_keep_their_place(tokens):
    """Line ends, words wider than the page, nothing, and more lines than fit."""
    pages = list(clip_pages(make_trace(tokens=tokens, layers=1), layer=0, views=1))
    assert len({page.size for page in pages}) == 1 and len(pages) == len(tokens)
    for page in pages:
        # The current token is marked, above the count of keys.
        blue = (np.asarray(page) == SELECTED).all(-1)[:, :32].any(-1).nonzero()[0]
        assert (np.asarray(page)[:162] == SELECTED).all(-1).any()
        assert not blue.size or blue.min() > 60


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    """Bad durations, a dense run, a layer, a folder that is not there, no PyAV."""
    trace = make_trace(tokens=("a",))
    for seconds in (0.0, 0.09, 61.0, float("nan")):
        with pytest.raises(UserError, match=r"seconds=.* must be between 0.1 and 60"):
            write_clip(trace, tmp_path / "a.mp4", seconds=seconds)
    with pytest.raises(UserError, match="selects nothing"):
        write_clip(make_trace(top_k=None), tmp_path / "a.mp4")
    with pytest.raises(UserError, match="layer=7 must be"):
        write_clip(trace, tmp_path / "a.mp4", layer=7)
    with pytest.raises(UserError, match="cannot be written"):
        write_clip(trace, tmp_path / "absent" / "a.mp4")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'gaze-jax\[video\]'"):
        write_clip(trace, tmp_path / "a.mp4")
