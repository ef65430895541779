"""What one sees of a real run in a process of its own: its JSON log, its trace, its numbers and its picture."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ROOT
from tests.integration.collector import Collector, attributes, collecting

NAME = "watched"
RECIPE = {
    "name": NAME,
    "workload": {
        "kind": "custom",
        "factory": "tests.integration.small_workloads:Small",
        "calibration_samples": 100,
    },
    "quantize": {"method": "static", "max_quality_drop": 1.0},
    "compress": {"min_decode_bytes_per_second": 0},
    "evaluate": {"batch_sizes": [1, 8], "latency_seconds": 0.02, "max_quality_drop": 1.0},
    "promote": False,
}
RUN = """
import logging, sys
from flows.console import terminal
with terminal():
    from flows.optimize import optimize
    from modelpress.config import OptimizeConfig
    optimize(OptimizeConfig.model_validate_json(sys.argv[1]))
"""


@dataclass(frozen=True)
class Watched:
    lines: list[dict[str, Any]]
    collector: Collector
    numbers: dict[tuple[str, frozenset[tuple[str, str]]], float]
    home: Path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watching")


def environment(home: Path, prefect: str, mlflow: str, **further: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MODELPRESS_", "OTEL_"))}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "PREFECT_API_URL": prefect,
        "PREFECT_HOME": str(home / "prefect"),
        "MODELPRESS_HOME": str(home),
        "MODELPRESS_TRACKING_URI": mlflow,
        "MODELPRESS_METRICS": str(home / "metrics"),
        **further,
    }


def run(recipe: dict[str, Any], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, json.dumps(recipe)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def numbers(home: Path) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = (home / "metrics" / f"modelpress_{NAME}.prom").read_text()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def watched(home: Path, prefect_server: str, mlflow_server: str) -> Iterator[Watched]:
    with collecting() as collector:
        env = environment(
            home, prefect_server, mlflow_server, MODELPRESS_LOG="json", OTEL_EXPORTER_OTLP_ENDPOINT=collector.url
        )
        done = run(RECIPE, env)
        assert done.returncode == 0, done.stdout + done.stderr
        others = [line for line in done.stderr.splitlines() if not line.startswith("{")]
        assert not others, others
        yield Watched([json.loads(line) for line in done.stderr.splitlines()], collector, numbers(home), home)


def test_every_line_is_json_and_names_the_run(watched: Watched) -> None:
    (line,) = [line for line in watched.lines if line["message"].startswith("quantize: accuracy")]
    assert line["flow_run"] == f"optimize-{NAME}"
    assert re.fullmatch(r"[0-9a-f-]{36}", line["flow_run_id"])
    assert line["stage"] == "quantize"
    assert line["pack"] == NAME
    assert line["level"] == "info"
    assert line["time"].endswith("+00:00")
    tasks = {line.get("task_run") for line in watched.lines}
    assert {"quantize", "evaluate-quantize", "upload"} <= tasks
    assert any("Finished in state Completed" in line["message"] for line in watched.lines), "also after the run is over"


def test_the_trace_has_the_run_its_stages_and_what_they_asked_of_stores(watched: Watched) -> None:
    (root,) = watched.collector.named("flow optimize")
    assert watched.collector.services == {"modelpress"}
    assert {span.trace_id for span in watched.collector.spans} == {root.trace_id}
    assert not root.parent_span_id
    assert attributes(root)["modelpress.pack.name"] == NAME
    assert attributes(root)["prefect.flow_run.name"] == f"optimize-{NAME}"
    (stage,) = watched.collector.named("stage quantize")
    (task,) = watched.collector.named("quantize")  # Prefect's own, of the task run
    assert task.parent_span_id == root.span_id
    assert stage.parent_span_id == task.span_id
    found = attributes(stage)
    assert found["modelpress.stage.reused"] is False
    assert found["modelpress.stage.seconds"] > 0  # type: ignore[operator]
    assert found["modelpress.stage.output_bytes"] > 0  # type: ignore[operator]
    inside = {span.name for span in watched.collector.spans if span.parent_span_id == stage.span_id}
    assert {"store get", "store put", "store info"} <= inside
    (uploaded,) = watched.collector.named("stage upload")
    blobs = [
        span
        for span in watched.collector.named("store put")
        if span.start_time_unix_nano >= uploaded.start_time_unix_nano
    ]
    assert blobs, "an upload's threads are in the trace as well"


def test_prometheus_reads_the_numbers_of_the_run(watched: Watched) -> None:
    def value(name: str, **labels: str) -> float:
        return watched.numbers[(f"modelpress_{name}", frozenset({"pack": NAME, **labels}.items()))]

    assert value("run_success") == 1
    assert value("run_seconds") > 0
    assert value("stage_reused", stage="quantize") == 0
    assert value("stage_seconds", stage="quantize") > 0
    assert value("stage_bytes", stage="upload") == value("published_bytes")
    assert value("quality", stage="quantize", metric="accuracy") >= 0
    fast, slow = (value("latency_seconds", stage="export", batch="8", quantile=one) for one in ("0.5", "0.99"))
    assert 0 < fast <= slow


def test_the_picture_stands_in_prefects_report(watched: Watched, mlflow_server: str, tmp_path: Path) -> None:
    run_id = next(line["flow_run_id"] for line in watched.lines if "flow_run_id" in line)
    with get_client(sync_client=True) as client:
        of_it = ArtifactFilterFlowRunId(any_=[UUID(run_id)])
        keyed = ArtifactFilter(key=ArtifactFilterKey(any_=[f"{NAME}-report"]), flow_run_id=of_it)
        (report,) = client.read_artifacts(artifact_filter=keyed)
    shown = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)\)", str(report.data))
    assert shown is not None
    mlflow = MlflowClient(mlflow_server, mlflow_server)
    experiment = mlflow.get_experiment_by_name(NAME)
    assert experiment is not None
    (parent,) = mlflow.search_runs([experiment.experiment_id], f"tags.`prefect.flow_run_id` = '{run_id}'")
    kept = Path(mlflow.download_artifacts(parent.info.run_id, "stages.png", str(tmp_path)))
    assert base64.b64decode(shown[1]) == kept.read_bytes(), "the one that MLflow keeps"
    assert (
        "data:image" not in Path(mlflow.download_artifacts(parent.info.run_id, "report.md", str(tmp_path))).read_text()
    )


def test_a_run_that_fails_says_so_in_each(
    watched: Watched, home: Path, prefect_server: str, mlflow_server: str
) -> None:
    """The numbers are those of the last run; a collector that is not there costs seconds and no run."""
    wrong = {**RECIPE, "workload": {**RECIPE["workload"], "options": {"overlap": True}}}  # type: ignore[dict-item]
    env = environment(
        home, prefect_server, mlflow_server, MODELPRESS_LOG="json", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9"
    )
    done = run(wrong, env)
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    line = next(line for line in lines if line.get("error") == "OverlapError")
    assert line["flow_run"] == f"optimize-{NAME}"
    assert line["level"] == "error"
    assert "evaluation" in line["doing"] + line["found"]
    assert "OverlapError" in line["traceback"]
    assert numbers(home)[("modelpress_run_success", frozenset({("pack", NAME)}))] == 0


def test_a_wrong_word_in_the_setting_is_refused_by_name(home: Path, prefect_server: str, mlflow_server: str) -> None:
    done = run(RECIPE, environment(home, prefect_server, mlflow_server, MODELPRESS_LOG="yaml"))
    assert done.returncode == 1
    assert "MODELPRESS_LOG='yaml'" in done.stderr
