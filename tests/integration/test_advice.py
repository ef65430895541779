"""An advice, the line on what it advises, and what the next advice knows of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.optimize import optimize
from modelpress.advise import CHECKS_FILE, advise, check, past, show
from modelpress.config import AdviseRecipe, load_config
from modelpress.workload import load_workload

RECIPE = AdviseRecipe.model_validate(
    {
        "name": "advised",
        "workload": {"kind": "custom", "factory": "tests.integration.small_workloads:Small"},
        "evaluate": {"latency_seconds": 0.05},
        "advise": {
            "batch_size": 8,  # and no objective: a profile says what binds
            "kernel_seconds": 0.02,
            "techniques": ["dynamic", "static", "weight-only", "codebook"],
            "budget": {"max_quality_drop": 0.3},
        },
    }
)


def test_the_advised_recipe_runs_and_is_checked(
    prefect_server: str, mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELPRESS_HOME", str(tmp_path))
    monkeypatch.setenv("MODELPRESS_TRACKING_URI", mlflow_server)
    report = advise(RECIPE, load_workload(RECIPE.workload), home=tmp_path)
    assert " binds: " in report.binding
    show.write(report, tmp_path / "advice")
    config = load_config(tmp_path / "advice" / "advised.yaml")
    result = optimize(config)
    assert [row.stage for row in result.stages][-1] != "source"
    (tmp_path / "run.json").write_text(result.model_dump_json())
    measured = check.measured(tmp_path / "run.json", report.batch_size)
    assert measured["published_bytes"] == result.published_bytes
    found = check.compare(report, measured)
    rows = {row.metric: row for row in found.rows}
    # Bytes are no business of the machine's: a pack's are within a tenth of what was foretold.
    assert rows["published_bytes"].ratio == pytest.approx(1.0, abs=0.1)
    assert rows["latency_seconds"].measured is not None
    assert rows["quality_drop"].measured is not None
    past.keep(found, tmp_path / CHECKS_FILE)
    known = past.Past.read(tmp_path / CHECKS_FILE)
    assert any("1 checks" in line for line in known.said(report.machine))
