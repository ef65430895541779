"""`variants` as a user meets it, up to where runs begin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelpress import errors
from tests.cli.conftest import Run

RECIPE = """
name: small
workload: {kind: image-classification, model: digits-cnn, data: digits}
quantize: {method: dynamic}
"""
GRID = """
grid: {prune.sparsity: [0.25, 0.5]}
workers: 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture
def grid(tmp_path: Path) -> str:
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    return str(path)


def test_a_dry_run_shows_what_would_run_and_options_stand_above_the_file(recipe: str, grid: str, run: Run) -> None:
    code, out, _ = run("variants", recipe, "--grid", grid, "--set", "quantize.smooth=0,0.5", "--dry-run", "--json")
    assert code == 0
    rows = json.loads(out)
    assert [row["what"] for row in rows] == [
        "up to source, for 4",
        "up to export, for 2",
        "prune.sparsity=0.25, quantize.smooth=0",
        "prune.sparsity=0.25, quantize.smooth=0.5",
        "up to export, for 2",
        "prune.sparsity=0.5, quantize.smooth=0",
        "prune.sparsity=0.5, quantize.smooth=0.5",
    ]
    assert [row["after"] for row in rows] == ["–", "0", "1", "1", "0", "4", "4"]
    code, out, _ = run("variants", recipe, "--grid", grid, "--dry-run")
    assert code == 0
    assert "2 variants in 3 runs" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "variants need a grid"),
        (["--set", "prune.sparsty=0.5"], "prune.sparsty: unknown field"),
        (["--set", "sparsity"], "reading --set 'sparsity'"),
        (["--set", "export.opset=18", "--set", "export.opset=19"], "export.opset twice"),
        (["--set", "export.opset=18,18"], "the same recipe twice"),
        (["--grid", "none.yaml"], "reading config none.yaml"),
        (["--set", "export.opset=18", "--workers", "100"], "workers"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(recipe: str, run: Run, options: list[str], words: str) -> None:
    code, _, err = run("variants", recipe, *options)
    assert code == errors.ConfigError.exit_code
    assert words in err
