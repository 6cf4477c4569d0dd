"""The viewer's pages as text: what is in them, and that nothing in them can run but the page's own script."""

import base64
import dataclasses
import hashlib
import html.parser
import json
import zlib

import numpy as np
import pytest

from gaze_jax.errors import UserError
from gaze_jax.viewer import html as viewer
from gaze_jax.viewer.html import Entry, index_page, viewer_page
from tests.helpers.traces import make_media, make_trace

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"'&"


class Parsed(html.parser.HTMLParser):
    """Elements of a page as (name, attributes, text)."""

    def __init__(self, page):
        super().__init__()
        self.elements = []
        self.inside = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])
        self.inside = True

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.elements[-1][2] += data

    def named(self, name):
        return [element for element in self.elements if element[0] == name]


def policy(page):
    """The directives of a page's Content-Security-Policy: {name: sources}."""
    metas = [attrs for _, attrs, _ in Parsed(page).named("meta") if "http-equiv" in attrs]
    assert [meta["http-equiv"] for meta in metas] == ["Content-Security-Policy"]
    parts = [part.split() for part in metas[0]["content"].split(";")]
    return {name: sources for name, *sources in parts}


def sha256(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def data_of(page):
    """The JSON of a page and its arrays."""
    (data,) = [text for _, attrs, text in Parsed(page).named("script") if attrs.get("type")]
    found = json.loads(data)
    buffer = zlib.decompress(base64.b64decode(found["arrays"]))
    arrays = {
        name: np.frombuffer(buffer, f"<{kind}" if kind != "u1" else "u1", count, offset)
        for name, (kind, offset, count) in found["layout"].items()
    }
    return found, arrays


def test_the_policy_names_the_page_s_own_script_and_style_and_nothing_else():
    """By hash; a page without a script allows none."""
    trace = make_trace()
    page = viewer_page(trace)
    scripts = [text for _, attrs, text in Parsed(page).named("script") if not attrs]
    styles = [text for _, _, text in Parsed(page).named("style")]
    assert len(scripts) == len(styles) == 1
    assert policy(page) == {
        "default-src": ["'none'"],
        "script-src": [sha256(scripts[0])],
        "style-src": [sha256(styles[0])],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }
    index = index_page([Entry.of(trace, "a.html")])
    assert Parsed(index).named("script") == []
    assert "script-src" not in policy(index)
    assert policy(index)["style-src"] == [sha256(Parsed(index).named("style")[0][2])]


def test_nothing_of_a_page_lies_elsewhere():
    """No element names an address but data: and, in an index, the pages beside it."""
    for page in (viewer_page(make_trace()), index_page([Entry.of(make_trace(), "a b.html")])):
        for _, attrs, _ in Parsed(page).elements:
            for name in ("src", "href", "srcset", "action", "data"):
                assert attrs.get(name, "data:").startswith(("data:", "a%20b.html"))
            assert not any(name.startswith("on") or name == "style" for name in attrs)


def test_data_cannot_leave_its_element():
    """Whatever it holds, the page has the same elements, and the data come back as they were."""
    quiet = viewer_page(make_trace(question="q", tokens=("a",)))
    trace = make_trace(question=HOSTILE, tokens=(HOSTILE,))
    trace = dataclasses.replace(trace, model=HOSTILE)
    page = viewer_page(trace)
    assert [e[:2] for e in Parsed(page).elements][3:] == [e[:2] for e in Parsed(quiet).elements][3:]
    data, _ = data_of(page)
    assert data["question"] == data["tokens"][0] == data["model"] == HOSTILE
    assert page.count("<!--") == 0
    index = index_page([dataclasses.replace(Entry.of(trace, HOSTILE), answer=HOSTILE)])
    assert [e[0] for e in Parsed(index).elements].count("img") == 1
    assert Parsed(index).named("script") == []
    texts = [text for _, attrs, text in Parsed(index).named("p") if attrs["class"] in ("question", "answer")]
    assert texts == [HOSTILE] * 2


@pytest.mark.parametrize("options", [{}, {"selectors": 2, "top_k": 3}, {"top_k": None}, {"top_k": (1, 3, 2)}])
def test_a_page_holds_the_numbers_of_its_trace(options):
    """Ids and counts exactly, shares to 1/510 of the query's largest, scores to 1/65534 of the layer's."""
    trace = make_trace(media=make_media(np.random.default_rng(0), views=2, frames=3, slab=2), **options)
    data, arrays = data_of(viewer_page(trace, layer=1))
    assert data["topK"] == (list(trace.top_k) if isinstance(trace.top_k, tuple) else trace.top_k)
    assert (data["layer"], data["layers"], data["heads"], data["regions"]) == (1, 3, 4, trace.regions)
    for name in ("selected", "entries"):
        np.testing.assert_array_equal(arrays[name], getattr(trace, name).ravel())
    np.testing.assert_array_equal(arrays["visual"], trace.visual_tokens)
    grids = np.concatenate([view.regions.ravel() for view in trace.views])
    np.testing.assert_array_equal(arrays["grids"], grids)
    for name in ("attention", "dense"):
        shares = getattr(trace, name)
        largest = arrays[f"{name}Largest"].reshape(*shares.shape[:-1], 1)
        found = arrays[name].reshape(shares.shape) / 255 * largest
        assert (np.abs(found - shares) <= largest / 510 * 1.001).all()
    most = arrays["scoreLargest"][:, None, None]
    found = arrays["scores"].reshape(trace.scores.shape) / 32767 * most
    assert (np.abs(found - trace.scores) <= most / 65534 * 1.001).all()
    assert base64.b64decode(data["pictures"][-1].split(",")[1]) == trace.pictures[-1].jpeg


def test_corners_are_shares_of_the_picture():
    """Also of the original that was larger than its copy."""
    views, pictures = make_media(np.random.default_rng(0), views=2, frames=1)
    large = [dataclasses.replace(p, size=(480, 640)) for p in pictures]
    wide = [dataclasses.replace(u, corners=tuple(10 * edge for edge in u.corners)) for u in views]
    for trace in (make_trace(media=(views, pictures)), make_trace(media=(tuple(wide), tuple(large)))):
        found = [view["corners"] for view in data_of(viewer_page(trace))[0]["views"]]
        np.testing.assert_allclose(found, [[0, 0, 1, 1], [0.5, 0, 1, 1], [0, -1 / 6, 1, 7 / 6]])


def test_what_is_too_much_per_head_is_kept_as_the_mean(monkeypatch):
    """And what is too much even then is refused; neither happens in silence."""
    trace = make_trace()
    monkeypatch.setattr(viewer, "_MOST_DENSE", trace.dense.size - 1)
    data, arrays = data_of(viewer_page(trace))
    assert data["denseHeads"] == 1
    mean = trace.dense.mean(axis=2)
    found = arrays["dense"].reshape(mean.shape) / 255 * arrays["denseLargest"].reshape(*mean.shape[:-1], 1)
    np.testing.assert_allclose(found, mean, atol=mean.max() / 510)
    monkeypatch.setattr(viewer, "_MOST_DENSE", mean.size - 1)
    with pytest.raises(UserError, match=r"tokens x layers x regions = 60, but .*; trace fewer tokens"):
        viewer_page(trace)


def test_a_layer_that_is_not_there_is_refused():
    """A layer is one of the trace's or all."""
    for layer in (-1, 3):
        with pytest.raises(UserError, match=f"layer={layer} must be between 0 and 2"):
            viewer_page(make_trace(), layer=layer)


def test_an_index_says_what_was_attended_to():
    """The share of the visual keys, mean over tokens and layers, beside question, answer and model."""
    trace = make_trace()
    entry = Entry.of(trace, "a.html")
    assert entry.visual == pytest.approx((trace.entries[..., 0] / trace.visual_tokens[:, None]).mean())
    page = index_page([entry, dataclasses.replace(entry, file="b.html", question="Where?")])
    assert [attrs["href"] for _, attrs, _ in Parsed(page).named("a")] == ["a.html", "b.html"]
    assert f"{100 * entry.visual:.1f} % of visual keys" in page
    assert "What is this?" in page and "Where?" in page and "tests/made-up" in page


def test_short_names_leave_out_what_is_the_same_everywhere():
    """One image needs no number, nor does one video."""
    rng = np.random.default_rng(0)
    views, pictures = make_media(rng, views=2, frames=2)
    shorts = [view["short"] for view in data_of(viewer_page(make_trace(media=(views, pictures))))[0]["views"]]
    assert shorts == ["View 1 of 2", "View 2 of 2", "0.0 s", "0.5 s"]
    more = [dataclasses.replace(view, view=view.view + 4, index=1) for view in views]
    twice = [dataclasses.replace(picture, index=1) for picture in pictures]
    trace = make_trace(media=((*views, *more), (*pictures, *twice)))
    shorts = [view["short"] for view in data_of(viewer_page(trace))[0]["views"]]
    assert shorts[:3] == ["Image 1, view 1 of 2", "Image 1, view 2 of 2", "Video 1, 0.0 s"]
    assert shorts[4:] == ["Image 2, view 1 of 2", "Image 2, view 2 of 2", "Video 2, 0.0 s", "Video 2, 0.5 s"]
