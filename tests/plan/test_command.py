from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from modelpress import cli, errors
from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import CompressConfig, load_plan_recipe

RECIPE = """
name: digits
workload: {kind: image-classification, model: digits-cnn, data: digits, train_epochs: 1, train_samples: 300,
  evaluation_samples: 100, calibration_samples: 32, architecture: {channels: [4, 8], hidden: 16}}
plan: {max_disagreement: 0.01, num_bits: [8, 5, 3], group_sizes: [], points: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


def test_plan_writes_what_it_says(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    assert run("plan", str(recipe), "--to", str(folder)) == 0
    out = capsys.readouterr().out
    report = json.loads((folder / "digits.json").read_text())
    for text in (f"{report['coded_bytes']:,} planned", "5 bits, scale per channel", "accuracy", "held-out"):
        assert text in out
    made = Checkpoint.from_bytes((folder / "digits.safetensors").read_bytes())
    assert compress(made, CompressConfig())[1].stored_bytes == report["coded_bytes"]
    assert (folder / "digits.png").read_bytes().startswith(b"\x89PNG")
    session = onnxruntime.InferenceSession(folder / "digits.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    shape = [one if isinstance(one, int) else 2 for one in given.shape]
    assert np.isfinite(session.run(None, {given.name: np.zeros(shape, np.float32)})[0]).all()
    assert run("plan", str(recipe), "--to", str(folder)) == errors.ConfigError.exit_code
    assert "another folder with --to" in capsys.readouterr().err


def test_a_dry_run_shows_the_work_and_writes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", str(recipe), "--dry-run", "--to", str(tmp_path / "out")) == 0
    out = capsys.readouterr().out
    assert "weights, " in out
    assert "5 to 12" in out
    assert not (tmp_path / "out").exists()


def test_a_recipe_of_a_run_is_no_recipe_of_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE + "quantize: {method: static}\n")
    with pytest.raises(errors.ConfigError, match=r"quantize: unknown field; legal here: name, workload, export, plan"):
        load_plan_recipe(path)
    path.write_text(RECIPE.replace("num_bits: [8, 5, 3]", "num_bits: [8, 8]"))
    with pytest.raises(errors.ConfigError, match=r"plan\.num_bits must not repeat"):
        load_plan_recipe(path)
