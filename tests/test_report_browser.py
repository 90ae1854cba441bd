"""A real browser shows the reports: whole at every width, light and dark, without errors, requests, or a mouse."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from test_report import TARGETS, results, roles, written

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

__all__ = ["results", "roles", "written"]

CHROMIUM = shutil.which("chromium")
WIDTHS = (1280, 390)
VIEWS = [pytest.param(width, scheme, id=f"{width}-{scheme}") for width in WIDTHS for scheme in ("light", "dark")]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture(params=["run", "sizes"])
def report(request: pytest.FixtureRequest, written: Path) -> Path:
    return (written / TARGETS[0] if request.param == "run" else written) / "report.html"


class View:
    """A page in a browser, and what it said and asked for."""

    def __init__(self, browser: Any, report: Path, width: int, scheme: str):
        self.context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.address = report.absolute().as_uri()
        self.page.goto(self.address)

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_the_page_fits_says_nothing_and_asks_for_nothing(browser: Any, report: Path, width: int, scheme: str):
    with View(browser, report, width, scheme) as view:
        whole, shown = view.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert whole <= shown == width
        spilt = view.page.evaluate(
            """width => [...document.querySelectorAll('h1, h2, h3, p, li, pre, figure, .scroll, dl > div')]
                .filter(e => e.checkVisibility() && e.getBoundingClientRect().right > width + 0.5)
                .map(e => e.outerHTML)""",
            width,
        )
        assert spilt == []
        assert view.said == [] and view.asked == [view.address]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_has_the_colours_that_are_preferred(browser: Any, report: Path, scheme: str):
    with View(browser, report, 390, scheme) as view:
        ground = view.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (sum(ground[:3]) > 600) == (scheme == "light")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_keyboard_reaches_everything_and_a_wide_table_scrolls_by_itself(browser: Any, report: Path, width: int):
    with View(browser, report, width, "light") as view:
        wanted = view.page.evaluate(
            """() => { const all = [...document.querySelectorAll('a[href], summary, [tabindex="0"]')]
                .filter(e => e.checkVisibility()); all.forEach((e, i) => e.dataset.place = i); return all.length; }"""
        )
        reached = []
        for _ in range(wanted):
            view.page.keyboard.press("Tab")
            reached.append(view.page.evaluate("document.activeElement.dataset.place"))
        assert reached == [str(i) for i in range(wanted)]
        outline = view.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
        wide = view.page.evaluate(
            "[...document.querySelectorAll('.scroll')].findIndex(e => e.scrollWidth > e.clientWidth + 20)"
        )
        assert wide >= 0 or width == max(WIDTHS)
        if wide >= 0:
            view.page.evaluate("i => document.querySelectorAll('.scroll')[i].focus()", wide)
            view.page.keyboard.press("ArrowRight")
            view.page.wait_for_function("i => document.querySelectorAll('.scroll')[i].scrollLeft > 0", arg=wide)


def test_pictures_have_names_and_their_words_are_large_enough_on_a_phone(browser: Any, report: Path):
    with View(browser, report, 390, "light") as view:
        named = view.page.get_by_role("img").count()
        assert named == view.page.evaluate("document.querySelectorAll('svg').length") > 1
        small = view.page.evaluate(
            """() => [...document.querySelectorAll('svg text')].filter(e => e.checkVisibility() &&
                e.getCTM().a * parseFloat(getComputedStyle(e).fontSize) < 8.9).map(e => e.textContent)"""
        )
        assert small == []
