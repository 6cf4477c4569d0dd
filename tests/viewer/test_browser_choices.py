"""The viewer in a real Chromium: how it opens, pointing at regions, choosers, the address, saved files."""

import dataclasses
import html as text_of_html

import numpy as np
import pytest

from benchmarks.screenshots import resize
from gaze_jax.infer.trace import most_concentrated, picture
from gaze_jax.viewer.html import viewer_page
from tests.helpers.browsing import (
    ALL,
    assert_gaze,
    cells,
    covered,
    expected_attention,
    expected_dense,
    expected_fraction,
    numbers,
    wait,
)
from tests.helpers.traces import grid, make_media, make_trace

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]


def centre(view, region):
    """A place inside a region, as fractions of its picture."""
    rows, columns = view.regions.shape
    row, column = np.argwhere(view.regions == region)[0]
    return (column + 0.5) / columns, (row + 0.5) / rows


# --- How it opens ---


def concentrated(layer, **options):
    """A trace in whose one layer all heads select the same regions."""
    trace = make_trace(layers=4, heads=6, top_k=3, **options)
    selected, scores = trace.selected.copy(), trace.scores.copy()
    selected[:, layer], scores[:, layer] = np.arange(3), 1.0
    return dataclasses.replace(trace, selected=selected, scores=scores)


MANY = make_media(np.random.default_rng(3), views=2)


def test_it_opens_where_heads_agree_most_and_says_so(show):
    trace = concentrated(2, media=MANY)
    page = show(trace, address="")
    assert page.value("#layer") == most_concentrated(trace) == 2
    assert page.find("#opened").is_displayed()
    assert page.text("#opened").startswith(
        "Layer 2 is shown first: its heads’ choices are the most concentrated"
    )
    assert_gaze(page, trace, 0, 2, ALL)
    page.press("ArrowDown")
    assert not page.find("#opened").is_displayed()
    # Not if a reader, or who made the page, chose the layer, or if there is but one.
    assert not show(trace, address="l=1").find("#opened").is_displayed()
    page = show(trace, layer=0)
    assert page.value("#layer") == 0 and not page.find("#opened").is_displayed()
    assert not show(make_trace(layers=1), address="").find("#opened").is_displayed()


def test_a_diffuse_selection_is_not_grey_on_grey(show):
    """What most heads selected is as bright as the picture, however few they are; the scale says how many."""
    trace = make_trace(layers=8, heads=12, top_k=2, media=MANY)
    page = show(trace)
    every = expected_fraction(trace, 0, ALL, ALL)
    assert every.max() < 0.3
    assert_gaze(page, trace, 0, ALL, ALL, trace.views[page.current("#strip button")])
    (fraction,) = numbers(page.text("#clearest"))
    assert fraction == pytest.approx(100 * every.max(), abs=0.5)
    assert page.text("#outlined") == "by at least half as many"
    page.choose("#layer", 3)
    page.choose("#head", 5)
    assert (page.text("#clearest"), page.text("#outlined")) == ("not selected … selected", "selected")


@pytest.mark.parametrize("size", [(64, 64), (40, 120)], ids=["square", "wide"])
def test_nothing_is_beside_a_picture(show, driver, size):
    """A picture fills its figure: also where the window is so low that its height is what limits it."""
    trace = make_trace(media=make_media(np.random.default_rng(0), size=size))
    for width, height in ((1200, 900), (1300, 420), (700, 500), (360, 740)):
        resize(driver, width, height, mobile=width < 600)
        page = show_at(show, driver, trace, width, height)
        for figure in ("#gaze-figure", "#dense-figure"):
            boxes = page.js(
                "return [arguments[0], arguments[0] + ' .picture'].map((name) => "
                "document.querySelector(name).getBoundingClientRect().toJSON())",
                figure,
            )
            assert boxes[0]["width"] == pytest.approx(boxes[1]["width"], abs=1)
            assert boxes[1]["width"] / boxes[1]["height"] == pytest.approx(size[1] / size[0], rel=0.02)
            assert boxes[1]["height"] <= max(0.74 * height, 1) + 1


def show_at(show, driver, trace, width, height):
    page = show(trace)
    resize(driver, width, height, mobile=width < 600)
    return page


# --- The prompt and probabilities ---


def test_the_prompt_is_shown_and_leads_to_its_views(show):
    """Text as tokens, pictures in their places."""
    trace = make_trace(media=make_media(np.random.default_rng(0), views=2, frames=3))
    prompt = ("<|im_start|>", "user\n", 0, 1, "Look", 2, 3, 4, "\n", "<b>")
    page = show(dataclasses.replace(trace, prompt=prompt))
    assert page.texts("#read .token, #read .medium") == [
        *("<|im_start|>", "user↵", "Image 1 × 2", "Look", "Video 1 × 3", "↵", "<b>")
    ]
    assert page.text("#prompt-size") == "5 tokens of text, 5 views"
    page.all("#read .medium")[1].click()
    assert page.current("#strip button") == 2 and not page.find("#follow").is_selected()
    assert not show(dataclasses.replace(trace, prompt=())).find("#prompt").is_displayed()


def test_every_word_shows_its_probability(show):
    """As a line below it, as a number for the one that is shown; a trace without them shows none."""
    trace = make_trace()
    page = show(trace)
    lines = page.js(
        "const words = [...document.querySelectorAll('#answer button')];"
        "return words.map((word) => word.style.getPropertyValue('--likely'))"
    )
    assert [float(line.rstrip("%")) / 100 for line in lines] == pytest.approx(trace.probabilities, rel=1e-5)
    for token in (0, 3):
        page.all("#answer button")[token].click()
        (fraction,) = numbers(page.text("#probability"))
        assert fraction == pytest.approx(100 * trace.probabilities[token], abs=0.5)
    page = show(dataclasses.replace(trace, probabilities=None))
    assert page.text("#probability") == "" and page.all(".likely") == []
    assert not page.find("#probability-note").is_displayed()


def test_a_head_s_own_keys_are_counted_if_the_trace_tells_them(show):
    """An older trace has means over the heads alone, and the page says so."""
    views, pictures = make_media(np.random.default_rng(0))
    uneven = dataclasses.replace(views[0], regions=grid(8, 8, 3, 0))  # of 9, 6 and 4 keys
    trace = make_trace(selectors=2, top_k=3, media=((uneven,), pictures))
    page = show(trace, address="t=1&l=2&h=3")
    keys = trace.region_keys[trace.selected[1, 2, 1]].sum()
    assert keys != trace.entries[1, 2, 0]
    assert float(page.text("#visual")) == keys
    assert page.text("#whose") == " of head 3" and "those of head 3 in layer 2" in page.text("#counts-note")
    page = show(dataclasses.replace(trace, region_keys=None), address="t=1&l=2&h=3")
    assert float(page.text("#visual")) == pytest.approx(trace.entries[1, 2, 0], abs=0.05)
    assert page.text("#whose") == " per query" and "means over the heads" in page.text("#counts-note")


# --- Pointing ---


def test_pointing_at_a_region_tells_about_it_and_lights_its_row(show):
    """On either picture; also a region that is not among the first of the table."""
    trace = make_trace(selectors=2, top_k=3, media=MANY)
    page = show(trace, layer=1)
    view = trace.views[int(page.current("#strip button"))]
    fraction, dense = expected_fraction(trace, 0, 1, ALL), expected_dense(trace, 0, 1, ALL)
    attention = expected_attention(trace, 0, 1, ALL)
    before = page.pixels("#gaze")
    for canvas in ("#gaze", "#dense"):
        for region in np.unique(view.regions):
            page.hover(canvas, *centre(view, region))
            wait(lambda region=region: page.text("#tip").startswith(f"Region {region}"))
            lines = page.texts("#tip p")
            assert page.find("#tip").is_displayed() and lines[0] == f"Region {region}"
            if fraction[region]:
                assert lines[1] == f"selected by {round(4 * fraction[region])} of 4 heads"
                assert numbers(lines[2])[0] == 0 or lines[2].startswith("score")
            else:
                assert lines[1] == "not selected"
            assert numbers(lines[-2])[0] == pytest.approx(100 * attention[region], abs=0.51)
            assert numbers(lines[-1])[0] == pytest.approx(100 * dense[region], abs=0.51)
            assert page.texts("tr.lit .region") == [str(region)]
    assert (page.pixels("#gaze") != before).any()
    page.hover("h1", 0.5, 0.5)
    wait(lambda: not page.find("#tip").is_displayed())
    assert page.all("tr.lit") == [] and (page.pixels("#gaze") == before).all()


def test_pointing_at_a_row_outlines_its_region(show):
    """In white on black, from outside; and names the views that it lies in."""
    trace = make_trace(media=make_media(np.random.default_rng(0), views=1, frames=4, slab=2))
    page = show(trace, layer=1)
    page.press(".*9")
    region = int(page.texts("#rows .region")[0])
    homes = [i for i, view in enumerate(trace.views) if (view.regions == region).any()]
    page.hover("#rows tr td:nth-child(2)", 0.5, 0.5)
    wait(lambda: page.texts("tr.lit .region") == [str(region)])
    lit = page.js("return [...document.querySelectorAll('#strip button')].map((b) => b.className)")
    assert [i for i, name in enumerate(lit) if name == "lit"] == homes
    # The button of a row leads to its view and outlines the region there, by keyboard too.
    page.find("#rows .region").click()
    assert page.current("#strip button") in homes
    view = trace.views[page.current("#strip button")]
    shown = page.pixels("#dense")
    inside = cells(view, shown.shape) == region
    white = (shown == 255).all(-1)
    assert white.any() and not (white & inside).any()


# --- Maps ---


def test_opacity_bares_the_picture(show):
    """At 0 nothing is left of the map; the more opaque, the less of the picture."""
    trace = make_trace()
    page = show(trace)
    clear = covered(trace, trace.views[0], 560 // max(covered(trace, trace.views[0], 1).shape[:2]))

    def distance(opacity):
        page.js(
            "const range = document.getElementById('opacity'); range.value = arguments[0];"
            "range.dispatchEvent(new Event('input'))",
            opacity,
        )
        return np.abs(page.pixels("#dense").astype(int) - clear).mean()

    assert page.value("#opacity") == 60
    found = [distance(opacity) for opacity in (0, 30, 60, 100)]
    assert found[0] < 1 and found == sorted(found) and found[-1] > 30


def test_gaze_minus_dense_shows_what_the_selection_changed(show):
    """Blue where the head attends more than under dense attention, orange where it attends less."""
    views, _ = make_media(np.random.default_rng(0))
    grey = (picture(np.full((48, 64, 3), 128, np.uint8)),)
    trace = make_trace(media=(views, grey), top_k=2)
    attention = np.minimum(trace.attention * 1.6, 0.45)  # as a softmax over fewer keys
    trace = dataclasses.replace(trace, attention=attention.astype(np.float32))
    page = show(trace, layer=1)
    page.choose("#map", "difference")
    difference = expected_attention(trace, 0, 1, ALL) - expected_dense(trace, 0, 1, ALL)
    shown = page.pixels("#dense").astype(int)
    where = cells(trace.views[0], shown.shape)
    for region, value in enumerate(difference):
        red, _, blue = np.median(shown[where == region], axis=0)
        assert (blue > red) == (value > 0) and abs(blue - red) > 5
    assert page.text("#map-title") == "Gaze minus dense"
    assert numbers(page.text("#most").lstrip("+"))[0] == pytest.approx(
        100 * np.abs(difference).max(), abs=0.51
    )
    page.js("document.activeElement.blur()")  # a chooser keeps its keys
    page.press("d")
    assert page.text("#map-title") == "Dense"


# --- Layers and heads ---


def test_the_overview_shows_and_chooses_layers_and_heads(show):
    """A cell's brightness orders attention on what was selected; a click chooses it, another all heads."""
    trace = make_trace(layers=3, heads=4, selectors=2, top_k=3)
    page = show(trace)
    sums = trace.attention[0].sum(axis=-1)
    cells_of = page.pixels("#overview").astype(float).mean(axis=-1)
    height, width = cells_of.shape[0] // 3, cells_of.shape[1] // 4
    light = [
        np.median(cells_of[y * height : (y + 1) * height, x * width : (x + 1) * width])
        for y in range(3)
        for x in range(4)
    ]
    np.testing.assert_array_equal(np.argsort(light), np.argsort(sums.ravel()))
    page.hover("#overview", 2.5 / 4, 1.5 / 3)
    wait(lambda: page.text("#tip").startswith("Layer 1, head 2"))
    assert numbers(page.texts("#tip p")[1])[0] == pytest.approx(100 * sums[1, 2], abs=0.51)
    page.click("#overview", 2.5 / 4, 1.5 / 3)
    assert (page.value("#layer"), page.value("#head")) == (1, 2)
    assert_gaze(page, trace, 0, 1, 2)
    page.click("#overview", 2.5 / 4, 1.5 / 3)
    assert (page.value("#layer"), page.value("#head")) == (1, ALL)
    page.press("Shift+ArrowDown*2 Shift+ArrowUp")
    assert page.value("#head") == 0


def test_the_overview_of_a_dense_run_is_of_all_regions(show):
    trace = make_trace(top_k=None)
    page = show(trace)
    page.hover("#overview", 0.5 / 4, 2.5 / 3)
    wait(lambda: page.text("#tip").startswith("Layer 2, head 0"))
    assert numbers(page.texts("#tip p")[1])[0] == pytest.approx(100 * trace.dense[0, 2, 0].sum(), abs=0.51)
    page.hover("#dense", 0.1, 0.1)
    wait(lambda: page.texts("#tip p")[0] == "Region 0")
    assert len(page.texts("#tip p")) == 2 and not page.find("#map").is_displayed()


# --- The address ---


def test_the_address_holds_what_is_shown(show):
    """Opened with it, changed by what a reader does, and followed when it changes."""
    trace = make_trace(media=make_media(np.random.default_rng(0), views=1, frames=3))
    address = lambda: page.js("return location.hash")  # noqa: E731
    page = show(trace, address="t=3&l=2&h=1")
    assert (page.current(), page.value("#layer"), page.value("#head")) == (3, 2, 1)
    assert page.find("#follow").is_selected() and address() == "#t=3&l=2&h=1"
    page.driver.execute_cdp_cmd("Page.resetNavigationHistory", {})
    page.press("ArrowRight ArrowUp Shift+ArrowUp*9")
    wait(lambda: address() == "#t=4&l=1&h=all")
    page.all("#strip button")[2].click()
    page.press("d")
    wait(lambda: address() == "#t=4&l=1&h=all&v=2&map=difference")
    assert page.js("return history.length") == 1, "choices are no pages to go back to"
    page.js("location.hash = '#t=1&l=all&v=0'")
    wait(lambda: page.current() == 1)
    assert page.value("#layer") == ALL and page.current("#strip button") == 0


WRONG_ADDRESSES = {
    "t=9": "t=9 must be a token from 0 to 4",
    "l=3&t=1": "l=3 must be a layer from 0 to 2, or all",
    "h=-1": "h=-1 must be a head from 0 to 3, or all",
    "h=two": "h=two must be a head",
    "v=1": "v=1 must be a view from 0 to 0",
    "t=all": "t=all must be a token",
    "map=heat": "map=heat is unknown",
    "x=<b>&t=99": "x=<b> is unknown; t=99 must be a token",
    "__proto__=1": "__proto__=1 is unknown",
}


def test_an_address_that_asks_for_what_is_not_there_is_answered(show):
    """In a sentence; the rest of it holds."""
    page = show(make_trace(), address="v=8")
    assert "v=8 must be a view" in page.text("#notice")
    for address, wrong in WRONG_ADDRESSES.items():
        page.js("location.hash = arguments[0]", address)
        wait(lambda wrong=wrong: wrong in page.text("#notice"))
        assert page.find("#notice").is_displayed()
        assert page.current() == (1 if "t=1" in address else 0)


def test_it_works_in_a_frame_of_a_notebook(show, driver):
    """Whose page has no address of its own."""
    page = show(make_trace())
    inner = text_of_html.escape(viewer_page(make_trace()), quote=True)
    driver.get("about:blank")
    driver.execute_script("document.body.innerHTML = arguments[0]", f'<iframe srcdoc="{inner}"></iframe>')
    driver.switch_to.frame(0)
    try:
        wait(lambda: page.js("return !document.querySelector('main').hidden"))
        page.find("#next").click()
        assert page.current() == 1
        page.js("window.waited = new Promise((done) => setTimeout(done, 300))")
        assert page.driver.execute_async_script("waited.then(arguments[0])") is None
        assert page.js("return location.href") == "about:srcdoc"
    finally:
        driver.switch_to.default_content()
    show(make_trace())
