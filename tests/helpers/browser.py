"""Headless Chromium for tests of pages. Not a test itself."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NEEDED = (
    "a browser test needs Chromium, its driver and selenium: apt-get install chromium chromium-driver; pip install selenium"
)

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def missing() -> str | None:
    """What is not installed, or None."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return f"{NEEDED} (selenium is missing)"
    for names in (CHROMIUM, ("chromedriver",)):
        if not any(shutil.which(name) for name in names):
            return f"{NEEDED} ({names[0]} is missing)"
    return None


def axe() -> str | None:
    """The source of axe-core (accessibility checks) from the file that AXE_CORE names, or from node_modules; None without."""
    for place in (os.environ.get("AXE_CORE"), "node_modules/axe-core/axe.min.js"):
        if place and Path(place).is_file():
            return Path(place).read_text(encoding="utf-8")
    return None


class Page:
    """A page in the browser, with the few verbs that tests need."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path) -> None:
        self.driver.get(path.resolve().as_uri())
        self.wait(lambda: self.js("return document.documentElement.dataset.ready") == "true", "the page to be ready")
        self.settle()

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def run(self, code: str, *arguments: Any) -> Any:
        """The value of an async function's body, in which `args` are the arguments."""
        wrapped = (
            "const args = Array.from(arguments), done = args.pop();"
            f"(async () => {{ {code} }})().then((value) => done([value]), (error) => done(String(error.stack)));"
        )
        found = self.driver.execute_async_script(wrapped, *arguments)
        assert isinstance(found, list), found
        return found[0]

    def settle(self) -> None:
        """Wait until the matrix is drawn."""
        self.wait(lambda: self.js("return document.getElementById('grid').dataset.state") != "busy", "the matrix")

    def wait(self, ready: Callable[[], bool], what: str, most: float = 60.0) -> None:
        end = time.monotonic() + most
        while not ready():
            assert time.monotonic() < end, f"waited {most} s for {what}; the console says {self.console()}"
            time.sleep(0.02)

    def text(self, name: str) -> str:
        return str(self.js("return document.getElementById(arguments[0]).textContent", name))

    def click(self, selector: str) -> None:
        self.js("document.querySelector(arguments[0]).click()", selector)

    def tap(self, selector: str) -> None:
        """A touch on the middle of an element."""
        from selenium.webdriver.common.by import By

        node = self.driver.find_element(By.CSS_SELECTOR, selector)
        self.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", node)
        box = self.js("const b = arguments[0].getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]", node)
        point = [{"x": box[0], "y": box[1]}]
        for kind, points in (("touchStart", point), ("touchEnd", [])):
            self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def press(self, selector: str, *keys: str) -> None:
        """Real key presses on an element that has the focus first."""
        from selenium.webdriver.common.by import By

        self.driver.find_element(By.CSS_SELECTOR, selector).send_keys(*keys)

    def slide(self, name: str, value: float) -> None:
        self.js(
            "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('input'))",
            name,
            value,
        )

    def console(self) -> list[str]:
        """Errors and warnings since the last call."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]

    def requests(self) -> list[str]:
        """Every address requested since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@contextmanager
def browser(width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Page]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--window-size={width},{height}",
    ):
        options.add_argument(flag)
    found = next((shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
    options.binary_location = found or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.set_script_timeout(120)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        if width < 600:
            driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        yield Page(driver)
    finally:
        driver.quit()
