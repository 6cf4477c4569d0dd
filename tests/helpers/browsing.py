"""The viewer's page in a Chromium, by what a reader sees and does, and what it should show of a trace."""

import base64
import io
import json
import time

import numpy as np
from PIL import Image

from benchmarks.screenshots import press
from gaze_jax.viewer.contact_sheet import _veiled

OUTLINE = (0, 133, 202)
ALL = -1


class Page:
    """A page in the browser, by what a reader sees and does."""

    def __init__(self, driver):
        self.driver = driver

    def js(self, script, *args):
        return self.driver.execute_script(script, *args)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, selector):
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def press(self, keys):
        press(self.driver, keys)

    def choose(self, selector, value):
        self.find(f'{selector} option[value="{value}"]').click()

    def texts(self, selector):
        return self.js(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
        )

    def current(self, selector="#answer button"):
        """Which of the elements is marked; exactly one is."""
        marks = self.js(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.getAttribute('aria-current'))",
            selector,
        )
        assert marks.count("true") == 1
        return marks.index("true")

    def value(self, selector):
        """Of a chooser, as a number."""
        return int(self.js("return document.querySelector(arguments[0]).value", selector))

    def hover(self, selector, x, y):
        """Moves the pointer to a place of an element, as fractions of its width and height, in view."""
        self.js("document.querySelector(arguments[0]).scrollIntoView({ block: 'center' })", selector)
        left, top, width, height = self.js(
            "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [box.left, box.top, box.width, box.height]",
            selector,
        )
        place = {"x": left + x * width, "y": top + y * height}
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", **place})
        return place

    def click(self, selector, x, y):
        """Clicks there."""
        place = self.hover(selector, x, y)
        for kind in ("mousePressed", "mouseReleased"):
            event = {"type": kind, "button": "left", "clickCount": 1, **place}
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)

    def pixels(self, selector):
        url = self.js("return document.querySelector(arguments[0]).toDataURL('image/png')", selector)
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        return np.asarray(image.convert("RGB"))


def complaints(driver):
    """What the console was told since last asked, violations of the policy included."""
    return [entry["message"] for entry in driver.get_log("browser")]


def requested(driver):
    """Every URL that was asked for since last asked, and why it was not sent, if so: {URL: reason}."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    failed = {
        event["params"]["requestId"]: event["params"].get("blockedReason")
        for event in events
        if event["method"] == "Network.loadingFailed"
    }
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return {event["request"]["url"]: failed.get(event["requestId"]) for event in sent}


def numbers(text):
    """The numbers of percentages and others in a text."""
    return [float(part.rstrip("%")) for part in text.replace("\u00a0%", "%").split() if part[:1].isdigit()]


def wait(condition, seconds=5):
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def expected_fraction(trace, token, layer, head):
    """[R]: the fraction of the chosen heads that selected each region, from the trace alone."""
    mask = np.repeat(trace.mask(), trace.heads // trace.selected.shape[2], axis=2)[token].astype(np.float32)
    mask = mask if layer == ALL else mask[layer : layer + 1]
    mask = mask if head == ALL else mask[:, head : head + 1]
    return mask.mean(axis=(0, 1))


def expected_dense(trace, token, layer, head):
    dense = trace.dense[token] if layer == ALL else trace.dense[token, layer : layer + 1]
    return (dense if head == ALL else dense[:, head : head + 1]).mean(axis=(0, 1))


def expected_attention(trace, token, layer, head):
    """[R]: attention on what was selected, a mean over the chosen heads."""
    by_head = np.repeat(trace.selected, trace.heads // trace.selected.shape[2], axis=2)
    found = np.zeros((trace.layers, trace.heads, trace.regions + 1))
    np.put_along_axis(found, by_head[token], trace.attention[token], axis=-1)
    found = found[..., :-1] if layer == ALL else found[layer : layer + 1, :, :-1]
    return (found if head == ALL else found[:, head : head + 1]).mean(axis=(0, 1))


def cells(view, shape):
    """Which region each pixel of a canvas of this (height, width) shows."""
    rows, columns = view.regions.shape
    y = (np.arange(shape[0]) + 0.5) * rows / shape[0]
    x = (np.arange(shape[1]) + 0.5) * columns / shape[1]
    return view.regions[y.astype(int)][:, x.astype(int)]


def covered(trace, view, factor):
    """What a view covers of its picture, enlarged pixel by pixel; padding is black."""
    part = Image.fromarray(trace.picture_of(view).pixels()).crop([round(edge) for edge in view.corners])
    return np.asarray(part).repeat(factor, 0).repeat(factor, 1)


def assert_gaze(page, trace, token, layer, head, view=None):
    """The canvas shows what most heads selected as the picture is, and veils the rest in proportion."""
    view = view or trace.views[0]
    got = page.pixels("#gaze")
    clear = covered(trace, view, 560 // max(covered(trace, view, 1).shape[:2]))
    assert got.shape == clear.shape
    every = expected_fraction(trace, token, layer, head)
    fraction = (every / every.max())[cells(view, got.shape)]
    outline = (got == OUTLINE).all(-1)
    difference = np.abs(got.astype(int) - _veiled(clear, fraction))
    assert difference[~outline].max() <= 4
    # The outline hides nothing that half as many heads selected, and lies beside it.
    assert not (outline & (fraction >= 0.5)).any()
    assert outline.any() == bool((fraction >= 0.5).any() and (fraction < 0.5).any())
    return fraction


def luminance(colour):
    channels = [float(c) / 255 for c in colour.strip("rgba()").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])
