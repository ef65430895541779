"""The stage `profile` within a line: in MLflow, in Prefect, taken again, and in no manifest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mlflow import MlflowClient

from flows.optimize import OptimizeResult, optimize
from modelpress import load
from modelpress.config import OptimizeConfig, ProfileConfig, WorkloadConfig
from modelpress.pack_files import read_reports
from modelpress.settings import Settings
from modelpress.store.base import open_store

pytestmark = pytest.mark.e2e

LINE = OptimizeConfig(
    name="profiled",
    workload=WorkloadConfig(kind="custom", factory="tests.integration.small_workloads:Small"),
    profile=ProfileConfig(seconds=0.02, threads=1, batch_sizes=[1], loads=[0.5]),
    gate={"margin": 0.9},  # type: ignore[arg-type]
)


@pytest.fixture(scope="module")
def first(
    tmp_path_factory: pytest.TempPathFactory, prefect_server: str, mlflow_server: str
) -> Iterator[OptimizeResult]:
    home = tmp_path_factory.mktemp("profiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELPRESS_HOME", str(home))
        patch.setenv("MODELPRESS_TRACKING_URI", mlflow_server)
        yield optimize(LINE)


def test_the_stage_is_logged_and_in_no_manifest(first: OptimizeResult, mlflow_server: str) -> None:
    assert "profile" in first.recomputed
    assert [row.stage for row in first.stages][:3] == ["source", "source (onnx)", "profile"]
    client = MlflowClient(mlflow_server, mlflow_server)
    run = client.get_run(first.mlflow_run)
    assert run.data.tags["bound_by"] in ("compute", "memory-bandwidth", "storage-transfer", "latency")
    assert {file.path for file in client.list_artifacts(first.mlflow_run)} >= {
        "roofline.png",
        "latency.png",
        "memory.png",
    }
    query = f"tags.`mlflow.parentRunId` = '{first.mlflow_run}' and tags.stage = 'profile'"
    (child,) = client.search_runs([run.info.experiment_id], query)
    assert child.data.metrics["totals.flops"] > 0
    assert "energy.gpu_joules_per_request" not in child.data.metrics
    store = open_store(Settings().store_uri)
    manifest = load.load_manifest(store, "profiled", first.pack)
    assert "profile" not in read_reports(manifest, load.fetcher(store, manifest))


def test_a_second_run_measures_nothing_again(first: OptimizeResult) -> None:
    second = optimize(LINE)
    assert "profile" not in second.recomputed
    assert second.pack == first.pack
