"""A real web browser without a window, where there is one: ``make test-browser`` brings what drives it."""

from __future__ import annotations

import shutil

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="session")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="no playwright: make test-browser installs it")
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    with driver.sync_playwright() as playwright:
        try:
            # As root, Chromium starts only without its sandbox; the pages are our own.
            opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except driver.Error as error:
            pytest.skip(f"no browser ({str(error).splitlines()[0]}): apt-get install chromium, or playwright install")
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser):
    """Opens a file at a size and in a scheme; at the end nothing was asked for elsewhere, and nothing complained."""
    complaints, asked, contexts = [], [], []

    def opened(file, *, width=1280, height=800, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("#browser[data-ready]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(url.startswith("file:") for url in asked)
