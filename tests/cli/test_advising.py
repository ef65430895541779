"""`advise` as a user meets it: the ranking, the files, and foretold against measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelpress import errors
from modelpress.config import load_config
from tests.advise.test_advice import run_of
from tests.cli.conftest import Run

RECIPE = """
name: small
workload: {kind: image-classification, model: digits-cnn, data: digits, train_epochs: 4, calibration_samples: 96,
  evaluation_samples: 100, architecture: {channels: [4, 8], hidden: 16}}
evaluate: {latency_seconds: 0.02}
advise: {objective: bytes, batch_size: 8, kernel_seconds: 0.01, techniques: [weight-only, codebook],
  budget: {max_quality_drop: 0.2}}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODELPRESS_HOME", str(tmp_path / "home"))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_advise_ranks_writes_and_is_checked(recipe: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "out"
    code, out, _ = run("advise", str(recipe), "--to", str(folder))
    assert code == 0
    for text in ("technique", "codebook of 4 bits", "objective: bytes", "advised: ", "without a number:", "wrote "):
        assert text in out
    config = load_config(folder / "small.yaml")
    assert config.quantize is not None
    # Over another advice nothing is written, and nothing is measured for it.
    code, _, err = run("advise", str(recipe), "--to", str(folder))
    assert code == errors.ConfigError.exit_code
    assert "another folder with --to" in err
    from modelpress.advise import check

    report = check.read(folder / "small.json")
    (tmp_path / "run.json").write_text(json.dumps(run_of(report, 1.25)))
    code, out, _ = run("advise", str(folder / "small.json"), "--check", str(tmp_path / "run.json"))
    assert code == 0
    assert "1.250" in out
    checks = tmp_path / "home" / "advise" / "checks.jsonl"
    assert len(checks.read_text().splitlines()) == 1
    code, out, _ = run("advise", str(recipe), "--to", str(tmp_path / "next"), "--json")
    assert code == 0
    assert any("mean of 1 checks" in line for line in json.loads(out)["checks"])


def test_what_is_missing_is_said_before_anything_is_trained(recipe: Path, tmp_path: Path, run: Run) -> None:
    recipe.write_text(RECIPE.replace("objective: bytes", "objektive: bytes"))
    code, _, err = run("advise", str(recipe), "--to", str(tmp_path / "out"))
    assert code == errors.ConfigError.exit_code
    assert "advise.objektive: unknown field" in err
    recipe.write_text(RECIPE)
    code, _, err = run("advise", str(recipe), "--profile", str(tmp_path / "none.json"))
    assert code == errors.ConfigError.exit_code
    assert "reading profile" in err
