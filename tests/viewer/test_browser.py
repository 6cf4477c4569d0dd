"""The viewer in a real Chromium: what it shows against the trace, what a reader does, what must not be."""

import time

import numpy as np
import pytest
from PIL import Image

from benchmarks.screenshots import photograph, prefer, resize
from gaze_jax.infer.trace import picture
from gaze_jax.viewer import html
from gaze_jax.viewer.contact_sheet import _veiled
from gaze_jax.viewer.html import viewer_page
from tests.helpers.browsing import (
    ALL,
    OUTLINE,
    assert_gaze,
    cells,
    covered,
    expected_dense,
    expected_fraction,
    luminance,
    wait,
)
from tests.helpers.traces import make_media, make_trace

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]


def test_a_word_shows_where_it_looked(show):
    """Clicks change the mark, the place, the counter and the canvas, all as the trace says."""
    trace = make_trace(media=make_media(np.random.default_rng(1)))
    page = show(trace, layer=1)
    seen = []
    for token in (3, 0, 4):
        page.all("#answer button")[token].click()
        assert page.current() == token
        assert page.text("#place") == f"{token + 1} of 5"
        visual, newline, context, text = trace.entries[token, 1]
        assert float(page.text("#visual")) == pytest.approx(visual, abs=0.05)
        assert page.text("#visual-of") == "of 16 visual keys"
        percent = float(page.text("#percent").removesuffix("\u00a0%"))
        assert percent == pytest.approx(100 * visual / 16, abs=0.5)
        found = [float(page.text(name)) for name in ("#newline", "#context", "#text")]
        assert found == [newline, context, text]
        seen.append(assert_gaze(page, trace, token, 1, ALL).tobytes())
    assert len(set(seen)) == 3


def test_arrow_keys_choose_words_and_layers(show):
    """Left and right, up and down, home and end; nothing moves beyond the ends."""
    trace = make_trace()
    page = show(trace)
    page.press("ArrowLeft")
    assert page.current() == 0
    page.press("ArrowRight*2")
    assert page.current() == 2
    page.press("ArrowLeft")
    assert page.current() == 1
    assert_gaze(page, trace, 1, ALL, ALL)
    page.press("End ArrowRight")
    assert page.current() == 4
    page.press("Home")
    assert page.current() == 0
    page.press("ArrowUp")
    assert page.value("#layer") == ALL
    page.press("ArrowDown*2")
    assert page.value("#layer") == 1
    assert_gaze(page, trace, 0, 1, ALL)
    page.press("ArrowDown*9")
    assert page.value("#layer") == 2
    page.press("ArrowUp")
    assert page.value("#layer") == 1


def test_choosers_choose_layers_and_heads(show):
    """Each combination as the trace has it; all heads and all layers are means."""
    trace = make_trace(selectors=2, top_k=3)
    page = show(trace)
    assert [o.text for o in page.all("#layer option")] == ["all layers", "0", "1", "2"]
    assert page.all("#head option")[3].text == "2 (kv head 1)"
    for layer, head in ((ALL, ALL), (2, 1), (2, 2), (0, ALL), (ALL, 3)):
        page.choose("#layer", layer)
        page.choose("#head", head)
        assert_gaze(page, trace, 0, layer, head)
        keys = np.where(trace.mask()[0], trace.region_keys, 0).sum(axis=-1)  # [L, Hs]
        keys = keys if layer == ALL else keys[layer : layer + 1]
        keys = keys if head == ALL else keys[:, [head // 2]]
        assert float(page.text("#visual")) == pytest.approx(keys.mean(), abs=0.051)
    # Arrows in a chooser are the chooser's.
    page.find("#head").send_keys("\ue013")
    chosen = page.js("return ['layer', 'head'].map((id) => Number(document.getElementById(id).value))")
    assert chosen == [ALL, 2]
    assert_gaze(page, trace, 0, ALL, 2)


def test_dense_attention_is_a_map_beside_it(show):
    """Over black the map's brightness orders regions as the trace does, for each layer and head."""
    views, _ = make_media(np.random.default_rng(0), size=(48, 64))
    black = (picture(np.zeros((48, 64, 3), np.uint8)),)
    trace = make_trace(media=(views, black), top_k=1)
    page = show(trace)
    for token, layer, head in ((0, ALL, ALL), (1, 0, 3), (1, 2, ALL)):
        page.choose("#layer", layer)
        page.choose("#head", head)
        page.all("#answer button")[token].click()
        dense = expected_dense(trace, token, layer, head)
        got = page.pixels("#dense").astype(float).mean(axis=-1)
        where = cells(trace.views[0], got.shape)
        light = np.array([np.median(got[where == r]) for r in range(trace.regions)])
        np.testing.assert_array_equal(np.argsort(light), np.argsort(dense))
        assert page.text("#most") == f"{100 * dense.max():.0f}\u00a0%"
        fraction = float(page.text("#dense-note").split("\u00a0")[0])
        assert fraction == pytest.approx(100 * dense.sum(), abs=0.5)


def test_the_table_names_the_regions_with_most_attention(show):
    """Best first, with the numbers of the trace, of one head's and of all."""
    trace = make_trace(selectors=2, top_k=3)
    page = show(trace, layer=1)
    for head in (2, ALL):
        page.choose("#head", head)
        attention = np.zeros((trace.heads, trace.regions))
        ids = np.repeat(trace.selected[0, 1], 2, axis=0)
        np.put_along_axis(attention, ids, trace.attention[0, 1], axis=-1)
        attention = attention.mean(0) if head == ALL else attention[head]
        ranked = [r for r in np.argsort(-attention) if attention[r] > 0]
        rows = np.reshape(page.texts("#rows td"), (-1, 6)).tolist()
        assert [int(row[0]) for row in rows] == ranked
        fraction, dense = expected_fraction(trace, 0, 1, head), expected_dense(trace, 0, 1, head)
        for r, row in zip(ranked, rows, strict=True):
            numbers = [float(text.removesuffix("\u00a0%").replace("−", "-")) for text in row[1:]]
            assert numbers[0] == pytest.approx(100 * fraction[r], abs=0.5)
            chosen = [0, 1] if head == ALL else [head // 2]
            scores = [trace.scores[0, 1, s][trace.selected[0, 1, s] == r] for s in chosen]
            assert numbers[1] == pytest.approx(np.concatenate(scores).mean(), abs=0.006)
            difference = attention[r] - dense[r]
            shares = [100 * attention[r], 100 * dense[r], 100 * difference]
            assert numbers[2:] == pytest.approx(shares, abs=0.51)
            assert row[5][0] in ("+0" if difference > 0 else "−0")
    page.choose("#layer", ALL)
    assert not page.find("th.score").is_displayed()  # scores of different layers have no mean


def test_play_steps_through_the_words_and_pauses(show):
    """By the button and by the space bar; it ends at the last word and begins anew from there."""
    page = show(make_trace())
    page.find("#play").click()
    wait(lambda: page.current() >= 1)
    assert page.find("#play").get_attribute("aria-label") == "Pause"
    page.find("#play").click()
    at = page.current()
    time.sleep(0.5)
    assert page.current() == at
    assert page.find("#play").get_attribute("aria-pressed") == "false"
    page.js("document.activeElement.blur()")
    page.press("End ArrowLeft Space")
    wait(lambda: page.current() == 4)
    wait(lambda: page.find("#play").get_attribute("aria-pressed") == "false")
    page.press("Space")
    assert page.current() == 0
    page.press("Space")
    page.all("#answer button")[2].click()  # with the focus on a word too
    page.press("Space")
    assert page.find("#play").get_attribute("aria-pressed") == "true"
    page.press("Space")
    assert page.find("#play").get_attribute("aria-pressed") == "false" and page.current() == 2


def test_frames_of_a_video_are_a_strip(show):
    """The stage follows the attention until a reader chooses a frame: by a click, comma or full stop."""
    trace = make_trace(media=make_media(np.random.default_rng(2), views=2, frames=6, slab=2))
    page = show(trace, layer=2)
    assert len(page.all("#strip button")) == 8
    for token in range(5):
        page.all("#answer button")[token].click()
        attention = np.zeros(trace.regions)
        for head in range(4):
            attention[trace.selected[token, 2, head]] += trace.attention[token, 2, head]
        sums = [attention[np.unique(view.regions)].sum() for view in trace.views]
        view = int(np.argmax(sums))
        assert page.current("#strip button") == view
        assert_gaze(page, trace, token, 2, ALL, trace.views[view])
    for view in (1, 7):
        page.all("#strip button")[view].click()
        assert not page.find("#follow").is_selected()
        assert_gaze(page, trace, 4, 2, ALL, trace.views[view])
    assert page.text("#view") == "Video 1, frame 6 of 6, 2.5 s"
    page.press("ArrowLeft")
    assert page.current("#strip button") == 7  # as it was chosen
    page.press(". , ,")
    assert page.current("#strip button") == 5
    thumb = page.pixels("#strip button:nth-child(6) canvas")
    every = expected_fraction(trace, 3, 2, ALL)
    fraction = (every / every.max())[cells(trace.views[5], thumb.shape)]
    inner = ~(thumb == OUTLINE).all(-1)
    clear = covered(trace, trace.views[5], 1)  # a thumb is never larger than the copy
    assert np.abs(thumb.astype(int) - _veiled(clear, fraction))[inner].max() <= 4
    page.find("#follow").click()
    page.press("End")
    assert page.current("#strip button") == view_of(trace, 4)


def view_of(trace, token):
    attention = np.zeros(trace.regions)
    for head in range(trace.heads):
        attention[trace.selected[token, 2, head]] += trace.attention[token, 2, head]
    return int(np.argmax([attention[np.unique(view.regions)].sum() for view in trace.views]))


def test_a_dense_run_shows_what_it_attended_to(show):
    """There is no selection, so there is no panel, column or bar for one."""
    trace = make_trace(top_k=None, media=make_media(np.random.default_rng(0), frames=2))
    page = show(trace)
    assert page.text("#budget") == "dense"
    assert not page.find("#gaze").is_displayed() and page.find("#dense").is_displayed()
    assert [th.text for th in page.all("thead th") if th.is_displayed()] == ["Region", "In", "Dense"]
    dense = expected_dense(trace, 0, ALL, ALL)
    assert int(page.text("#rows td")) == np.argmax(dense)
    sums = [dense[np.unique(view.regions)].sum() for view in trace.views]
    assert page.current("#strip button") == np.argmax(sums)


def test_dense_attention_that_is_a_mean_says_so(show, monkeypatch):
    """Choosing a head then changes the selection alone."""
    trace = make_trace()
    monkeypatch.setattr(html, "_MOST_DENSE", trace.dense.size - 1)
    page = show(trace, layer=1)
    assert page.find("#mean-note").is_displayed()
    before = page.pixels("#dense")
    page.choose("#head", 2)
    np.testing.assert_array_equal(page.pixels("#dense"), before)
    assert "mean of all heads" in page.text("#dense-note")
    assert_gaze(page, trace, 0, 1, 2)
    assert float(page.text("#dense-note").split("\u00a0")[0]) == pytest.approx(
        100 * expected_dense(trace, 0, 1, ALL).sum(), abs=0.5
    )


LONG = make_trace(
    tokens=(" word",) * 30 + ("x" * 300, "\n", "\n\n", "", " ", "日本語" * 40, ".", "\u202e\u0007"),
    question="Why " + "o" * 200 + "?",
    layers=2,
    media=make_media(np.random.default_rng(0), views=2, frames=12, size=(48, 128)),
)


@pytest.mark.parametrize("trace", [make_trace(), LONG], ids=["short", "long"])
@pytest.mark.parametrize("width", [360, 700, 1200])
def test_nothing_is_wider_than_the_window(show, driver, width, trace):
    """Dense is beside gaze if the page is wide enough, and below it on a phone."""
    resize(driver, width, 740, mobile=width < 600)
    page = show(trace)
    assert page.js("return innerWidth") == width
    assert page.js("return document.documentElement.scrollWidth") <= width
    assert page.js("const a = document.getElementById('answer'); return a.scrollWidth <= a.clientWidth")
    boxes = [
        page.js("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", name)
        for name in ("#gaze", "#dense")
    ]
    if width > 800:
        assert boxes[0]["top"] == boxes[1]["top"] and boxes[0]["right"] < boxes[1]["left"]
    else:
        assert boxes[0]["bottom"] < boxes[1]["top"] and boxes[0]["left"] == boxes[1]["left"]
    assert all(box["left"] >= 0 and box["right"] <= width for box in boxes)
    small = "return [...document.querySelectorAll('.steps button, select')].map(e => e.offsetHeight)"
    assert min(page.js(small)) >= 36


def test_what_cannot_be_seen_of_a_token_is_shown(show):
    """Spaces, line ends, nothing at all, controls, letters without a shape, and text hidden in tags."""
    tokens = (" a b", "\n", "", "\t\u202e", "c\U000e0041", "\u3000\u3164", "\u061c", "\ufe0f", "☀\ufe0f")
    page = show(make_trace(tokens=tokens))
    assert page.texts("#answer button") == [
        *("·a b", "↵", "∅", "⇥U+202E", "cU+E0041", "U+3000U+3164", "U+061C", "U+FE0F", "☀\ufe0f")
    ]
    assert len(page.all("#answer br")) == 1


TAB_STOPS = [
    *("prompt", "medium", "medium", "answer", "back", "play", "next", "layer", "head"),
    *("png", "csv", "theme", "help", "map", "opacity", "follow", "strip", "scroll", "region"),
]


def test_the_keyboard_alone_is_enough(show):
    """Tab visits one word, the buttons and the choosers; what has the focus shows it."""
    page = show(make_trace(media=make_media(np.random.default_rng(0), frames=3)))
    page.press("ArrowRight")
    page.js("document.activeElement.blur()")
    body, visited, outlines = page.find("body"), [], []
    body.send_keys("\ue004")
    for _ in range(len(TAB_STOPS)):
        visited.append(
            page.js(
                "const at = document.activeElement, box = at.closest('#answer, #strip'); "
                "return box?.id || at.id || at.className || at.closest('[id]').id"
            )
        )
        outlines.append(
            page.js(
                "const s = getComputedStyle(document.activeElement); "
                "return s.outlineStyle + ' ' + s.outlineWidth"
            )
        )
        page.driver.switch_to.active_element.send_keys("\ue004")
    assert visited == TAB_STOPS
    assert set(outlines) == {"solid 3px"}
    # The focus goes with the word, and Enter chooses what has it.
    page.all("#answer button")[1].click()
    page.press("ArrowRight")
    assert page.js("return document.activeElement === document.querySelectorAll('#answer button')[2]")
    page.find("#next").send_keys("\ue007")
    assert page.current() == 3
    assert "Word 4 of 5, two" in page.text("#status")
    page.all("#strip button")[0].click()
    page.press(".")
    assert page.js("return document.activeElement === document.querySelectorAll('#strip button')[1]")
    page.js("document.querySelector('.scroll').focus()")
    page.press("ArrowLeft")
    assert page.current() == 3, "arrows scroll the table"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(show, driver, scheme):
    """At least 4.5 to 1 against what lies behind it, in light and in dark."""
    prefer(driver, prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    page = show(make_trace(media=make_media(np.random.default_rng(0), frames=3)), address="")
    assert (luminance(page.js("return getComputedStyle(document.body).backgroundColor")) < 0.1) == (
        scheme == "dark"
    )
    for name in (
        ".about",
        ".about strong",
        "h1",
        "#answer button",
        '#answer [aria-current="true"]',
        "#place",
        "select",
        "#percent",
        "#visual-of",
        "dt",
        "figcaption span",
        ".legend",
        "th",
        "td",
        "footer p",
        "kbd",
        "#opened",
        "#read .token",
        ".medium",
        ".caption",
        ".region",
        "#strip .name",
        '#strip [aria-current="true"] .name',
    ):
        text, behind = page.js(
            """
            let at = document.querySelector(arguments[0]);
            const colour = getComputedStyle(at).color;
            while (at && getComputedStyle(at).backgroundColor === "rgba(0, 0, 0, 0)") at = at.parentElement;
            return [colour, getComputedStyle(at).backgroundColor];
        """,
            name,
        )
        light, dark = sorted([luminance(text), luminance(behind)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, text, behind)


def test_nothing_moves_by_itself(show, driver):
    """There is no transition or animation, whatever a reader prefers."""
    prefer(driver, prefers_color_scheme="light", prefers_reduced_motion="no-preference")
    found = show(make_trace()).js("""
        return [...new Set([...document.querySelectorAll("*")].flatMap((element) => {
            const style = getComputedStyle(element);
            return [style.transitionDuration, style.animationName];
        }))].sort();
    """)
    assert found == ["0s", "none"]


def test_screenshots_show_a_page_after_keys(driver, tmp_path):
    """Of the width, scale and height asked for, in light or dark."""
    (tmp_path / "page.html").write_text(viewer_page(make_trace()), encoding="utf-8")

    def shot(**changes):
        options = {"width": 400, "height": 300, "scale": 2, "keys": "ArrowRight*2", "dark": False, **changes}
        photograph(driver, tmp_path / "page.html", tmp_path / "shot.png", **options)
        with Image.open(tmp_path / "shot.png") as image:
            return np.asarray(image.convert("RGB"))

    light, dark, before, whole = shot(), shot(dark=True), shot(keys=""), shot(height=None, scale=1)
    assert light.shape == dark.shape == before.shape == (600, 800, 3)
    assert light[0, 0].min() > 200 and dark[0, 0].max() < 60
    assert (light != before).any()
    assert whole.shape[1] == 400 and whole.shape[0] > 900
