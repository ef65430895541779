"""Pages in a real browser: phone and desk, light and dark, on paper, without a network, and for who does not see."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modelpress.page import render, report_page
from modelpress.page.compare import comparison_page, read_comparison
from modelpress.page.fleet import fleet_page, read_fleet
from modelpress.store import open_store
from tests.browsers import PATIENCE_MILLISECONDS, chromium
from tests.page.registers import registry
from tests.page.stories import HOSTILE, NAME, publish_story, told

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SERIOUS = ("serious", "critical")
KINDS = ["report", "compare", "fleet", "registry", "hostile"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind on the disk."""
    folder = tmp_path_factory.mktemp("browser")
    store, hostile = open_store(str(folder / "store")), open_store(str(folder / "hostile"))
    story = told(store, folder / "shards")
    other = publish_story(store, folder / "other", seed=2)
    publish_story(
        store, folder / "model", name="a-model-with-a-name-as-long-as-names-may-be-in-a-store-0123456", seed=4
    )
    compared = read_comparison(store, (NAME, str(story.pack)), (NAME, other))
    pages = {
        "report": report_page(story),
        "compare": comparison_page(compared[0], story, compared[2]),
        "fleet": fleet_page(read_fleet(store)),
        "registry": fleet_page(read_fleet(store), registry(read_fleet(store))),
        "hostile": report_page(told(hostile, folder / "words", word=HOSTILE)),
    }
    for kind, page in pages.items():
        (folder / f"{kind}.html").write_text(render(page), encoding="utf-8")
    return {kind: folder / f"{kind}.html" for kind in pages}


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page on which nothing is said, and that asks for nothing but its own file."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE_MILLISECONDS)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    assert said == []
    assert len(asked) == 1
    assert asked[0].startswith("file://")
    page.close()


def shoot(page: Page, name: str) -> None:
    """For people who look: MODELPRESS_TEST_SCREENSHOTS names a folder."""
    if folder := os.environ.get("MODELPRESS_TEST_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"page-{name}.png", full_page=True)


def axe(page: Page) -> list[str]:
    """What axe-core finds, of the serious kinds."""
    script = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    page.evaluate(script)  # by the debugger, which the page's policy does not bind
    found: dict[str, Any] = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
    assert found["passes"], "it looked"
    return [
        f"{one['id']}: {node['html'][:200]}"
        for one in found["violations"]
        if one["impact"] in SERIOUS
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_it_fits_and_everybody_can_read_it(page: Page, files: dict[str, Path], kind: str) -> None:
    page.goto(files[kind].as_uri())
    page.evaluate("() => document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("() => document.documentElement.scrollWidth") <= width
            shoot(page, f"{kind}-{width}-{scheme}")
        assert axe(page) == []
    assert page.evaluate("() => window.hacked") is None


def test_names_in_plots_do_not_leave_them(page: Page, files: dict[str, Path]) -> None:
    page.set_viewport_size({"width": 390, "height": 900})
    page.goto(files["hostile"].as_uri())
    outside = page.evaluate("""() => [...document.querySelectorAll('svg.plot')].flatMap((plot) => {
        const frame = plot.getBoundingClientRect();
        return [...plot.querySelectorAll('text')].filter((text) => {
          const box = text.getBoundingClientRect();
          return box.left < frame.left - 2 || box.right > frame.right + 2;
        }).map((text) => text.textContent);
    })""")
    assert outside == []
    small = page.evaluate("""() => [...document.querySelectorAll('svg.plot text')]
        .map((text) => parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getBoundingClientRect().width
          / text.ownerSVGElement.viewBox.baseVal.width)""")
    assert min(small) >= 8.5, "it can be read on a phone"


BROKEN = {
    "html-has-lang": ('<html lang="en">', "<html>"),
    "color-contrast": ("--muted: #525a63", "--muted: #c8ccd0"),
    "scrollable-region-focusable": ('role="region" tabindex="0"', 'role="region"'),
}
"""What of a page is changed, so that axe finds something serious: by the rule that must find it."""


@pytest.mark.parametrize("rule", BROKEN)
def test_who_looks_would_see_it(page: Page, files: dict[str, Path], tmp_path: Path, rule: str) -> None:
    whole = files["fleet"].read_text(encoding="utf-8")
    assert BROKEN[rule][0] in whole
    (tmp_path / "broken.html").write_text(whole.replace(*BROKEN[rule]), encoding="utf-8")
    page.set_viewport_size({"width": 390, "height": 900})
    page.goto((tmp_path / "broken.html").as_uri())
    assert {found.partition(":")[0] for found in axe(page)} == {rule}


A4 = {"width": 703, "height": 1040}
"""Pixels of the paper within margins of 12 millimetres."""
BEYOND = """(width) => [...document.querySelectorAll('h1, h2, p, table, svg.plot, pre, dl, figcaption')]
    .filter((one) => one.checkVisibility() && !one.closest('.unseen') && one.getBoundingClientRect().right > width + 1)
    .map((one) => `${one.tagName} ${one.textContent.trim().slice(0, 60)}`)"""
FAINT = """() => {
    const light = (colour) => colour.match(/[0-9.]+/g).slice(0, 3).map((part) => part / 255)
        .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
    return [...document.querySelectorAll('h1, h2, p, th, td, dt, dd, figcaption, svg.plot text')]
        .filter((one) => one.checkVisibility() && one.textContent.trim())
        .map((one) => [one, getComputedStyle(one)[one.tagName === 'text' ? 'fill' : 'color']])
        .filter(([, colour]) => 1.05 / (light(colour) + 0.05) < 4.5)
        .map(([one, colour]) => `${colour}: ${one.textContent.trim().slice(0, 60)}`);
}"""


@pytest.mark.parametrize("kind", ["report", "registry"])
def test_it_prints(page: Page, files: dict[str, Path], kind: str) -> None:
    page.goto(files[kind].as_uri())
    page.set_viewport_size(A4)  # type: ignore[arg-type]
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(BEYOND, A4["width"]) == [], "nothing is cut off by the edge of the paper"
    assert page.evaluate(FAINT) == [], "all can be read on white"
    assert page.locator("nav").is_hidden()
    titles = page.locator("h2").all_inner_texts()
    assert len(titles) > 2
    shoot(page, f"{kind}-print")
    page.emulate_media()
    paper = {"format": "A4", "margin": dict.fromkeys(("top", "right", "bottom", "left"), "12mm"), "outline": True}
    data = page.pdf(**paper, tagged=True)  # type: ignore[arg-type]
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 25
    for title in titles:
        spelled = {title.encode("latin-1", "replace"), title.encode("utf-16-be").hex().upper().encode()}
        assert any(one in data for one in spelled), f"{title!r} is in the outline of the file"
    if folder := os.environ.get("MODELPRESS_TEST_SCREENSHOTS"):
        (Path(folder) / f"page-{kind}.pdf").write_bytes(data)


def test_a_keyboard_reaches_what_is_closed_and_what_scrolls(page: Page, files: dict[str, Path]) -> None:
    page.set_viewport_size({"width": 390, "height": 900})
    page.goto(files["report"].as_uri())
    page.locator("nav a").first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("() => location.hash") == "#way"
    summary = page.locator("summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("details[open]").count() == 1
    region = page.get_by_role("region", name="Stages in the order of the line: quality and bytes")
    region.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.activeElement.scrollLeft > 0")
