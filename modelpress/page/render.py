"""From a page's parts to HTML: one template, everything escaped."""

from __future__ import annotations

import functools
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from modelpress.page.parts import Page
from modelpress.page.words import clean


def render(page: Page) -> str:
    """The whole page; the same page gives the same text."""
    return _environment().get_template("page.html").render(page=page)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("modelpress.page", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_cleaned,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["mood"] = _mood
    return environment


def _cleaned(value: Any) -> Any:
    """Without letters that nobody sees: they could make a text look like another."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _mood(text: str) -> str:
    """The class of a word that says how something went."""
    return {"pass": "good", "fail": "bad", "missing": "bad", "inconclusive": "open"}.get(text, "")
