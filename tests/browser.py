"""Pages in a real browser: Debian's Chromium, driven by Playwright. Where there is none, tests are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"phone": (360, 740), "desktop": (1400, 900)}
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e '.[test]'")
    with playwright.sync_playwright() as running:
        # Chromium refuses to run as root in its sandbox, and containers often have no /dev/shm.
        actual = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield actual
        actual.close()


@dataclass
class Visit:
    """A page that is open, and what it complained about."""

    page: object
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def visit(browser, path: Path, size: str, scheme: str) -> Visit:
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=size == "phone",
        is_mobile=size == "phone",
    )  # fmt: skip
    page = context.new_page()
    page.set_default_timeout(20_000)
    actual = Visit(page)
    page.on("console", lambda message: actual.complaints.append(message.text))
    page.on("pageerror", lambda error: actual.complaints.append(str(error)))
    page.on("request", lambda request: actual.requests.append(request.url))
    page.goto(path.as_uri())
    return actual
