"""The reports' pages in a real browser: no complaint, nothing from the network, nothing beside the window's edge."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from browsing import WIDTHS, opened

RUN = "20260106T030405Z"
PAGES = {"npu-01": "PASS", "npu-02": "FAIL", "fleet": "ERROR"}
"""Folder to the verdict that its page must begin with."""


@pytest.mark.parametrize("language", ["", ".zh"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("folder", PAGES)
def test_a_page_opens(browser: Browser, reports: Path, folder: str, width: int, language: str) -> None:
    name = "index" if folder == "fleet" else "report"
    with opened(browser, reports / folder / RUN / f"{name}{language}.html", width) as (page, complaints):
        # What is folded away is looked at as well.
        page.evaluate("document.querySelectorAll('details').forEach(folded => folded.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        verdict = page.get_by_text(PAGES[folder], exact=True).first
        box = verdict.bounding_box()
        assert box is not None
        assert box["y"] + box["height"] < 300, "the verdict is the first thing seen"
        # What is drawn has a size: a plot that collapsed shows nothing, and complains of nothing.
        for plot in page.locator("svg").all():
            drawn = plot.bounding_box()
            assert drawn is None or min(drawn["width"], drawn["height"]) > 10
        page.get_by_role("link", name="English" if language else "中文").click()
        assert page.url.endswith(f"/{name}{'' if language else '.zh'}.html")
        assert complaints == []


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ('<img src="http://127.0.0.1:9/logo.png" alt="">', "http://127.0.0.1:9/logo.png"),
        ("<script>throw new Error('broken')</script>", "broken"),
    ],
)
def test_what_a_page_complains_of_is_heard(browser: Browser, tmp_path: Path, fault: str, complaint: str) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><title>t</title>{fault}")
    with opened(browser, page, 390) as (_, complaints):
        assert complaint in complaints
