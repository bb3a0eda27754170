"""A real Chromium on a real service; every page must stay free of console errors."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, expect, sync_playwright

from tests.ui.service import Service, running_service

_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
_FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_WAIT_MS = 60_000

_DESKTOP: dict[str, Any] = {"viewport": {"width": 1440, "height": 900}, "locale": "en-GB"}
_FAILED = pytest.StashKey[bool]()

StartService = Callable[..., Service]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note which tests failed: the pages that they used are in no known state."""
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


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


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Iterator[Service]:
    """A service whose controllers the tests bring, and which each leaves without jobs."""
    root = tmp_path_factory.mktemp("ui")
    shutil.copy(sqlite_template, root / "ui.db")
    with running_service(root, work=False) as service:
        yield service


@pytest.fixture
def start_service(house: Service, tmp_path: Path, sqlite_template: Path) -> Iterator[StartService]:
    """A function that starts a service, which ends with the test.

    All tests share one server and its database, since starting one and loading its UI anew take longer than most tests.
    The function starts a controller for it, unless told ``work=False``. With settings of its own, a service is another
    with its own database.
    """
    with ExitStack() as stack:
        stack.callback(house.clear)

        def start(*, work: bool = True, fail_every: int = 0, **settings: Any) -> Service:
            if settings:
                shutil.copy(sqlite_template, tmp_path / "ui.db")
                return stack.enter_context(running_service(tmp_path, **settings))
            if work:
                stack.enter_context(house.working(fail_every))
            return house

        yield start


@pytest.fixture
def service(start_service: StartService) -> Service:
    """A service with a controller that waits for permits."""
    return start_service()


class Desktop:
    """The page that tests share one after the other, and with it what the browser has loaded and compiled."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._page: Page | None = None

    def page(self) -> Page:
        """Return the page, a fresh one where a test has closed it."""
        if self._page is None or self._page.is_closed():
            self._page = self._browser.new_context(**_DESKTOP).new_page()
        return self._page

    def drop(self) -> None:
        """Let the next test have a fresh page."""
        if self._page is not None:
            self._page.context.close()
        self._page = None


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
        self.page.on("pageerror", self._note_error)
        self.page.on("console", self._note_message)

    def _note_error(self, error: Error) -> None:
        self.errors.append(f"{error}\n{error.stack}")

    def _note_message(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def open(self, url: str) -> Page:
        """Go to an address of the UI and return the page once its program runs; another ``#`` loads nothing anew."""
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

    def leave(self) -> None:
        """Go where nothing of the server is asked for, and listen no more."""
        self.page.mouse.move(0, 0)
        self.page.evaluate("location.hash = '#/nowhere'")
        expect(self.page.get_by_role("heading", name="No such page")).to_be_visible()
        self.page.evaluate("document.getElementById('toasts').replaceChildren()")
        self.page.remove_listener("pageerror", self._note_error)
        self.page.remove_listener("console", self._note_message)

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
        tab = Tab(browser.new_context(**(_DESKTOP | options)).new_page())
        tabs.append(tab)
        return tab

    yield open_one
    for tab in tabs:
        tab.page.context.close()
    for tab in tabs:
        tab.check()


@pytest.fixture(scope="session")
def desktop(browser: Browser) -> Desktop:
    """What tests share a page by."""
    return Desktop(browser)


@pytest.fixture
def tab(desktop: Desktop, request: pytest.FixtureRequest) -> Iterator[Tab]:
    """A desktop page, in which the UI may be loaded already.

    Where storage, focus or what the browser shows first matter, take a fresh one by `open_tab`.
    """
    tab = Tab(desktop.page())
    yield tab
    if request.node.stash.get(_FAILED, False) or not tab.page.url.startswith("http"):
        desktop.drop()
    else:
        tab.leave()
    tab.check()


@pytest.fixture
def phone(open_tab: OpenTab) -> Tab:
    """A page on a phone, 390 pixels wide, in the dark."""
    return open_tab(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, color_scheme="dark")
