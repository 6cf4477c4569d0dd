"""A Chromium for the tests of this folder, and the page of a trace in it."""

import pytest

from benchmarks.screenshots import browser, open_page, prefer, resize
from gaze_jax.viewer.html import viewer_page
from tests.helpers.browsing import Page, complaints, requested


@pytest.fixture(scope="session")
def driver():
    with browser() as driver:
        driver.execute_cdp_cmd("Page.enable", {})
        hear = "window.said = []; window.alert = (text) => said.push(text);"
        # Playing takes a third of the time.
        hear += "const every = setInterval; window.setInterval = (what, pace) => every(what, pace / 3);"
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": hear})
        yield driver


@pytest.fixture
def show(driver, tmp_path):
    """Opens a trace's page, with all layers unless told otherwise.

    Afterwards nothing was complained of, run by data, or fetched.
    """
    resize(driver, 1200, 900)
    prefer(driver, prefers_color_scheme="light", prefers_reduced_motion="reduce")

    def opened(trace, *, address="l=all", **options):
        (tmp_path / "page.html").write_text(viewer_page(trace, **options), encoding="utf-8")
        open_page(driver, tmp_path / "page.html", address="" if "layer" in options else address)
        return Page(driver)

    driver.get("about:blank")
    complaints(driver), requested(driver)
    yield opened
    assert complaints(driver) == []
    assert driver.execute_script("return window.said") == []
    urls = requested(driver)
    assert all(url.startswith(("data:", tmp_path.as_uri())) for url in urls), urls
    assert sum(url.startswith("file:") for url in urls) >= 1
