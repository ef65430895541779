"""The line cut into jobs on a real server, with a real worker for each pool."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling

from modelpress import pointer
from modelpress.store.base import open_store
from tests.conftest import ROOT
from tests.integration.deploying import deploy, make_pools, worker

NAME = "in-jobs"
PART = "optimize-part/optimize-part"
PATIENCE_SECONDS = 150
RECIPE: dict[str, Any] = {
    "name": NAME,
    "workload": {"kind": "custom", "factory": "tests.integration.small_workloads:Small", "calibration_samples": 100},
    "quantize": {"method": "dynamic", "max_quality_drop": 0.2},
    "compress": {"min_decode_bytes_per_second": 0},
    "evaluate": {"batch_sizes": [1], "latency_seconds": 0.02, "max_quality_drop": 0.5},
    "gate": {"margin": 0.5, "min_compression_ratio": 0.1},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, prefect_server: str, mlflow_server: str) -> Iterator[Path]:
    """A fresh place for stores, which both workers share."""
    home = tmp_path_factory.mktemp("in-jobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELPRESS_HOME", str(home))
        patch.setenv("MODELPRESS_TRACKING_URI", mlflow_server)
        patch.setenv("PREFECT_API_URL", prefect_server)
        patch.setenv("PREFECT_HOME", str(home / "prefect"))
        patch.setenv("PREFECT_WORKER_QUERY_SECONDS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("MODELPRESS_CHECKOUT", str(ROOT))
        for name in ("MODELPRESS_STORE", "MODELPRESS_WORK"):
            patch.delenv(name, raising=False)
        make_pools("cpu", "gpu")
        deploy("optimize-in-jobs", "optimize-part", "optimize-part-gpu")
        with worker("cpu", home), worker("gpu", home):
            yield home


def start(client: SyncPrefectClient, *jobs: dict[str, str], **recipe: object) -> FlowRun:
    deployment = client.read_deployment_by_name("optimize-in-jobs/optimize-in-jobs")
    parameters = {"config": {**RECIPE, **recipe}, "jobs": list(jobs)}
    return client.create_flow_run_from_deployment(deployment.id, parameters=parameters)


def ended(client: SyncPrefectClient, run: UUID) -> FlowRun:
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        found = client.read_flow_run(run)
        if found.state is not None and found.state.is_final():
            return found
        time.sleep(0.5)
    raise AssertionError(f"{found.name} is still {found.state_name}")


def children(client: SyncPrefectClient, run: UUID) -> list[FlowRun]:
    of_it = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run]))
    return client.read_flow_runs(flow_run_filter=of_it)


def test_each_job_runs_in_its_pool_and_the_rest_takes_what_it_recorded(home: Path, mlflow_server: str) -> None:
    with get_client(sync_client=True) as client:
        run = ended(client, start(client, {"last": "export"}).id)
        assert run.state is not None
        assert run.state.is_completed(), run.state.message
        found = {child.name: child for child in children(client, run.id)}
    part = found[f"optimize-{NAME}-to-export"]
    assert part.work_pool_name == "gpu"
    assert part.state is not None
    assert part.state.is_completed()
    entry = pointer.current(open_store(str(home / "store")), NAME, "champion")
    assert entry is not None
    mlflow = MlflowClient(mlflow_server, mlflow_server)
    version = mlflow.get_model_version_by_alias(NAME, "champion")
    assert version.run_id is not None
    recomputed = mlflow.get_run(version.run_id).data.tags["recomputed"].split(", ")
    assert recomputed == ["quantize", "evaluate quantize", "compress", "shard", "upload", "register"]


def test_jobs_that_the_recipe_has_not_are_refused_before_any_starts(home: Path) -> None:
    with get_client(sync_client=True) as client:
        run = ended(client, start(client, {"last": "prune"}).id)
        assert run.state is not None
        assert run.state.is_failed()
        assert "looking for stage 'prune' in recipe" in str(run.state.message)
        assert not children(client, run.id)


def test_a_job_that_fails_fails_the_whole_and_says_which(home: Path) -> None:
    broken = {"workload": {**RECIPE["workload"], "factory": "tests.integration.small_workloads:Missing"}}
    with get_client(sync_client=True) as client:
        run = ended(client, start(client, {"last": "export", "deployment": PART}, **broken).id)
    assert run.state is not None
    assert run.state.is_failed()
    assert f"running the stages up to export in {PART}" in str(run.state.message)
    assert "Missing" in str(run.state.message)


def test_cancelled_it_cancels_its_jobs(home: Path) -> None:
    (home / "pause").touch()  # its training stands still
    slow = {"workload": {**RECIPE["workload"], "factory": "tests.integration.small_workloads:Learning"}}
    with get_client(sync_client=True) as client:
        run = start(client, {"last": "export"}, **slow)
        end = time.monotonic() + PATIENCE_SECONDS
        while not (home / "paused").exists():
            assert time.monotonic() < end
            time.sleep(0.5)
        client.set_flow_run_state(run.id, Cancelling())
        assert str(ended(client, run.id).state_name) == "Cancelled"
        (child,) = children(client, run.id)
        assert str(ended(client, child.id).state_name) == "Cancelled"
