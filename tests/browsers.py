"""Debian's Chromium, without a window."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests import apt

if TYPE_CHECKING:
    from playwright.sync_api import Browser

OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
PATIENCE_MILLISECONDS = 30_000


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; the test is skipped, with the reason, where none can be had."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed; the dev extra brings it")
    if shutil.which("chromium") is None and (why := apt.install("chromium")):
        pytest.skip(f"Chromium is not installed, and can't be: {why}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=OPTIONS)
        yield browser
        browser.close()
