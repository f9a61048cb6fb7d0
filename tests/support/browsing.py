"""Opens the reports' pages in a headless Chromium, and listens to what it says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

WIDTHS = (1280, 390)
"""CSS pixels: a desk's screen and a telephone's."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium, or the one that the variable CHROMIUM names.  Raises ``FileNotFoundError``."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        raise FileNotFoundError("chromium: not installed; `make browser` installs it, or set CHROMIUM to a browser")
    with sync_playwright() as driver:
        # Root has no user namespace of its own here; the pages are the project's.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, path: Path, width: int) -> Iterator[tuple[Page, list[str]]]:
    """The page in a window of that width, and all that it complained of or asked the network for."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.on("request", lambda request: None if local(request.url) else complaints.append(request.url))
    page.goto(path.resolve().as_uri())
    yield page, complaints
    page.close()


def local(url: str) -> bool:
    """True for what needs no network."""
    return url.startswith(("file:", "data:"))
