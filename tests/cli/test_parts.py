"""`partition` on the command line: a table, a picture, and a refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from modelpress.errors import ConfigError
from tests.cli.conftest import Run
from tests.decoders import SIZES, make_text_folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    data = make_text_folder(tmp_path / "texts", ("wsgiref",))
    sizes = SIZES | {"num_hidden_layers": 3}
    workload = {"kind": "causal-lm", "model": "tiny-decoder", "data": str(data), "architecture": sizes, "length": 16}
    path = tmp_path / "decoder.yaml"
    path.write_text(yaml.safe_dump({"name": "decoder", "workload": workload}))
    return path


def test_a_decoder_is_split(recipe: Path, tmp_path: Path, run: Run) -> None:
    picture = tmp_path / "split.svg"
    code, out, err = run("partition", str(recipe), "--tensor", "2", "--microbatches", "3", "--plot", str(picture))
    assert code == 0, err
    assert "model.model.layers.0" in out
    assert "bytes on each of 2" in out
    assert "each part waits 25.0% of the time" in out
    assert "<svg" in picture.read_text()
    code, out, err = run("partition", str(recipe), "--parts", "3", "--by", "flops", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert (report["bounds"], report["by"]) == ([0, 1, 2, 3], "flops")


def test_more_parts_than_blocks(recipe: Path, run: Run) -> None:
    code, _, err = run("partition", str(recipe), "--parts", "4")
    assert code == ConfigError.exit_code
    assert "4 parts for 3 blocks" in err
