"""The viewer in a real Chromium: saved files, the theme, the list of keys."""

import csv
import io
import time

import numpy as np
import pytest
from PIL import Image

from benchmarks.screenshots import prefer
from tests.helpers.browsing import (
    ALL,
    OUTLINE,
    expected_attention,
    expected_dense,
    expected_fraction,
    luminance,
    wait,
)
from tests.helpers.traces import make_media, make_trace

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]


@pytest.fixture
def downloads(driver, tmp_path):
    folder = tmp_path / "downloads"
    folder.mkdir()
    options = {"behavior": "allow", "downloadPath": str(folder)}
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", options)
    return folder


def test_what_is_shown_is_saved_as_numbers(show, downloads):
    """A row per region, with the trace's numbers to what the page rounds; titles are quoted."""
    trace = make_trace(selectors=2, top_k=3, media=make_media(np.random.default_rng(0), views=2))
    page = show(trace, address="t=2&l=1&h=all")
    page.find("#csv").click()
    path = downloads / "gaze-t2-l1-hall.csv"
    wait(path.exists)
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    assert [int(row["region"]) for row in rows] == list(range(trace.regions))
    assert {(row["token"], row["layer"], row["head"]) for row in rows} == {("2", "1", "all")}
    assert rows[0]["views"] == "Image 1, view 1 of 2"
    column = lambda name: [float(row[name]) for row in rows]  # noqa: E731
    fraction, dense = expected_fraction(trace, 2, 1, ALL), expected_dense(trace, 2, 1, ALL)
    attention = expected_attention(trace, 2, 1, ALL)
    np.testing.assert_allclose(column("heads"), fraction, atol=1e-6)
    np.testing.assert_allclose(column("attention"), attention, atol=0.7 / 510)
    np.testing.assert_allclose(column("dense"), dense, atol=0.7 / 510)
    np.testing.assert_allclose(column("gaze_minus_dense"), attention - dense, atol=1.4 / 510)
    assert [row["score"] == "" for row in rows] == (fraction == 0).tolist()


def test_what_is_shown_is_saved_as_a_picture(show, downloads):
    """Both pictures as they are on the page, beside each other, below the question."""
    trace = make_trace(question="What is this? " * 12)
    page = show(trace, layer=1)
    page.find("#png").click()
    path = downloads / "gaze-t0-l1-hall.png"
    wait(path.exists)
    with Image.open(path) as image:
        shown = np.asarray(image.convert("RGB"))
    for canvas in ("#gaze", "#dense"):
        picture_of = page.pixels(canvas)
        height, width = picture_of.shape[:2]
        assert shown.shape[1] > 2 * width and shown.shape[0] > height
        firsts = np.argwhere((shown == picture_of[0, 0]).all(-1))
        assert any(np.array_equal(shown[y : y + height, x : x + width], picture_of) for y, x in firsts), (
            canvas
        )
    dark = (shown[: shown.shape[0] - picture_of.shape[0] - 60].max(-1) < 120).sum()
    assert dark > 500, "there is text above them"


def test_the_theme_can_be_changed(show, driver):
    """It is the system's until then."""
    page = show(make_trace())
    light = lambda: luminance(page.js("return getComputedStyle(document.body).backgroundColor"))  # noqa: E731
    assert light() > 0.8
    prefer(driver, prefers_color_scheme="dark", prefers_reduced_motion="reduce")
    wait(lambda: light() < 0.1)
    page.find("#theme").click()
    assert light() > 0.8
    page.press("t")
    assert light() < 0.1
    page.press("t")
    for scheme in ("light", "dark"):
        prefer(driver, prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
        time.sleep(0.2)
    assert light() > 0.8


def test_a_question_mark_lists_the_keys(show):
    """While the list is open the other keys do nothing; it names every key that does something."""
    page = show(make_trace())
    page.press("?")
    assert page.find("#keys").is_displayed()
    page.press("ArrowRight")
    assert page.current() == 0
    page.press("?")
    assert not page.find("#keys").is_displayed()
    page.find("#help").click()
    assert page.find("#keys").is_displayed()
    page.find("#keys form button").click()
    assert not page.find("#keys").is_displayed()
    listed = page.texts("#keys td:first-child")
    assert listed == ["← →", "Home End", "space", "↑ ↓", "Shift ↑ ↓", ", .", "d", "t", "?"]
    assert not page.find("#keys .views").is_displayed()
    page.press("ArrowRight")
    assert page.current() == 1


def test_the_outline_is_blue(show):
    """The colour of the sheets, around what half as many heads selected as the most."""
    page = show(make_trace(), layer=1)
    assert (page.pixels("#gaze") == OUTLINE).all(-1).any()
