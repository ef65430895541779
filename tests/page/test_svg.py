"""Plots inside a page: well-formed, themed, the same each time, and plain text whatever stands in a name."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from markupsafe import Markup

from modelpress.page.plots import Dot, Spot, dots, grids, scatter, waterfall
from modelpress.page.words import size
from tests.page.stories import HOSTILE

ROWS = [HOSTILE, "$\\alpha$ url(#x)", "层.0\x00\x1b", "long." * 40]


def drawn(key: str = "k") -> dict[str, Markup]:
    values = {HOSTILE: [Dot(row, 0.1 * number + 0.1, 0.05, 0.9) for number, row in enumerate(ROWS)]}
    steps = [(row, 100.0 / (number + 1)) for number, row in enumerate(ROWS)]
    spots = {HOSTILE: [Spot(1.0, 2.0, HOSTILE), Spot(10.0, 0.0, "$")]}
    return {
        "dots": dots(key, HOSTILE, ROWS, values, unit=HOSTILE, log=True, line=(0.5, HOSTILE)),
        "waterfall": waterfall(key, HOSTILE, steps, size),
        "scatter": scatter(
            key, HOSTILE, spots, (HOSTILE, Spot(3.0, 1.0)), axes_named=(HOSTILE, "y"), logs=(True, True)
        ),
        "grids": grids(key, HOSTILE, [(HOSTILE, [[1.0, -1.0], [0.0, 0.5]]), ("b", [[0.2, 0.1], [0.3, -0.5]])]),
    }


@pytest.fixture(scope="module")
def plots() -> dict[str, Markup]:
    return drawn()


def test_names_are_text_and_nothing_else(plots: dict[str, Markup]) -> None:
    for svg in plots.values():
        root = ET.fromstring(svg)
        tags = {node.tag for node in root.iter()}
        assert tags <= {"svg", "title", "g", "path", "defs", "use", "text", "clipPath", "rect"}
        attributes = {name for node in root.iter() for name in node.attrib}
        assert not [name for name in attributes if name.startswith("on")]
        assert "\u202e" not in svg
        assert "\x1b" not in svg
        assert "<script" not in svg
    assert any("$\\alpha$" in text for text in ET.fromstring(plots["dots"]).itertext()), "no formula was made of it"


def test_colours_are_the_pages_and_text_is_text(plots: dict[str, Markup]) -> None:
    for svg in plots.values():
        root = ET.fromstring(svg)
        styles = " ".join(node.attrib.get("style", "") for node in root.iter())
        assert "var(--" in styles
        assert not re.findall(r"#(?!000000)[0-9a-f]{6}", styles), "a colour that the dark does not know"
        assert "font-family" not in styles
        assert [node for node in root.iter("text") if node.text]
        assert root[0].tag == "title"
        assert root.attrib["aria-labelledby"] == root[0].attrib["id"]


def test_ids_are_of_the_figure_and_each_reference_has_one(plots: dict[str, Markup]) -> None:
    for svg in plots.values():
        root = ET.fromstring(svg)
        ids = [node.attrib["id"] for node in root.iter() if "id" in node.attrib]
        assert len(ids) == len(set(ids))
        assert all(one.startswith("k-") for one in ids)
        names = [value for node in root.iter() for name, value in node.attrib.items() if name in ("href", "clip-path")]
        assert names
        assert {name.removeprefix("url(").removesuffix(")").removeprefix("#") for name in names} <= set(ids)


def test_the_same_plot_is_the_same_text(plots: dict[str, Markup]) -> None:
    assert drawn() == plots
    assert drawn("other")["dots"] != plots["dots"]


def test_a_plot_without_a_value_that_fits_is_empty_and_no_error() -> None:
    assert "<svg" in dots("e", "nothing", ["a"], {"s": [Dot("a", 0.0)]}, unit="u", log=True)
    assert "<svg" in scatter("e", "nothing", {"s": []}, None, axes_named=("x", "y"))
    assert "<svg" in waterfall("e", "nothing", [("a", 0.0), ("b", 0.0)], size)
