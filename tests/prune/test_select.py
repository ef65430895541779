"""Patterns choose modules; one that chooses nothing is an error that names what is near."""

from __future__ import annotations

import pytest

from modelpress.errors import ConfigError
from modelpress.prune.select import select

NAMES = ["encoder.layer.0.output.dense", "encoder.layer.1.output.dense", "encoder.layer.10.output.dense", "head"]


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        ([], [], NAMES),
        (["encoder.layer.*.output.dense"], [], NAMES[:3]),
        (["encoder.layer.1"], [], NAMES[1:2]),
        (["encoder"], ["encoder.layer.1?"], NAMES[:2]),
        ([], ["head"], NAMES[:3]),
    ],
)
def test_patterns_choose(targets: list[str], ignore: list[str], expected: list[str]) -> None:
    assert select(NAMES, targets, ignore) == expected


@pytest.mark.parametrize("option", ["targets", "ignore"])
def test_a_pattern_without_a_match_names_its_neighbours(option: str) -> None:
    patterns = {"targets": [], "ignore": [], option: ["encoder.layer.0.ouput.dense"]}
    with pytest.raises(ConfigError, match=rf"prune\.{option}(.|\n)*encoder\.layer\.0\.output\.dense"):
        select(NAMES, **patterns)
