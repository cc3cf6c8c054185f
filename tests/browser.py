"""Our pages in a real browser: headless Chromium, driven by Playwright, judged by axe-core.

Needs `pip install -e '.[browser]'`, a Chromium or Chrome on the machine (Debian: `apt-get install chromium`), and
axe-core (`python tests/assets.py`). Tests are skipped, by name, where one is missing; no test fetches anything.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from assets import axe_source

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SERIOUS = ("serious", "critical")


def executable() -> str:
    for name in NAMES:
        if found := shutil.which(name):
            return found
    pytest.skip(f"none of {', '.join(NAMES)} is installed")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser. Sandboxing needs rights that a container does not give."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = executable()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Tab:
    """One page, with all that it said and asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def strangers(self, own: str) -> list[str]:
        """Requests to anywhere but `own`."""
        return [url for url in self.asked if not url.startswith((own, "data:", "about:", "file:"))]

    def serious(self) -> list[str]:
        """Findings of axe-core that are serious or critical: rule, and the elements that break it."""
        self.page.evaluate(axe_source())
        found = self.page.evaluate("axe.run()")
        told = []
        for violation in found["violations"]:
            if violation["impact"] in SERIOUS:
                places = [node["target"][0] for node in violation["nodes"]]
                told.append(f"{violation['id']}: {places[:4]}")
        return told

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    def cut(self) -> list[str]:
        """Tables that are wider than their place, so that columns are out of sight."""
        wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)"
        return self.page.evaluate(f"{wide}.map(e => e.getAttribute('aria-label'))")

    def weight(self) -> int:
        """Bytes of the page and of all that it loads."""
        kinds = "['navigation', 'resource'].flatMap(kind => performance.getEntriesByType(kind))"
        return self.page.evaluate(f"{kinds}.reduce((sum, entry) => sum + entry.encodedBodySize, 0)")


@contextmanager
def tab(browser: Any, **options: Any) -> Iterator[Tab]:
    """A window of its own: no cookies, no cache. `options` of Playwright's new_context."""
    context = browser.new_context(**options)
    opened = Tab(context.new_page())
    opened.page.on("console", lambda message: opened.said.append(f"{message.type}: {message.text}"))
    opened.page.on("pageerror", lambda error: opened.said.append(f"error: {error}"))
    opened.page.on("request", lambda request: opened.asked.append(request.url))
    try:
        yield opened
    finally:
        context.close()
