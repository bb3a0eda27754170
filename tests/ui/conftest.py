"""A real Chromium on a real service; every page must stay free of console errors."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.ui.service import Service, running_service

_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
_FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_WAIT_MS = 60_000

StartService = Callable[..., Service]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here as driving a browser."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A Chromium for all tests."""
    program = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium found on PATH: install the package chromium")
    expect.set_options(timeout=_WAIT_MS)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=_FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def start_service(tmp_path: Path, sqlite_template: Path) -> Iterator[StartService]:
    """A function that starts a service with the given options; all end with the test and share its database."""
    with ExitStack() as stack:

        def start(**options: Any) -> Service:
            if not (tmp_path / "ui.db").exists():
                shutil.copy(sqlite_template, tmp_path / "ui.db")
            return stack.enter_context(running_service(tmp_path, **options))

        yield start


@pytest.fixture
def service(start_service: StartService) -> Service:
    """A service with a controller that waits for permits."""
    return start_service()


@dataclass
class Tab:
    """A page of the UI, and what its console said.

    Attributes:
        expected: patterns of errors that the test brings about on purpose.
    """

    page: Page
    errors: list[str] = field(default_factory=list)
    # Chromium drops what it is loading whenever a network interface of the machine comes or goes.
    expected: list[str] = field(default_factory=lambda: ["ERR_NETWORK_CHANGED"])

    def __post_init__(self) -> None:
        self.page.set_default_timeout(_WAIT_MS)
        self.page.on("pageerror", lambda error: self.errors.append(f"{error}\n{error.stack}"))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def open(self, url: str) -> Page:
        """Go to an address of the UI and return the page once its program runs."""
        self.page.goto(url)
        for _ in range(3):
            if self.page.locator("#theme svg").count():
                break
            self.page.reload()
        return self.page

    def check(self) -> None:
        """Fail if anything went wrong that was not expected."""
        patterns = re.compile("|".join(self.expected))
        assert [text for text in self.errors if not patterns.search(text)] == []

    def front_points(self, count: int) -> None:
        """Wait until the front's plot draws this many evaluated candidates."""
        self.page.wait_for_function(
            """count => {
                const plot = document.querySelector(".plot-front");
                const traces = (plot?.data ?? []).filter((one) => one.hoverinfo === "text");
                return traces.reduce((sum, one) => sum + one.x.length, 0) === count;
            }""",
            arg=count,
        )


OpenTab = Callable[..., Tab]


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[OpenTab]:
    """A function that opens a fresh browser context; at the end every console must be free of errors."""
    tabs: list[Tab] = []

    def open_one(**options: Any) -> Tab:
        settings: dict[str, Any] = {"viewport": {"width": 1440, "height": 900}, "locale": "en-GB"}
        tab = Tab(browser.new_context(**(settings | options)).new_page())
        tabs.append(tab)
        return tab

    yield open_one
    for tab in tabs:
        tab.page.context.close()
    for tab in tabs:
        tab.check()


@pytest.fixture
def tab(open_tab: OpenTab) -> Tab:
    """A desktop page."""
    return open_tab()


@pytest.fixture
def phone(open_tab: OpenTab) -> Tab:
    """A page on a phone, 390 pixels wide, in the dark."""
    return open_tab(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, color_scheme="dark")
