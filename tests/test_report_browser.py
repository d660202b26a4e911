"""Claims about a report in a browser: nothing is fetched, nothing complains, every figure is drawn, nothing overflows.
Headless Chromium, the system's own: Playwright's download is not needed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.builders import run_tinybert
from tests.test_export import copy_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (Debian and Ubuntu: apt-get install chromium)"
)
WIDTHS = {"desktop": 1280, "phone": 390}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_run(tmp_path_factory.mktemp("browser"))
    long = "https://example.org/" + "unbroken" * 40
    outcome = run_tinybert("report", folder, "--sentence", f"rain and wind {long}", "--price-per-hour", "1")
    assert outcome.status == 0, outcome.err[-3000:]
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its sandbox needs more rights than a container has; what it opens is this test's own file.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("device", WIDTHS)
def test_a_report_opens_alone_and_fits(device: str, browser: Any, report: Path) -> None:
    page = browser.new_page(viewport={"width": WIDTHS[device], "height": 800})
    told: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert told == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[device]

    figures = page.locator("figure svg").all()
    assert len(figures) > 10
    for figure in figures:
        box = figure.bounding_box()
        assert box is not None
        assert box["width"] > 250
        assert box["height"] > 80
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= WIDTHS[device]
    assert page.locator("figure svg text").count() > 100
    sizes = page.evaluate(
        """() => [...document.querySelectorAll('figure svg text')].map(one => parseFloat(getComputedStyle(one).fontSize)
            * one.ownerSVGElement.getBoundingClientRect().width / one.ownerSVGElement.viewBox.baseVal.width)"""
    )
    assert len(sizes) > 100
    assert min(sizes) > 7, "pixels; smaller letters cannot be read on a phone"
    page.close()


def test_sections_are_reached_from_the_top(browser: Any, report: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(report.as_uri())
    links = page.locator("nav a").all()
    assert len(links) == 7
    for link in links:
        link.click()
        target = page.locator((link.get_attribute("href") or "") + " h2")
        assert target.count() == 1
    page.close()
