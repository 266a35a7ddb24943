"""Headless Chromium for the tests of web pages: Debian's package, driven by selenium. Nothing outside is reached.

    with chromium() as browser:                       # skips the test where no Chromium is installed; 1-2 s to start
        browser.look(width=360, height=740, dark=True)    # the screen; may be changed at any time
        browser.scripts(False)                        # as with JavaScript switched off; for pages opened from then on
        browser.open(url)
        browser.driver.find_element("css selector", "h1").text    # all that selenium can do
        browser.evaluate("document.title")            # an expression's value, in the page
        browser.until("document.querySelector('#x')", "an x", timeout_s=5)
        browser.complaints()                          # what the console was told since the last call: errors, warnings
        browser.scrolls_sideways()                    # is the page wider than the screen?
        browser.faults()                              # what axe-core calls serious or critical
        browser.screenshot(path, whole=True)

One browser serves a module: make it a fixture of module scope, and call `browser.reset()` between tests.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

AXE = Path(__file__).parent / "vendor" / "axe-core" / "axe.min.js"
GRAVE = ("serious", "critical")
POLL_S = 0.05
PAGE_S = 20.0
WIDTH, HEIGHT = 1280, 900
FLAGS = (
    "--headless=new",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    "--no-first-run",
    "--no-proxy-server",
)


class Browser:
    """A running Chromium. Made by `chromium`.

    Attributes:
        driver: selenium's.
    """

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def look(
        self, *, width: int = WIDTH, height: int = HEIGHT, dark: bool = False, reduced_motion: bool = True
    ) -> None:
        """The screen, in CSS pixels, and what its owner prefers. Up to 480 pixels wide it is a phone."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width <= 480}
        self._tell("Emulation.setDeviceMetricsOverride", **screen)
        wishes = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if reduced_motion else "no-preference",
        }
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self._tell("Emulation.setEmulatedMedia", media="", features=features)

    def print_preview(self) -> None:
        """As on paper, until `look` is called."""
        self._tell("Emulation.setEmulatedMedia", media="print", features=[])

    def scripts(self, enabled: bool) -> None:
        """May pages that are opened from now on run JavaScript? `evaluate` works either way."""
        self._tell("Emulation.setScriptExecutionDisabled", value=not enabled)

    def open(self, url: str) -> None:
        """Waits until it is loaded."""
        self.driver.get(url)

    def reset(self) -> None:
        """Leaves the page; the screen, scripts and console are as in the beginning."""
        self.driver.get("about:blank")
        self.scripts(True)
        self.look()
        self.complaints()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.driver.execute_script(f"return ({expression});")

    def until(self, expression: str, what: str, timeout_s: float = PAGE_S) -> Any:
        """The first value of the expression that is true.

        Raises:
            AssertionError: there was none in time.
        """
        deadline_s = time.monotonic() + timeout_s
        while not (value := self.evaluate(expression)):
            if time.monotonic() >= deadline_s:
                raise AssertionError(f"the page showed {what} in vain for {timeout_s:g} s:\n{self.text}")
            time.sleep(POLL_S)
        return value

    @property
    def text(self) -> str:
        """What is to be read on the page."""
        return str(self.evaluate("document.body.innerText"))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since the last call, those of the network and of the CSP included."""
        entries = self.driver.get_log("browser")  # type: ignore[no-untyped-call]  # selenium's
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def scrolls_sideways(self) -> bool:
        """Is the page wider than the screen?"""
        return bool(self.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))

    def faults(self) -> list[str]:
        """What axe-core finds wrong with the page and calls serious or critical, one line each."""
        self.driver.execute_script(AXE.read_text())
        self.driver.set_script_timeout(PAGE_S)
        found = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            "axe.run().then(r => done(r.violations), e => done([{id: String(e), impact: 'critical', nodes: []}]));"
        )
        return [
            f"{fault['id']}: {node['html'][:160]} {node.get('failureSummary', '')}"
            for fault in found
            if fault["impact"] in GRAVE
            for node in fault["nodes"] or [{"html": ""}]
        ]

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """As PNG; `whole`: also what lies below the screen."""
        taken = self._tell("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._area(whole))
        path.write_bytes(base64.b64decode(taken["data"]))

    def _area(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        root = "document.documentElement"
        width, height = self.evaluate(f"[{root}.clientWidth, {root}.scrollHeight]")
        return {"clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}}

    def _tell(self, command: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)  # type: ignore[no-untyped-call]  # selenium's


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with an empty profile, until the context ends. Skips the test where there is none."""
    program, chauffeur = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or chauffeur is None:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    with tempfile.TemporaryDirectory(prefix="potluck-browser-", ignore_cleanup_errors=True) as profile:
        options = Options()
        options.binary_location = program
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")  # Chromium has none for root
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(executable_path=chauffeur))
        try:
            browser = Browser(driver)
            browser.driver.set_page_load_timeout(PAGE_S)
            browser.look()
            yield browser
        finally:
            driver.quit()
