"""The page in a real browser, opened from disk."""

import html
import json
import re
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from tests import bundles
from tests.bundles import add_build, checked, run, write_bundle
from tests.hostile import HOSTILE, HOSTILE_LINES, write_hostile_bundle
from thanos_deploy.bundle.codec import decode
from thanos_deploy.bundle.files import Json
from thanos_deploy.report.figures import figures, shown, shown_ratio
from thanos_deploy.report.labels import Box
from thanos_deploy.report.model import ModelReport
from thanos_deploy.report.write import compare

Browser = webdriver.Chrome

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    program, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if program is None or driver is None:
        pytest.skip("no chromium and chromedriver installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    with webdriver.Chrome(options=options, service=service) as started:
        yield started


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one bundle that has everything, one of its runs invalid."""
    folder = tmp_path_factory.mktemp("one")
    kinds = ("prefill", "decode", "generate", "open-loop")
    runs = (run(kinds=kinds), run("full", status="INVALID", reasons=("the machine moved",)))
    out = write_bundle(folder / "out", stages=(*bundles.ALL, "packed"), runs=runs)
    add_build(out)
    compare([out], folder / "one.html")
    return folder / "one.html"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of three bundles."""
    folder = tmp_path_factory.mktemp("many")
    paths = [
        write_bundle(folder / "a", perplexity=16.8, runs=(run(factor=0.99),)),
        write_bundle(folder / "b", pattern="structured:0.2", perplexity=9.5, bytes_=3500),
        write_bundle(folder / "c", pattern="unstructured:0.5", perplexity=113.1),
    ]
    compare(paths, folder / "many.html")
    return folder / "many.html"


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a dozen bundles that cost about the same and are about as good."""
    folder = tmp_path_factory.mktemp("crowd")
    paths = [
        write_bundle(
            folder / f"a model with a name of some length {number}",
            perplexity=12 + number / 50,
            bytes_=4000 + number,
            runs=(run(factor=0.8 + number / 500),),
        )
        for number in range(12)
    ]
    compare(paths, folder / "crowd.html")
    return folder / "crowd.html"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two bundles in which everything that a user or a model names is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = [
        write_hostile_bundle(folder / name.replace("/", "\\")) for name in (HOSTILE, f"{HOSTILE}2")
    ]
    compare(paths, folder / "page.html")
    return folder / "page.html"


def show(browser: Browser, page: Path, *, width: int = 1100, dark: bool = False) -> None:
    """Open a page as if nobody had seen it before."""
    devtools = browser.execute_cdp_cmd
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    devtools("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    devtools("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(page.as_uri())
    browser.execute_script("localStorage.clear()")
    browser.get_log("browser")
    browser.get(page.as_uri())


def table(browser: Browser, selector: str) -> list[list[str]]:
    """Texts of the cells of a table's body."""
    rows: list[list[str]] = browser.execute_script(
        "return [...document.querySelector(arguments[0]).tBodies[0].rows]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent.trim()))",
        selector,
    )
    return rows


def report_beside(page: Path) -> Json:
    return checked(json.loads(page.with_suffix(".json").read_text()))


@pytest.mark.parametrize("name", ["one", "many", "hostile"])
@pytest.mark.parametrize("dark", [False, True])
def test_it_loads_without_a_word_on_the_console_and_without_the_network(
    name: str, dark: bool, browser: Browser, request: pytest.FixtureRequest
) -> None:
    page = request.getfixturevalue(name)
    show(browser, page, dark=dark)
    assert browser.get_log("browser") == []
    loaded = browser.execute_script("return performance.getEntriesByType('resource').length")
    assert loaded == 0
    assert not re.search(r"(src|href)=\"?(https?:|//)|@import|url\((?!#)", page.read_text())


def test_the_numbers_are_those_of_the_json(browser: Browser, one: Path) -> None:
    show(browser, one)
    report = report_beside(one)
    (model,) = report["models"]
    assert browser.find_element(By.CLASS_NAME, "headline").text == report["headline"]
    expected = [
        [f.title, shown(f.dense, f.unit), shown(f.pruned, f.unit), shown_ratio(f)]
        for f in figures(decode(ModelReport, model))
    ]
    assert table(browser, "table.figures")[: len(expected)] == expected
    values = browser.execute_script(
        "return [...document.querySelectorAll('table.figures td:last-child')]"
        ".map((cell) => cell.dataset.value)"
    )
    assert [float(value) for value in values if value] == [
        f.ratio for f in figures(decode(ModelReport, model))
    ]
    text = browser.find_element(By.TAG_NAME, "main").text
    for entry in model["not_measured"]:
        assert entry["what"] in text
    for sentence in model["verdict"]:
        assert sentence in text


def test_a_run_that_does_not_count_is_seen_before_any_figure(browser: Browser, one: Path) -> None:
    show(browser, one)
    (notice,) = browser.find_elements(By.CSS_SELECTOR, "header .alarm")
    assert notice.is_displayed()
    assert notice.text == report_beside(one)["notices"][0]


def test_the_theme_can_be_switched_and_is_remembered(browser: Browser, one: Path) -> None:
    def paper() -> str:
        found: str = browser.execute_script(
            "return getComputedStyle(document.body).backgroundColor"
        )
        return found

    def ink_of_chart() -> str:
        found: str = browser.execute_script(
            "return getComputedStyle(document.querySelector('svg text')).fill"
        )
        return found

    show(browser, one)
    light, light_chart = paper(), ink_of_chart()
    switch = browser.find_element(By.ID, "theme")
    assert switch.get_attribute("aria-pressed") == "false"
    switch.click()
    dark = paper()
    assert dark != light
    assert ink_of_chart() != light_chart
    assert switch.get_attribute("aria-pressed") == "true"
    browser.refresh()
    assert paper() == dark
    browser.find_element(By.ID, "theme").click()
    assert paper() == light
    show(browser, one, dark=True)
    assert paper() == dark


def test_a_heading_sorts_its_column_by_value_and_says_so(browser: Browser, many: Path) -> None:
    show(browser, many)
    heading = browser.find_elements(By.CSS_SELECTOR, "#models thead th")[1]
    button = heading.find_element(By.TAG_NAME, "button")
    assert button.text == "perplexity"
    before = [row[0] for row in table(browser, "#models")]
    assert heading.get_attribute("aria-sort") is None
    button.send_keys("\n")  # from the keyboard
    ascending = [row[0] for row in table(browser, "#models")]
    assert heading.get_attribute("aria-sort") == "ascending"
    # As text, 113.1 would come before 16.8 and 9.5.
    assert [name.removesuffix("dominated") for name in ascending] == [
        *("structured:0.2", "dense", "2:4", "unstructured:0.5")
    ]
    assert ascending != before
    button.click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert [row[0] for row in table(browser, "#models")] == ascending[::-1]
    name = browser.find_elements(By.CSS_SELECTOR, "#models thead button")[0]
    name.click()
    assert heading.get_attribute("aria-sort") is None
    assert [row[0] for row in table(browser, "#models")] == sorted(ascending)


@pytest.mark.parametrize("name", ["one", "many", "hostile"])
def test_nothing_sticks_out_of_a_phone(
    name: str, browser: Browser, request: pytest.FixtureRequest
) -> None:
    show(browser, request.getfixturevalue(name), width=375)
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert browser.execute_script("return document.documentElement.scrollWidth") == 375


def test_a_hostile_name_is_shown_and_not_run(browser: Browser, hostile: Path) -> None:
    show(browser, hostile)
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert browser.title.startswith(HOSTILE)
    assert HOSTILE in browser.find_element(By.TAG_NAME, "h1").text
    quotes = [quote.text for quote in browser.find_elements(By.TAG_NAME, "blockquote")]
    assert quotes == [HOSTILE, HOSTILE_LINES, HOSTILE] * 2
    assert HOSTILE in browser.find_element(By.CSS_SELECTOR, ".environment").text
    labels = "".join(
        browser.execute_script(
            "return [...document.querySelectorAll('svg text')].map((text) => text.textContent)"
        )
    )
    assert f"2:4 fp32 thanos …{HOSTILE[-15:]}" in labels  # with its mathematics as text
    assert not browser.find_elements(By.CSS_SELECTOR, "img, iframe, body script:not(:last-child)")
    assert "<img" not in hostile.read_text()
    assert html.escape("<img src=x onerror=alert(1)>") in hostile.read_text()


def test_every_table_has_a_caption_and_every_cell_its_heading(browser: Browser, one: Path) -> None:
    show(browser, one)
    bare: list[Any] = browser.execute_script(
        "return [...document.querySelectorAll('table')].filter((table) => !table.caption"
        " || [...table.querySelectorAll('th')].some((th) => !th.scope)"
        " || [...table.tBodies[0].rows].some((row) => row.cells[0].tagName !== 'TH'))"
    )
    assert bare == []
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('svg')].filter((svg) =>"
        " svg.getAttribute('role') !== 'img' || !svg.querySelector(':scope > title')?.textContent)"
    )
    assert unnamed == []
    twice = browser.execute_script(
        "const ids = [...document.querySelectorAll('[id]')].map((node) => node.id);"
        "return ids.filter((id, index) => ids.indexOf(id) !== index)"
    )
    assert twice == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_background(dark: bool, browser: Browser, one: Path) -> None:
    """Contrast as WCAG 2 defines it: 4.5 to 1 at least."""
    show(browser, one, dark=dark)
    colours = browser.execute_script(
        "const style = getComputedStyle(document.documentElement);"
        "return Object.fromEntries(['ink', 'muted', 'accent', 'alarm', 'paper', 'panel',"
        " 'alarm-paper'].map((name) => [name, style.getPropertyValue('--' + name).trim()]))"
    )
    for ink, paper in (
        *(("ink", paper) for paper in ("paper", "panel")),
        *(("muted", paper) for paper in ("paper", "panel")),
        *(("accent", paper) for paper in ("paper", "panel")),
        *(("alarm", paper) for paper in ("paper", "alarm-paper")),
    ):
        bright, dim = sorted((_luminance(colours[ink]), _luminance(colours[paper])), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (ink, paper)


def test_models_that_are_folded_on_screen_are_printed(browser: Browser, many: Path) -> None:
    show(browser, many, dark=True)
    browser.print_page()
    folded = browser.execute_script(
        "return document.querySelectorAll('details.model:not([open])').length"
    )
    assert folded == 0


def _luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb; WCAG 2."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4))
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_no_name_in_the_picture_of_all_models_overlaps_another_one(
    browser: Browser, crowd: Path
) -> None:
    show(browser, crowd)
    names: list[Any] = browser.execute_script(
        """return [...document.querySelectorAll("svg")]
        .find((svg) => svg.textContent.startsWith("Perplexity against"))
        .querySelectorAll("text").values()
        .map((text) => [text.textContent, text.getBoundingClientRect()])
        .filter(([name]) => name.startsWith("2:4 ") || name === "dense")
        .map(([name, box]) => [name, box.left, box.top, box.right, box.bottom]).toArray()"""
    )
    panels = len(report_beside(crowd)["pareto"])
    assert len(names) == panels * 13
    assert len({name for name, *_ in names}) == 13
    for one, other in combinations([Box(*box) for _, *box in names], 2):
        assert not one.overlaps(other)
