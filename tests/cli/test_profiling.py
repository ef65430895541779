"""`profile`: what it refuses at once, and a recipe's and a pack's as a user asks for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from modelpress import errors
from modelpress.reports import ProfileReport
from modelpress.store import Store
from tests.cli.conftest import Run

RECIPE = Path(__file__).parents[2] / "configs" / "digits-quick.yaml"
QUICK = {"seconds": 0.02, "threads": 1, "batch_sizes": [1], "loads": [0.5], "prices": {"small": 1.0}}


def test_a_pack_without_samples_asks_for_its_recipe(packs: list[str], run: Run) -> None:
    code, _, err = run("profile", "scale")
    assert code == errors.WorkloadError.exit_code
    assert "--recipe" in err


def test_a_recipe_beside_a_recipe_is_refused(run: Run) -> None:
    code, _, err = run("profile", str(RECIPE), "--recipe", str(RECIPE))
    assert code == errors.ConfigError.exit_code
    assert "beside a pack alone" in err


def test_a_pack_that_is_not_there(store: Store, run: Run) -> None:
    assert run("profile", "nobody")[0] == errors.NotFoundError.exit_code


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"batch_sizes": [1, 1]}, "must not repeat"),
        ({"prices": {"a%": 1.0}}, "letters"),
        ({"bandwidths": {"slow": 0}}, "greater than 0"),
        ({"max_cost_per_million": 1.0}, "profile.prices"),
        ({"runtime": "torch", "provider": "CUDAExecutionProvider"}, "profile.provider"),
        ({"loads": [3.0]}, "less than or equal to 2"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(
    tmp_path: Path, run: Run, values: dict[str, object], said: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(RECIPE.read_text()) | {"profile": values}))
    code, _, err = run("profile", str(path))
    assert code == errors.ConfigError.exit_code
    assert said in err


@pytest.mark.e2e
def test_a_recipe_is_profiled_in_tables_json_and_plots(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "digits.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(RECIPE.read_text()) | {"profile": QUICK}))
    code, out, err = run("profile", str(path), "--plots", str(tmp_path / "plots"), "--top", "2")
    assert code == 0, err
    assert "digits-quick is bound by " in out
    assert "not measured: the model does not compute on a GPU" in out
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == ["latency.png", "memory.png", "roofline.png"]
    code, out, err = run("profile", str(path), "--json")
    assert code == 0, err
    report = ProfileReport.model_validate(json.loads(out))
    assert report.subject == "digits-quick"
    assert [cost.price for cost in report.costs] == ["small"]
