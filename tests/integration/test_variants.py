"""Variants on a real Prefect server over two processes, one of which dies: it costs its variant, and no more."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
)

from flows.variants import _published, optimize_variants
from modelpress.config import OptimizeConfig, VariantsConfig
from modelpress.reports import VariantsReport
from modelpress.settings import Settings
from modelpress.store.artifacts import load_artifact
from modelpress.store.base import open_store
from modelpress.variants.expand import expand

pytestmark = pytest.mark.distributed

NAME = "varied"
RECIPE = OptimizeConfig.model_validate(
    {
        "name": NAME,
        "workload": {"kind": "custom", "factory": "tests.integration.small_workloads:Striking"},
        "evaluate": {"batch_sizes": [1], "latency_seconds": 0.01, "max_quality_drop": 1.0},
        "compress": {"min_decode_bytes_per_second": 0},
        "promote": False,
    }
)
VARIANTS = VariantsConfig(
    also=[
        {"prune": {"sparsity": 0.3, "recovery": {"epochs": 1, "batch_size": 50}}},
        {"quantize": {"method": "dynamic", "max_quality_drop": 1.0}},
        {"prune": {"ignore": ["*"]}},  # which leaves it nothing to do
    ],
    workers=2,
    threads=1,
    max_quality_drop=1.0,
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str, mlflow_server: str) -> Path:
    monkeypatch.setenv("MODELPRESS_HOME", str(tmp_path))
    monkeypatch.setenv("MODELPRESS_TRACKING_URI", mlflow_server)
    for name in ("MODELPRESS_STORE", "MODELPRESS_WORK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_process_that_dies_costs_its_variant_and_what_all_share_is_computed_once(
    home: Path, mlflow_server: str
) -> None:
    (home / "strike").touch()
    report = optimize_variants(RECIPE, VARIANTS)
    assert not (home / "strike").exists()

    pruned, quantized, refused = report.variants
    assert not report.lost
    assert (pruned.stopped, quantized.stopped) == (None, None)
    assert refused.stopped is not None
    assert "prun" in refused.stopped
    for one in (pruned, quantized):
        assert one.artifact is not None
        assert one.size_bytes == one.artifact.size_bytes == len(load_artifact(one.artifact))
        assert [row.batch_size for row in one.latency] == [1]
    assert report.source_latency
    assert report.best == min((pruned, quantized), key=lambda one: one.size_bytes or 0).number
    assert report.best in report.by_bytes

    mlflow = MlflowClient(mlflow_server, mlflow_server)
    parent = mlflow.get_run(report.mlflow_url.rpartition("/")[2])
    check_prefect(UUID(parent.data.tags["prefect.flow_run_id"]))
    check_mlflow(mlflow, parent.info.run_id, parent.info.experiment_id, report)
    assert not [one for one in psutil.Process().children() if "flows.variant_process" in one.cmdline()]

    store = open_store(Settings().store_uri)
    assert not [*store.list("packs/"), *store.list("blobs/")]
    assert not mlflow.search_registered_models(f"name = '{NAME}'")
    pack = _published(report, expand(RECIPE, VARIANTS))
    assert store.info(f"packs/{NAME}/{pack}.json") is not None
    (version,) = mlflow.search_model_versions(f"name = '{NAME}'")
    assert version.run_id is not None
    recomputed = mlflow.get_run(version.run_id).data.tags["recomputed"].split(", ")
    assert not {"source", "export", "prune", "quantize", "compress"} & set(recomputed)


def check_prefect(run: UUID) -> None:
    """What all share ran once; of the variant whose process died there are two runs, and one of each other."""
    with get_client(sync_client=True) as client:
        children = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run]))
        )
        steps = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))
    ended: dict[str, list[str]] = defaultdict(list)
    for child in sorted(children, key=lambda child: str(child.created)):
        assert child.state is not None
        ended[child.name].append(child.state.type.value)
    (died,) = [name for name in ended if name.startswith("prune={") and "sparsity" in name]
    assert ended.pop(died) == ["CRASHED", "COMPLETED"]
    assert sorted(ended.values()) == [["COMPLETED"], ["COMPLETED"], ["FAILED"]]
    assert ended[f"{NAME}: up to source, for 3"] == ["COMPLETED"]
    again = [step for step in steps if step.run_count > 1]
    assert [step.name for step in again] == [f"{NAME}: {died}"]
    assert again[0].run_count == 2


def check_mlflow(mlflow: MlflowClient, parent: str, experiment: str, report: VariantsReport) -> None:
    """Runs of variants are below the whole's, with their numbers; nothing says that it still runs."""
    assert not mlflow.search_runs([experiment], "attributes.status = 'RUNNING'")
    below = mlflow.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}' AND tags.variant LIKE '%'")
    assert sorted(run.info.status for run in below) == ["FAILED", "FINISHED", "FINISHED", "FINISHED", "KILLED"]
    for one in report.variants[:2]:
        (mine,) = [run for run in below if run.info.run_id == one.mlflow_run]
        assert mine.data.metrics["size_bytes"] == one.size_bytes
        assert mine.data.metrics["latency.b1.p50_seconds"] == one.latency[0].p50_seconds
    first = mlflow.search_runs([experiment], "tags.stage = 'source' AND tags.reused = 'false'")
    whose = [run.data.tags["mlflow.parentRunId"] for run in first]
    assert sum(run.info.run_id in whose for run in below) == 1  # what all share is computed once
    names = {found.path for found in mlflow.list_artifacts(parent)}
    assert {"variants.json", "variants_table.json", "variants.png"} <= names
