"""The viewer in a real Chromium: what must not run, and what a page says that cannot be shown."""

import dataclasses
import time

import pytest

from benchmarks.screenshots import open_page, resize, wait_until_shown
from gaze_jax.viewer.html import Entry, index_page, viewer_page
from tests.helpers.browsing import Page, complaints, requested, wait
from tests.helpers.traces import make_trace

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "<!--",
)


def test_text_stays_text(show):
    """Whatever a question, token or model's name holds: nothing of it runs or becomes markup."""
    text = " ".join(HOSTILE)
    trace = dataclasses.replace(make_trace(tokens=(*HOSTILE, text), question=text), model=text)
    page = show(trace)
    assert page.texts("#answer button")[:-1] == list(HOSTILE)
    assert page.text("#question") == page.text("#model") == text
    assert page.js("return document.title") == f"Gaze: {text}"
    page.press("End")
    assert page.js("return [document.scripts.length, document.images.length]") == [2, 0]
    assert page.js("return window.said") == []


def test_the_policy_forbids_what_it_should(show, driver):
    """Scripts, styles, images, fetches and forms that are not the page's own; each is reported."""
    page = show(make_trace())
    page.js("""
        const add = (name, fields) =>
            document.body.append(Object.assign(document.createElement(name), fields));
        add("script", { textContent: "window.said.push('inline')" });
        add("style", { textContent: "body { color: rgb(1, 2, 3) }" });
        add("img", { src: "http://127.0.0.1:9/picture.png" });
        add("iframe", { src: "http://127.0.0.1:9/frame" });
        document.body.setAttribute("onclick", "window.said.push('handler')");
        document.body.click();
        fetch("http://127.0.0.1:9/data").catch(() => {});
    """)
    blocked = []
    wait(lambda: blocked.extend(complaints(driver)) or len(blocked) >= 6)
    for kind in ("script-src", "style-src", "img-src", "default-src"):
        assert any(kind in message for message in blocked), kind
    assert page.js("return getComputedStyle(document.body).color") != "rgb(1, 2, 3)"
    time.sleep(0.2)
    elsewhere = {url: why for url, why in requested(driver).items() if url.startswith("http")}
    assert set(elsewhere.values()) == {"csp"}
    assert page.js("return window.said") == []
    complaints(driver)
    show(make_trace())


def test_a_browser_that_is_too_old_is_told(driver, tmp_path):
    """The page says what it needs, where it would be empty."""
    gone = driver.execute_cdp_cmd(
        "Page.addScriptToEvaluateOnNewDocument", {"source": "delete window.DecompressionStream"}
    )
    try:
        (tmp_path / "page.html").write_text(viewer_page(make_trace()), encoding="utf-8")
        driver.get((tmp_path / "page.html").as_uri())
        page = Page(driver)
        wait(lambda: complaints(driver))
        assert page.find("#problem").is_displayed() and not page.find("#main").is_displayed()
        assert "2023 or newer" in page.text("#problem")
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", gone)


def test_a_damaged_page_says_so(driver, tmp_path):
    """Not that the browser is at fault."""
    text = viewer_page(make_trace())
    assert '"arrays":"' in text
    (tmp_path / "page.html").write_text(text.replace('"arrays":"', '"arrays":"AAAA'), encoding="utf-8")
    driver.get((tmp_path / "page.html").as_uri())
    page = Page(driver)
    wait(lambda: "This page is damaged" in page.text("#problem"))
    assert not page.find("#main").is_displayed() and complaints(driver) == []


def test_the_index_leads_to_every_page(show, driver, tmp_path):
    """Also where a name has characters that mean something in an address; text stays text."""
    names = ["50%#?& ü.html", "javascript:alert(1).html"]
    entries = []
    for name, text in zip(names, HOSTILE):
        trace = make_trace(question=text, tokens=(text, name), layers=1)
        (tmp_path / name).write_text(viewer_page(trace), encoding="utf-8")
        entries.append(Entry.of(trace, name))
    (tmp_path / "index.html").write_text(index_page(entries), encoding="utf-8")
    for number, (name, text) in enumerate(zip(names, HOSTILE)):
        open_page(driver, tmp_path / "index.html")
        page = Page(driver)
        assert page.texts(".question") == list(HOSTILE[:2])
        assert page.js("return [document.scripts.length, document.images.length]") == [0, 2]
        assert page.js("return [...document.images].every((image) => image.naturalWidth > 0)")
        page.all("li a")[number].click()
        wait_until_shown(driver)
        assert page.text("#question") == text
        assert page.text("#answer").endswith(name)
    for width in (360, 1200):
        resize(driver, width, 740, mobile=width < 600)
        open_page(driver, tmp_path / "index.html")
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
