"""The status page in a real browser, over a real server: keys, clicks, hostile words, a phone, the dark, a keyboard."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modelpress import pointer
from modelpress.access import add_key
from modelpress.canary import log as canary
from modelpress.store import Store, open_store
from tests.browsers import PATIENCE_MILLISECONDS, chromium
from tests.canary.states import config, state
from tests.serving.conftest import Server, publish_pack, scale_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Call = Callable[..., Any]
HOSTILE = "<img src=x onerror='window.hacked=1'><script>window.hacked=2</script>\u202e\"'&"
LONG = "a-model-with-a-name-as-long-as-names-may-be-in-a-store-0123456"
HALF = {"mode": "canary", "share": 0.5}
DECISION = {
    "promote": True,
    "verdict": "pass",
    "checks": [
        {"name": "quality against the champion", "verdict": "pass", "reason": "0.981 against 0.979, margin 0.01"},
        {"name": HOSTILE, "verdict": "inconclusive", "reason": HOSTILE},
    ],
}
CONTRAST = """
() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((one) => one / 255)
    .map((one) => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, index) => sum + one * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const node of document.body.querySelectorAll("*")) {
    const own = [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
    if (!own || !node.checkVisibility() || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(node.tagName)) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(node.outerHTML.slice(0, 100));
  }
  return poor;
}
"""


@dataclass
class House:
    server: Server
    store: Store
    packs: list[str]
    keys: dict[str, str]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("status")
    store = open_store(str(folder / "store"))
    packs = [publish_pack(store, folder / str(i), scale_model(float(i)), "scale", alias=None) for i in (1, 2, 3)]
    for pack in packs:
        pointer.append(store, "scale", "champion", pack, "promote", DECISION, by=HOSTILE)
    first, second = (publish_pack(store, folder / str(i), scale_model(float(i)), LONG, alias=None) for i in (4, 5))
    pointer.append(store, LONG, "champion", first, "promote")
    canary.write(store, LONG, state(0, config(HALF), candidate=second, champion=first), 0, first)
    keys = {scope: add_key(folder / "keys.json", scope, [scope], None) for scope in ("metrics", "promote", "infer")}
    environment = {"MODELPRESS_SERVING_KEYS_FILE": str(folder / "keys.json"), "MODELPRESS_SERVING_ROLLBACK": "true"}
    server = Server(store, **environment)
    yield House(server, store, packs, keys)
    server.stop()


@pytest.fixture
def page(browser: Browser, house: House) -> Iterator[Page]:
    """The page, and nothing said on its console, and nobody asked but the server."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE_MILLISECONDS)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{house.server.url}/status")
    yield page
    assert not [text for text in said if "status of 40" not in text], "a refusal is the browser's own line"
    assert all(url.startswith((f"{house.server.url}/status", f"{house.server.url}/v2/")) for url in asked)
    page.close()


def enter(page: Page, key: str) -> None:
    page.get_by_label("Key").fill(key)
    page.get_by_label("Key").press("Enter")


def shoot(page: Page, name: str) -> None:
    """For people who look: MODELPRESS_TEST_SCREENSHOTS names a folder."""
    if folder := os.environ.get("MODELPRESS_TEST_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"status-{name}.png", full_page=True)


def test_without_a_key_it_shows_nothing_and_says_what_it_wants(page: Page, house: House) -> None:
    page.get_by_text("A key with the scope metrics, promote or admin").wait_for()
    assert "scale" not in page.locator("#models").inner_text()
    enter(page, "mpk_wrong")
    page.get_by_text("This key does not count.").wait_for()
    enter(page, house.keys["infer"])
    page.get_by_text("expected metrics or admin or promote").wait_for()
    assert page.locator("#models li").count() == 0
    shoot(page, "closed")


def test_a_watcher_sees_everything_and_moves_nothing(page: Page, house: House) -> None:
    enter(page, house.keys["metrics"])
    card = page.locator("li[data-model=scale]")
    card.get_by_text(house.packs[-1]).wait_for()
    assert card.get_by_text("READY").is_visible()
    assert card.get_by_text("pass", exact=True).first.is_visible()
    assert page.get_by_text("store answers").is_visible()
    page.locator(f"li[data-model={LONG}]").get_by_text("50.0 % of requests, step 1 of 1").wait_for()
    assert page.get_by_role("button", name="Roll back").count() == 0
    kept = page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie, location.href]")
    assert kept == [0, 0, "", f"{house.server.url}/status"]
    assert page.get_by_label("Key").input_value() == "", "who looks over a shoulder sees none"
    page.reload()
    page.get_by_text("A key with the scope").wait_for()


def test_hostile_words_are_words(page: Page, house: House) -> None:
    enter(page, house.keys["metrics"])
    page.get_by_text("2 checks").click()
    shown = HOSTILE.replace("\u202e", "\ufffd")
    page.get_by_text(f"{shown}: {shown}").wait_for()
    assert page.evaluate("() => window.hacked") is None
    assert page.locator("main img, main script").count() == 0
    assert page.get_by_text(f"by {shown} by").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_a_phone_and_can_be_read(page: Page, house: House, scheme: Any, width: int) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    enter(page, house.keys["promote"])
    page.get_by_text("2 checks").click()
    page.get_by_role("button", name="Roll back scale").wait_for()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRAST) == []
    shoot(page, f"{width}-{scheme}")
    page.get_by_role("button", name="Roll back scale").click()
    page.get_by_role("button", name="Leave it").wait_for()
    assert page.evaluate(CONTRAST) == []
    shoot(page, f"{width}-{scheme}-sure")
    for box in page.locator("button:visible").all():
        bounds = box.bounding_box()
        assert bounds is not None
        assert min(bounds["width"], bounds["height"]) >= 44, "a thumb hits it"


def test_everything_has_a_name_and_a_keyboard_is_enough(page: Page, house: House) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.id") == "key"
    page.keyboard.type(house.keys["promote"])
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "Look"
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Roll back scale").wait_for()
    names = page.evaluate(
        "() => [...document.querySelectorAll('button, input, dialog')].map((one) => one.ariaLabel || "
        "(one.labels && one.labels[0] && one.labels[0].textContent) || one.textContent)"
    )
    assert all(name.strip() for name in names)
    assert page.evaluate("() => document.documentElement.lang") == "en"
    levels = page.evaluate("() => [...document.querySelectorAll('h1, h2')].map((one) => one.tagName)")
    assert levels[0] == "H1"
    assert page.get_by_role("status").count() == 1
    page.get_by_role("button", name="Roll back scale").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.id") == "no", "what does nothing has the focus"
    assert page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Escape")
    assert not page.locator("#sure").is_visible()
    assert page.evaluate("() => document.activeElement.ariaLabel") == "Roll back scale", "it is where it was"


def test_a_rollback_by_clicks(page: Page, house: House) -> None:
    """The last test: it moves the pointer."""
    _, second, third = house.packs
    enter(page, house.keys["promote"])
    button = page.get_by_role("button", name="Roll back scale")
    button.click()
    page.get_by_text(f"Roll back scale@champion from pack {third[:12]}").wait_for()
    page.get_by_role("button", name="Leave it").click()
    entry = pointer.current(house.store, "scale", "champion")
    assert entry is not None
    assert entry.pack == third
    button.click()
    page.locator("#yes").click()
    page.get_by_text(f"scale is back at pack {second[:12]}").wait_for()
    page.locator("li[data-model=scale]").get_by_text(second).wait_for()
    entry = pointer.current(house.store, "scale", "champion")
    assert entry is not None
    assert (entry.pack, entry.reason) == (second, "rollback")
    assert entry.who.startswith("promote (key ")
    headers = {"Authorization": f"Bearer {house.keys['infer']}"}
    assert house.server.client.get("/v2/models/scale", headers=headers).json()["versions"] == [second]
    shoot(page, "rolled-back")
