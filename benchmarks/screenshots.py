"""Screenshots of a page in a headless Chromium, for the documentation.

python -m benchmarks.screenshots answer.html docs/images/viewer.png --width=1200 --keys="ArrowRight*4 ArrowUp"

Needs Debian's chromium and chromium-driver, and selenium from the dev extra.
"""

import argparse
import base64
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")


@contextlib.contextmanager
def browser(*flags: str) -> Iterator[Any]:
    """Start a Chromium that logs its console and its requests; it is closed at the end."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    # As root in a container there is no sandbox and little shared memory.
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", *flags):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # An explicit driver keeps Selenium from downloading one.
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


def resize(driver: Any, width: int, height: int, *, scale: float = 1, mobile: bool = False) -> None:
    """Give the page a viewport of this size in CSS pixels, ``scale`` device pixels each."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def prefer(driver: Any, **features: str) -> None:
    """Set media features of the page, such as ``prefers_color_scheme="dark"``."""
    named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": named})


def press(driver: Any, keys: str) -> None:
    """Press keys, given by their DOM names separated by spaces; ``*N`` after a name repeats it N times.

    ``Shift+`` before a name holds that key too.
    """
    for key in keys.split():
        name, _, times = key.partition("*")
        shift, name = name.startswith("Shift+"), name.removeprefix("Shift+")
        event = {"key": " " if name == "Space" else name, "modifiers": 8 if shift else 0}
        for _ in range(int(times or 1)):
            driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyDown", **event})
            driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyUp", **event})


def open_page(driver: Any, path: Path, *, address: str = "") -> None:
    """Open a file, with ``address`` after the #, and wait until its main part is shown."""
    driver.get("about:blank")  # from a page of the same file, a browser would only change the address
    driver.get(f"{path.resolve().as_uri()}#{address}".removesuffix("#"))
    wait_until_shown(driver)


def wait_until_shown(driver: Any) -> None:
    """Wait until the script of a page has shown its main part."""
    from selenium.webdriver.support.wait import WebDriverWait

    shown = "const main = document.querySelector('main'); return !!main && !main.hidden"
    WebDriverWait(driver, 30, poll_frequency=0.05).until(lambda driver: driver.execute_script(shown))


def photograph(
    driver: Any, page: Path, out: Path, *, width: int, height: int | None, scale: float, keys: str, dark: bool
) -> None:
    """Write a PNG of a page after ``keys``: all of it or ``height`` CSS pixels; mobile if below 600 wide."""
    resize(driver, width, height or 900, scale=scale, mobile=width < 600)
    prefer(driver, prefers_color_scheme="dark" if dark else "light", prefers_reduced_motion="reduce")
    open_page(driver, page)
    press(driver, keys)
    size = driver.execute_script("return [innerWidth, document.documentElement.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": size[0], "height": height or size[1], "scale": 1}
    options = {"captureBeyondViewport": True, "clip": clip}
    out.write_bytes(base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path, help="an HTML file")
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("--width", type=int, default=1200, help="width of the viewport in CSS pixels")
    parser.add_argument("--height", type=int, help="height of the picture in CSS pixels; default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="device pixels per CSS pixel")
    parser.add_argument("--keys", default="", help="keys to press first, such as 'ArrowRight*4 ArrowUp'")
    parser.add_argument("--dark", action="store_true", help="use the dark colour scheme")
    args = parser.parse_args()
    with browser() as driver:
        photograph(driver, **vars(args))


if __name__ == "__main__":
    main()
