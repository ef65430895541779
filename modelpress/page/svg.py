"""Plots by matplotlib as SVG inside a page: real text, the page's colours, ids of their own.

matplotlib writes a file of its own; what is put into the page is that file parsed and written again, with the few
elements and attributes that are wanted. Colours are marks that become CSS variables, so that a plot follows the
page into the dark and onto paper. No text in a plot is read as a formula.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modelpress.page.words import clean

WIDTH = 4.6
"""Inches of 72 pixels: the narrowest column that a page has, on a phone."""
INK, MUTED, GRID, PAPER = "#010101", "#010102", "#010103", "#010104"
SERIES = ("#010110", "#010111", "#010112", "#010113", "#010114", "#010115")
CHOSEN, GOOD, BAD = "#010120", "#010121", "#010122"
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    PAPER: "var(--paper)",
    CHOSEN: "var(--bad)",
    GOOD: "var(--good)",
    BAD: "var(--bad)",
    **{mark: f"var(--c{place})" for place, mark in enumerate(SERIES)},
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.usetex": False,
    "font.family": "DejaVu Sans",  # what matplotlib brings: the same layout everywhere
    "font.size": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 10,
    "legend.fontsize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "path.simplify": True,
}
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_DRAWING = threading.Lock()  # matplotlib's settings are the process's
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_LONG = re.compile(r"-?\d+\.\d{3,}")
_FONT = re.compile(r"font:[^;]*?([\d.]+)px[^;]*")
_FAMILY = re.compile(r"font-family:[^;]*(;\s*|$)")
_USED = re.compile(r"#([\w-]+)")


def plot(key: str, alt: str, paint: Callable[[Axes], None], *, height: float = 2.9, width: float = WIDTH) -> Markup:
    """Draw into one pair of axes.

    Args:
        key: of the figure in the page; its ids begin with it.
        alt: what the plot shows, for who does not see it.
        paint: draws; colours are the marks above, and strings in it are plain text.
        height: inches.
        width: inches.

    Returns:
        An `svg` element to be put into HTML; the same for the same input.
    """
    buffer = io.BytesIO()
    # A letter that the font lacks is drawn by the browser, which has others: no reason to warn.
    with _DRAWING, mpl.rc_context({**STYLE, "svg.hashsalt": key}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.subplots())
        figure.savefig(buffer, format="svg", metadata=NO_METADATA)
    return Markup(_inline(buffer.getvalue(), key, clean(alt)))


def _inline(document: bytes, key: str, alt: str) -> str:
    """matplotlib's file as an element of a page."""
    root = ET.fromstring(document)
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        node.attrib = {name.rpartition("}")[2]: value for name, value in node.attrib.items()}
    _drop(root, {"metadata", "style", "title"})
    used = {found[1] for node in root.iter() for value in node.attrib.values() for found in _USED.finditer(value)}
    for node in root.iter():
        _rewrite(node, key, used)
    title = ET.Element("title", {"id": f"{key}-title"})
    title.text = alt
    root.insert(0, title)
    root.attrib = {"viewBox": root.attrib["viewBox"], "class": "plot", "role": "img", "aria-labelledby": f"{key}-title"}
    return ET.tostring(root, encoding="unicode")


def _drop(root: ET.Element, tags: set[str]) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in tags:
                parent.remove(child)


def _rewrite(node: ET.Element, key: str, used: set[str]) -> None:
    attributes = {}
    for name, value in node.attrib.items():
        if name == "id":
            if value in used:
                attributes[name] = f"{key}-{value}"
        elif name == "href":
            attributes[name] = f"#{key}-{value.removeprefix('#')}"
        elif name == "style":
            attributes[name] = _themed(_FAMILY.sub("", _FONT.sub(r"font-size: \1px", value))).replace(
                "url(#", f"url(#{key}-"
            )
        elif name == "clip-path":
            attributes[name] = value.replace("url(#", f"url(#{key}-")
        else:
            attributes[name] = _LONG.sub(_rounded, value)
    node.attrib = attributes
    if not (node.text or "").strip():
        node.text = None
    if not (node.tail or "").strip():
        node.tail = None


def _themed(style: str) -> str:
    return _COLOUR.sub(lambda found: VARIABLES.get(found[0], found[0]), style)


def _rounded(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")
