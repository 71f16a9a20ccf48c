"""The documentation's pages, opened from disk in a real browser: nothing is loaded from elsewhere, the search finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="make docs installs it")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture
def open_site(browser, site):
    """Opens a page; at the end nothing was asked for elsewhere, and nothing complained."""
    complaints, asked = [], []
    context = browser.new_context(viewport={"width": 1280, "height": 800})

    def opened(name: str):
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / name).as_uri())
        return page

    yield opened
    context.close()
    assert complaints == []
    assert all(url.startswith("file:") for url in asked)


@pytest.mark.parametrize("name", ["index.html", "configuration.html", "reading-the-report.html", "benchmarks.html"])
def test_a_page_opens_from_disk(open_site, name):
    page = open_site(name)
    assert page.locator("article h1").count() == 1
    widths = page.locator("article img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert all(widths)


def test_the_search_finds_without_a_server(open_site):
    page = open_site("index.html")
    page.keyboard.press("f")
    page.keyboard.type("gate_floor")
    page.wait_for_selector(".md-search-result__item")
    assert page.locator(".md-search-result__item a[href*='configuration.html']").count()
