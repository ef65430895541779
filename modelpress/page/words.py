"""Numbers and names as people read them. What was not measured is said to be so, and is never 0."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from modelpress.reports import QualityReport

UNMEASURED = "not measured"
REPLACED = "\ufffd"
MOST_LETTERS = 300
"""Of a text in a table's cell."""
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_LAYER = re.compile(r"^(.*?[._/](?:\d+))(?=[._/]|$)")


def clean(text: str) -> str:
    """The text without what a reader cannot see: control letters, and those that turn the direction of writing."""
    return "".join(
        letter if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs") else REPLACED
        for letter in text
    )


def short(text: str, most: int = 28) -> str:
    """The text in at most so many letters, without its middle where it is longer: names of layers end in what they
    are."""
    flat = " ".join(clean(text).split())
    if len(flat) <= most:
        return flat
    head = (most - 1) // 3
    return f"{flat[:head]}…{flat[len(flat) - (most - 1 - head) :]}"


def cut(text: str, most: int = MOST_LETTERS) -> str:
    """The beginning of a long text."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def exact_bytes(size: float | None) -> str:
    """`1,234,567`."""
    return f"{size:,.0f}" if size is not None else UNMEASURED


def size(count: float | None) -> str:
    """Three digits in decimal units: `1.23 MB`."""
    if count is None:
        return UNMEASURED
    for unit, name in _UNITS:
        if abs(count) >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def time(seconds: float | None) -> str:
    """Three digits, in the unit that fits: `1.23 ms`."""
    if seconds is None:
        return UNMEASURED
    if seconds >= 120:
        return f"{seconds / 60:,.1f} min"
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"


def rate(per_second: float | None) -> str:
    """`12,300/s`."""
    if per_second is None:
        return UNMEASURED
    return f"{per_second:,.0f}/s" if per_second >= 100 else f"{per_second:.3g}/s"


def number(value: float | None, unit: str = "") -> str:
    """Four digits, whole numbers whole."""
    if value is None or not math.isfinite(value):
        return UNMEASURED if value is None else str(value)
    text = f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"
    return f"{text} {unit}".strip()


def ratio(above: float | None, below: float | None) -> str:
    """`12.3×`."""
    return f"{above / below:.2f}×" if above is not None and below else UNMEASURED


def quality(found: QualityReport | None) -> str:
    """`0.9833 [0.972, 0.990]`, and what people know it as."""
    if found is None:
        return UNMEASURED
    shown = "".join(f", {name} {value:.4g}" for name, value in found.shown.items())
    return f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]{shown}"


def difference(found: QualityReport | None) -> str:
    """`−0.0021 [−0.0080, +0.0038]`, against the source model."""
    if found is None or found.difference is None:
        return UNMEASURED
    if found.difference_low is None or found.difference_high is None:
        return f"{found.difference:+.4f}"
    return f"{found.difference:+.4f} [{found.difference_low:+.4f}, {found.difference_high:+.4f}]"


def shape(sizes: Sequence[int]) -> str:
    """`3×64×64`."""
    return "×".join(map(str, sizes)) or "scalar"


def bits(size_bytes: float, weights: float) -> str:
    """Bits per weight, or a dash where there is none."""
    return f"{8 * size_bytes / weights:.3f}" if weights else "–"


def layer_of(name: str) -> str:
    """The layer that a tensor or a node belongs to: its name up to the first number in it (`encoder.layer.3`), or
    without its last part (`conv1` of `conv1.weight`)."""
    found = _LAYER.match(name)
    if found:
        return found[1]
    head, dot, _ = name.rpartition(".")
    return head if dot and head else name
