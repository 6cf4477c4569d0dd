"""The viewer in a real Chromium: what a first reader stumbled over."""

import dataclasses

import numpy as np
import pytest

from benchmarks.screenshots import resize
from gaze_jax.viewer import html
from tests.helpers.browsing import ALL, assert_gaze, numbers, wait
from tests.helpers.traces import make_media, make_trace

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]


def box(page, selector):
    return page.js("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", selector)


def test_one_head_is_not_compared_with_the_mean_of_all(show, monkeypatch):
    """Where a page holds dense attention as a mean: no number is better than a wrong one."""
    trace = make_trace()
    monkeypatch.setattr(html, "_MOST_DENSE", trace.dense.size - 1)
    page = show(trace, address="t=1&l=1&h=2&map=difference")
    assert page.text("#map-title") == "Dense"
    assert not page.js("return document.querySelector('#map').options[1].disabled === false")
    assert {row[-1] for row in np.reshape(page.texts("#rows td"), (-1, 6))} == {""}
    assert page.text("#dense-head") == "Dense (mean of heads)"
    page.hover("#dense", 0.1, 0.1)
    wait(lambda: page.text("#tip") != "")
    assert page.texts("#tip p")[-1].endswith(", mean of the heads")
    page.press("d")
    assert page.text("#map-title") == "Dense"
    page.choose("#head", ALL)
    page.js("document.activeElement.blur()")
    page.press("d")
    assert page.text("#map-title") == "Gaze minus dense" and page.text("#dense-head") == "Dense"


@pytest.mark.parametrize("width", [1200, 900, 360])
def test_tall_pictures_are_of_one_size_and_beside_each_other(show, driver, width):
    """Though they are narrower than the controls below them."""
    resize(driver, width, 740, mobile=width < 600)
    page = show(make_trace(media=make_media(np.random.default_rng(0), size=(320, 40))))
    gaze, dense, chooser = (box(page, name) for name in ("#gaze", "#dense", "#chooser"))
    assert gaze["width"] == dense["width"] and gaze["height"] == dense["height"]
    assert gaze["height"] <= 0.74 * 740 + 1
    controls, figure = box(page, "#map"), box(page, "#dense-figure")
    assert figure["left"] <= controls["left"] and controls["right"] <= figure["right"]
    if width > 1020:
        assert gaze["right"] < dense["left"] and dense["right"] < chooser["left"]
    assert page.js("return document.documentElement.scrollWidth") <= width


def test_what_lies_below_a_picture_stays_near_it(show):
    """Also beside a map of many layers that is taller than the picture."""
    page = show(make_trace(layers=60, media=make_media(np.random.default_rng(0), size=(36, 128))))
    for figure in ("#gaze-figure", "#dense-figure"):
        gap = box(page, f"{figure} .legend")["top"] - box(page, f"{figure} .picture")["bottom"]
        assert 0 <= gap < 40


def test_a_resting_pointer_tells_of_the_word_that_is_shown(show):
    """On a region, and on the map of layers and heads; and of the frame that is shown."""
    trace = make_trace(media=make_media(np.random.default_rng(0), views=1, frames=3))
    page = show(trace, layer=1)
    page.press(", , , ,")
    page.hover("#dense", 0.1, 0.1)
    wait(lambda: page.texts("#tip p")[:1] == ["Region 0"])
    for token in (1, 2):
        page.press("ArrowRight")
        fraction = 100 * trace.dense[token, 1, :, 0].mean()
        assert numbers(page.texts("#tip p")[-1])[0] == pytest.approx(fraction, abs=0.51)
    page.press(".")
    region = int(trace.views[1].regions[0, 0])
    assert page.texts("#tip p")[0] == f"Region {region}" and page.texts("tr.lit .region") == [str(region)]
    page.hover("#overview", 0.1, 0.1)
    wait(lambda: page.text("#tip").startswith("Layer 0, head 0"))
    page.press("ArrowRight")
    fraction = 100 * trace.attention[3, 0, 0].sum()
    assert numbers(page.texts("#tip p")[1])[0] == pytest.approx(fraction, abs=0.51)


@pytest.mark.parametrize("focus", ["#layer", "#opacity", "#rows .region", "#prompt summary", ".scroll"])
def test_keys_work_wherever_the_focus_is(show, focus):
    """But for those that what has it needs itself."""
    page = show(make_trace(), layer=1)
    page.js("document.querySelector(arguments[0]).focus()", focus)
    if focus not in ("#opacity", ".scroll"):
        page.press("ArrowRight")
        assert (page.current(), page.value("#layer")) == (1, 1)
    page.press("?")
    assert page.find("#keys").is_displayed()
    page.press("?")
    assert not page.find("#keys").is_displayed()


def test_a_touch_tells_about_a_region(show, driver):
    """A finger does not move over a picture; a touch elsewhere takes the hint away."""
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        page = show(make_trace(), layer=1)

        def touch(selector, x, y):
            page.js("document.querySelector(arguments[0]).scrollIntoView({ block: 'center' })", selector)
            at = box(page, selector)
            point = {"x": at["left"] + x * at["width"], "y": at["top"] + y * at["height"]}
            driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
            driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

        for x, region in ((0.1, 0), (0.9, 1)):
            touch("#gaze", x, 0.1)
            wait(lambda region=region: page.texts("#tip p")[:1] == [f"Region {region}"])
            assert page.find("#tip").is_displayed() and page.texts("tr.lit .region") == [str(region)]
        touch("h1", 0.1, 0.5)
        wait(lambda: not page.find("#tip").is_displayed())
        assert page.all("tr.lit") == []
    finally:
        driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_a_long_prompt_breaks_between_its_words(show, driver):
    """Its spaces are marks, so there is no place to break but between tokens."""
    resize(driver, 700, 740)
    prompt = tuple(f" word{number}" for number in range(400))
    page = show(dataclasses.replace(make_trace(), prompt=(0, *prompt)))
    lines = "new Set([...token.getClientRects()].map((box) => box.top)).size"
    rows = page.js(f"return [...document.querySelectorAll('#read .token')].map((token) => {lines})")
    assert len(rows) == 400 and set(rows) == {1}
    assert page.js("const r = document.getElementById('read'); return r.scrollWidth <= r.clientWidth")


def test_one_head_over_all_layers_is_counted_in_layers(show):
    trace = make_trace(layers=6, top_k=2)
    page = show(trace, address="l=all&h=3")
    chosen = (trace.selected[0, :, 3] == 0).any(-1).sum()
    page.hover("#gaze", 0.1, 0.1)
    wait(lambda: page.texts("#tip p")[:1] == ["Region 0"])
    wanted = f"selected by head 3 in {chosen} of 6 layers" if chosen else "not selected"
    assert page.texts("#tip p")[1] == wanted
    assert "layers" in page.text("#clearest") and "heads" not in page.text("#clearest")


def test_whole_numbers_of_keys_are_written_as_such(show):
    """Also as a mean over layers, which is not exact; a score has the minus of a share."""
    page = show(make_trace(layers=7), address="l=all")
    assert page.text("#newline") == "4"
    page = show(make_trace(layers=1))
    scores = [row[2] for row in np.reshape(page.texts("#rows td"), (-1, 6))]
    assert page.find("th.score").is_displayed() and not any("-" in score for score in scores)


def test_an_address_shows_the_same_however_one_comes_to_it(show):
    """What it does not say is as at first; a notice goes when something is chosen."""
    trace = make_trace(media=make_media(np.random.default_rng(0), views=3))
    page = show(trace, address="t=1&v=2&map=difference&l=1&h=2")
    page.js("location.hash = '#t=3&l=1'")
    wait(lambda: page.current() == 3)
    assert (page.value("#head"), page.text("#map-title")) == (ALL, "Dense")
    assert page.find("#follow").is_selected()
    page.js("location.hash = '#t=99'")
    wait(lambda: page.find("#notice").is_displayed())
    page.press("ArrowRight")
    assert not page.find("#notice").is_displayed()
    page = show(make_trace(), address="")
    page.press(". ,")
    assert page.find("#follow").get_property("checked")


def test_a_dense_run_of_means_offers_layers_alone(show, monkeypatch):
    trace = make_trace(top_k=None)
    monkeypatch.setattr(html, "_MOST_DENSE", trace.dense.size - 1)
    page = show(trace, address="h=2")
    assert "Click to choose a layer" in page.text("#overview-note")
    page.click("#overview", 0.5, 0.9)
    assert (page.value("#layer"), page.value("#head")) == (2, 2)
    assert not show(make_trace(layers=1, heads=1)).find("#chooser").is_displayed()


def test_nothing_that_was_selected_is_said(show):
    trace = make_trace(layers=1, top_k=1)
    unused = dataclasses.replace(
        trace,
        selected=np.full_like(trace.selected, -1),
        scores=0 * trace.scores,
        attention=0 * trace.attention,
    )
    page = show(unused)
    assert page.find("#nothing").is_displayed() and page.text("#clearest") == "nothing was selected"
    assert not show(trace).find("#nothing").is_displayed()


def test_a_budget_for_each_layer_is_a_range(show):
    page = show(make_trace(layers=3, top_k=(1, 3, 2)), layer=1)
    assert page.text("#budget").startswith("1 to 3 of ")
    assert_gaze(page, make_trace(layers=3, top_k=(1, 3, 2)), 0, 1, ALL)
