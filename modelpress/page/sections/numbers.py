"""Every single number and word of the stages' reports, for who looks for one that has no plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from modelpress.page import words
from modelpress.page.parts import Section, Table, listed
from modelpress.page.story import QUALITY, Story

LISTED = 120
"""Rows of a stage."""
DEEPEST = 8
"""Levels that are followed: a record may nest as deep as it likes."""


def section(story: Story) -> Section | None:
    """A closed table for each stage; lists, which are as long as the model has layers, are counted."""
    told = {stage.stage: stage.report for stage in story.stages if stage.report}
    if not told:
        told = {stage: dict(found) for stage, found in story.numbers.items() if not stage.startswith(QUALITY)}
    tables = [_table(stage, found) for stage, found in told.items()]
    tables = [table for table in tables if table.rows]
    if not tables:
        return None
    return Section(key="numbers", title="All numbers, stage by stage", tables=tables)


def _table(stage: str, found: Mapping[str, Any]) -> Table:
    rows = [[words.cut(name, 120), words.cut(said)] for name, said in _leaves(found)]
    return listed(words.cut(stage, 80), ["field", "value"], rows, LISTED, frozenset({1}), folded=True)


def _leaves(found: Mapping[str, Any], prefix: str = "", deep: int = 0) -> Iterator[tuple[str, str]]:
    """Dotted path and text of each value."""
    for key, value in found.items():
        if isinstance(value, Mapping) and deep < DEEPEST:
            yield from _leaves(value, f"{prefix}{key}.", deep + 1)
        elif isinstance(value, Mapping):
            yield f"{prefix}{key}", f"{len(value):,} fields"
        elif isinstance(value, list):
            plain = len(value) <= 8 and not any(isinstance(one, list | Mapping) for one in value)
            yield f"{prefix}{key}", ", ".join(map(str, value)) if plain else f"{len(value):,} entries"
        elif isinstance(value, float):
            yield f"{prefix}{key}", f"{value:.6g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{prefix}{key}", f"{value:,}"
        elif value is not None and value != "":
            yield f"{prefix}{key}", str(value)
