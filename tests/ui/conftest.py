"""The UI of make up in Chromium: one of each for all tests here, and a picture of how each test ended.

The pictures are in .run/screenshots, or where SCREENSHOTS says. CHROMIUM names a browser that is not on the PATH.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, FrameLocator, Page, expect, sync_playwright

from tests.docs.documents import blocks
from tests.local.up import Up, a_free_port, copy_working_tree, lend_environment, processes
from tests.warehouse import ROOT

# A slow machine with two cores runs Airflow, PostgreSQL, a browser and other tests at once.
PATIENCE = 90_000  # milliseconds
WIDTH, HEIGHT = 1280, 800
PICTURES = Path(os.environ.get("SCREENSHOTS") or ROOT / ".run" / "screenshots")
# What Airflow 3.3's own pages have in the console, by text and place.
AIRFLOWS_OWN = [
    ("401 (Unauthorized)", "/ui/config"),  # asked before it shows the login
]


def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("no Chromium for the tests of the UI: apt-get install chromium, or name one in CHROMIUM")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    # Until the end of the file only: its event loop would be in the way of others in this process.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--disable-background-networking", "--disable-gpu"]
        )
        expect.set_options(timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def up(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """make up on empty databases; it also has the DAG that docs/architecture.md has as an example."""
    clone = copy_working_tree(tmp_path_factory.mktemp("ui") / "a warehouse")
    lend_environment(clone)
    (example,) = (block for block in blocks() if block.document.name == "architecture.md" and block.kind == "python")
    (clone / "dags" / "downstream.py").write_text(example.text)
    running = Up(clone, a_free_port())
    yield running
    running.stop(signal.SIGINT)  # as Ctrl-C does
    assert processes(clone) == []


@dataclass
class Window:
    """A browser's window on the UI, without a login or with one."""

    page: Page
    up: Up
    errors: list[str] = field(default_factory=list)
    #: what a test brings about on purpose, as a part of the error
    expected: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note)

    def _note(self, message: ConsoleMessage) -> None:
        place = message.location.get("url", "")
        known = any(text in message.text and place.endswith(end) for text, end in AIRFLOWS_OWN)
        text = f"{message.text} ({place})"
        if message.type == "error" and not known and not any(part in text for part in self.expected):
            self.errors.append(text)

    def open(self, path: str) -> None:
        self.page.goto(self.up.base + path)

    def log_in(self, password: str) -> None:
        self.page.get_by_label("Username").fill("admin")
        self.page.get_by_label("Password").fill(password)
        self.page.get_by_role("button", name="Sign in").click()

    def navigate(self, *names: str) -> None:
        """By the bar on the left."""
        for name in names:
            self.page.get_by_role("link", name=name, exact=True).last.click()

    def warehouse_page(self) -> FrameLocator:
        self.navigate("Warehouse")
        return self.page.frame_locator("iframe")

    def resize(self, height: int = HEIGHT) -> None:
        self.page.set_viewport_size({"width": WIDTH, "height": height})

    def picture(self, name: str) -> None:
        """Once everything is there, and nothing moves any more."""
        self.page.wait_for_load_state("networkidle")
        self.page.wait_for_timeout(1_000)
        self.page.screenshot(path=PICTURES / f"{name}.png")


def new_context(browser: Browser) -> BrowserContext:
    return browser.new_context(
        viewport={"width": WIDTH, "height": HEIGHT}, locale="en-GB", timezone_id="UTC", reduced_motion="reduce"
    )


@pytest.fixture(scope="module")
def session(browser: Browser, up: Up) -> Iterator[Window]:
    """A window that is logged in, one for all: a new one would compile Airflow's pages anew, 4 s on two cores."""
    with new_context(browser) as context:
        window = Window(context.new_page(), up)
        window.open("/")
        window.log_in(up.password)
        expect(window.page.get_by_role("heading", name="Welcome")).to_be_visible()
        yield window


@pytest.fixture
def window(session: Window, request: pytest.FixtureRequest) -> Iterator[Window]:
    """With a login, and nothing that another test has set in the UI, such as dark or the view of a DAG."""
    session.page.evaluate("localStorage.clear()")
    session.resize()
    session.errors.clear()
    session.expected.clear()
    yield from closing(session, request.node)


@pytest.fixture
def stranger(browser: Browser, up: Up, request: pytest.FixtureRequest) -> Iterator[Window]:
    """Without a login."""
    with new_context(browser) as context:
        yield from closing(Window(context.new_page(), up), request.node)


def closing(window: Window, test: pytest.Item) -> Iterator[Window]:
    yield window
    window.page.screenshot(path=PICTURES / f"{test.name}.png")
    assert window.errors == []


@pytest.fixture
def warehouse(up: Up) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """The warehouse as its owner."""
    with psycopg.connect(up.warehouse, autocommit=True) as conn:
        yield conn
