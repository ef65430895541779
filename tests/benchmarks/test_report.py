"""The rows, the table and the command line that all benchmarks share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import _report
from benchmarks._report import Row, main, shown, table

ROWS = [
    Row("bf16", "modelpress", "ratio", "", 1.50449),
    Row("bf16", "modelpress", "decode", "GB/s", 3.0),
    Row("bf16", "peer (not installed)", "ratio", "", None),
]


def measure(quick: bool) -> Iterator[Row]:
    yield from ROWS[: 1 if quick else None]


def test_systems_go_down_and_metrics_across() -> None:
    assert table(ROWS).splitlines() == [
        "| system | ratio | decode, GB/s |",
        "|---|---:|---:|",
        "| modelpress | 1.504 | 3 |",
        "| peer (not installed) | not measured |  |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12345.0, "12 345"), (0.012345, "0.01235"), (98765.4, "98 765"), (None, "not measured")],
)
def test_figures_are_rounded_for_reading(value: float | None, text: str) -> None:
    assert shown(value) == text


def test_json_has_every_row_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main("codecs", measure, ["--json", str(tmp_path / "new" / "rows.json")])
    rows = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert rows == [row._asdict() for row in ROWS]
    assert set(rows[0]) == {"case", "system", "metric", "unit", "value"}
    assert "| modelpress | 1.504 | 3 |" in capsys.readouterr().out


def test_a_kept_page_says_how_to_repeat_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_report, "RESULTS", tmp_path)
    main("codecs", measure, ["--quick", "--write", "--hardware", "big-box"])
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("codecs_big-box_")
    assert "`python -m benchmarks.codecs --quick` on big-box" in path.read_text()
