"""`infra/prefect.yaml` on a real server: what that then holds, what a worker does, and what a missed time costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.system import Secret
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.states import Failed, Pending

from flows.evaluate import evaluate_published
from flows.optimize import OptimizeResult, optimize
from modelpress import __version__, keys, load, pointer
from modelpress.config import OptimizeConfig
from modelpress.errors import ConfigError, CorruptionError, GateError
from modelpress.store.base import open_store
from registry import figures, versions
from tasks.alarm import Failure, notify
from tasks.reaping import FLOWS
from tests.conftest import ROOT
from tests.integration.deploying import at_home, deploy, make_pools, prefect
from tests.integration.small_workloads import WIDTH, Net

NAME = "deployed"
SCHEDULED = {"evaluate-published", "collect", "scrub", "reconcile-poll", "reap", "canary"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, prefect_server: str, mlflow_server: str) -> Iterator[Path]:
    """A fresh place for stores; flows of this module, and the worker, read it from the environment."""
    home = tmp_path_factory.mktemp("deployed")
    with at_home(home, prefect_server, mlflow_server):
        yield home


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def deployed(home: Path) -> dict[str, DeploymentResponse]:
    """What the server holds after the documented commands, by name; each worker has a clone of its own."""
    make_pools("cpu", "gpu")
    deploy("--all")
    with get_client(sync_client=True) as client:
        return {found.name: found for found in client.read_deployments()}


def test_the_server_holds_every_deployment_whole(deployed: dict[str, DeploymentResponse]) -> None:
    by_hand = {
        "optimize",
        "optimize-gpu",
        "optimize-in-jobs",
        "optimize-part",
        "optimize-part-gpu",
        "optimize-variants",
    }
    assert (
        set(deployed) == by_hand | {"promote", "promote-canary", "rollback", "reconcile", "report-failure"} | SCHEDULED
    )
    for name, found in deployed.items():
        assert found.version == __version__
        assert found.description
        assert "modelpress" in found.tags
        assert found.work_pool_name == ("gpu" if name.endswith("-gpu") else "cpu")
        assert found.work_pool_name in found.tags
        assert found.entrypoint is not None
        assert found.entrypoint.partition(":")[2].replace("_", "-") in FLOWS, "the reaper looks after it"
        assert found.enforce_parameter_schema, "a wrong value is refused before anything runs"
        assert set(found.parameters) <= set(found.parameter_openapi_schema["properties"])
        assert not found.job_variables, "what a run needs of its machine stands in the pool"
        (pull,) = found.pull_steps or []
        (step,) = pull.values()
        assert step == {"directory": "{{ $MODELPRESS_CHECKOUT }}"}, "each worker's own clone"


def test_scheduled_ones_take_one_slot_and_drop_what_piled_up(deployed: dict[str, DeploymentResponse]) -> None:
    assert {name for name, found in deployed.items() if found.schedules} == SCHEDULED
    for name in SCHEDULED:
        found = deployed[name]
        (row,) = found.schedules
        assert row.schedule.timezone == "UTC"  # type: ignore[union-attr]
        assert row.active == (name != "evaluate-published"), "which model is evaluated is for a person to say"
        assert found.global_concurrency_limit is not None
        assert found.global_concurrency_limit.limit == 1
        assert found.concurrency_options is not None
        assert found.concurrency_options.collision_strategy == "CANCEL_NEW"


def scheduled(client: SyncPrefectClient, deployment: DeploymentResponse) -> list[FlowRun]:
    of_it = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]))
    return [run for run in client.read_flow_runs(flow_run_filter=of_it) if run.auto_scheduled]


def test_the_scheduler_makes_the_runs(deployed: dict[str, DeploymentResponse], client: SyncPrefectClient) -> None:
    """The server's own loop, which looks at new deployments every five seconds; SQLAlchemy 2.1 stops it in silence."""
    end = time.monotonic() + 90
    while time.monotonic() < end and not all(scheduled(client, deployed[name]) for name in ("collect", "scrub")):
        time.sleep(0.5)
    nights = scheduled(client, deployed["collect"])
    assert len(nights) > 2
    assert {run.expected_start_time.hour for run in nights if run.expected_start_time} == {3}
    weeks = scheduled(client, deployed["scrub"])
    assert {run.expected_start_time.weekday() for run in weeks if run.expected_start_time} == {6}
    assert not scheduled(client, deployed["evaluate-published"]), "its schedule is off"


def test_the_automation_records_a_scheduled_run_that_failed_and_no_other(
    deployed: dict[str, DeploymentResponse], client: SyncPrefectClient
) -> None:
    """Deployed twice, it is there once."""
    prefect("--no-prompt", "deploy", "--name", "report-failure", "--prefect-file", "infra/prefect.yaml")
    by_hand = client.create_flow_run_from_deployment(deployed["collect"].id)
    client.set_flow_run_state(by_hand.id, Failed(message="who started it saw it"), force=True)
    # By its tag as if the scheduler had made it: of a run that it made in the last minutes, Prefect's server holds the
    # events back, until one comes of the state that the scheduler gave it in silence.
    night = client.create_flow_run_from_deployment(deployed["collect"].id, tags=["auto-scheduled"])
    client.set_flow_run_state(night.id, Failed(message="no space left"), force=True)
    of_it = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployed["report-failure"].id]))
    end = time.monotonic() + 60
    while not (found := client.read_flow_runs(flow_run_filter=of_it)) and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(2)  # for a second one, which must not come
    assert [run.parameters for run in client.read_flow_runs(flow_run_filter=of_it)] == [
        {"flow_run_id": str(night.id), "block": ""}
    ]
    said = prefect("worker", "start", "--pool", "cpu", "--run-once", MODELPRESS_CHECKOUT=str(ROOT))
    state = client.read_flow_run(found[0].id).state
    assert state is not None
    assert state.is_completed(), said
    page = client.request("GET", "/artifacts/{key}/latest", path_params={"key": "failed-collect"}).json()
    assert page["description"] == "collect: Failed, 2 in a row"
    assert "no space left" in page["data"]
    assert night.name in page["data"]


def test_a_block_that_is_not_there_or_sends_nothing_is_an_error_by_name(home: Path) -> None:
    failure = Failure(deployment="scrub", run="owl", url="", state="Failed", message="no space left", in_a_row=1)
    with pytest.raises(ConfigError, match="slack-webhook/none"):
        notify.fn("slack-webhook/none", failure)
    Secret(value="hidden").save("alarm-test")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a Secret") as refused:
        notify.fn("secret/alarm-test", failure)
    assert "hidden" not in str(refused.value)


def test_a_notification_arrives(home: Path) -> None:
    """Through a block that Prefect ships, at a server that notes what came."""
    failure = Failure(deployment="scrub", run="owl", url="", state="Failed", message="no space left", in_a_row=1)
    came: list[bytes] = []

    class Inbox(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Inbox) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        block = CustomWebhookNotificationBlock(name="ops", url=url, json_data={"text": "{{subject}}: {{body}}"})
        block.save("alarm-inbox")
        notify.fn("custom-webhook/alarm-inbox", failure)
    assert b"scrub: Failed, 1 in a row: no space left" in came[0]


def test_of_two_late_runs_one_starts_and_the_other_is_cancelled(
    deployed: dict[str, DeploymentResponse], client: SyncPrefectClient
) -> None:
    late = [client.create_flow_run_from_deployment(deployed["scrub"].id) for _ in range(2)]
    for run in late:
        client.set_flow_run_state(run.id, Pending())
    types = [client.read_flow_run(run.id).state_type for run in late]
    assert [str(kind.value) for kind in types if kind] == ["PENDING", "CANCELLED"]


def test_a_wrong_parameter_is_refused_by_the_server(
    deployed: dict[str, DeploymentResponse], client: SyncPrefectClient
) -> None:
    from prefect.exceptions import PrefectHTTPStatusError

    with pytest.raises(PrefectHTTPStatusError, match="409"):
        client.create_flow_run_from_deployment(deployed["collect"].id, parameters={"grace_hours": -1})


def samples(path: Path, *, shift: int) -> None:
    """Samples of which the source model answers all right, or, with a `shift`, all wrong."""
    inputs = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        answers = Net(False).eval()(inputs).argmax(1)
    np.savez(path, inputs=inputs.numpy(), labels=((answers + shift) % 16).numpy())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "evaluation.npz"
    samples(path, shift=0)
    return path


@pytest.fixture(scope="module")
def champion(home: Path, data: Path) -> OptimizeResult:
    recipe: dict[str, Any] = {
        "name": NAME,
        "workload": {
            "kind": "custom",
            "factory": "tests.integration.small_workloads:Labelled",
            "options": {"path": str(data)},
            "calibration_samples": 100,
        },
        "quantize": {"method": "static", "max_quality_drop": 0.2},
        "compress": {"min_decode_bytes_per_second": 0},
        "evaluate": {"batch_sizes": [1], "latency_seconds": 0.02, "max_quality_drop": 0.5},
        "gate": {"margin": 0.2, "min_compression_ratio": 0.1},
    }
    result = optimize(OptimizeConfig.model_validate(recipe))
    assert result.decision is not None
    assert result.decision.promote, result.decision.line()
    return result


def test_a_worker_runs_a_deployment_from_its_own_clone(
    deployed: dict[str, DeploymentResponse], champion: OptimizeResult, client: SyncPrefectClient, mlflow_server: str
) -> None:
    run = client.create_flow_run_from_deployment(deployed["evaluate-published"].id, parameters={"name": NAME})
    said = prefect("worker", "start", "--pool", "cpu", "--run-once", MODELPRESS_CHECKOUT=str(ROOT))
    state = client.read_flow_run(run.id).state
    assert state is not None
    assert state.is_completed(), f"{state!r}\n{said}"
    mlflow = MlflowClient(mlflow_server, mlflow_server)
    tags = mlflow.get_model_version(NAME, champion.version).tags
    assert tags["evaluated.verdict"] == "pass"
    assert float(tags["evaluated.accuracy"]) > 0.8
    kept = mlflow.get_run(tags["evaluated.run_id"])
    assert kept.info.status == "FINISHED"
    assert kept.data.tags["prefect.flow_run_id"] == str(run.id)
    assert kept.data.tags["pack"] == champion.pack
    assert kept.data.tags["alias"] == "champion"
    assert kept.data.metrics["quality.value"] == pytest.approx(float(tags["evaluated.accuracy"]), abs=1e-6)
    assert {"report.json", "decision.json"} <= {one.path for one in mlflow.list_artifacts(kept.info.run_id)}


def test_quality_that_left_the_gates_bound_fails_by_name_and_moves_nothing(
    champion: OptimizeResult, data: Path, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELPRESS_HARDWARE", "bench.2")
    found = evaluate_published(NAME)
    assert found.decision.promote
    measured = figures.of_version(versions.carrying(MlflowClient(mlflow_server, mlflow_server), NAME, champion.pack))
    assert measured["bench.2"].provider == "CPUExecutionProvider"
    assert measured["bench.2"].p99_seconds == pytest.approx(found.evaluation.latency[0].p99_seconds, rel=1e-4)
    assert [check.name for check in found.decision.checks] == [
        *("quality against the source", "quality against its publication")
    ]
    assert "on 400 samples," in found.decision.reasons[0], "the same samples are paired"

    samples(data, shift=1)  # what the model meets changed
    with pytest.raises(GateError, match=r"quality against the source: fail, .* on 400 samples against 400 others"):
        evaluate_published(NAME)
    mlflow = MlflowClient(mlflow_server, mlflow_server)
    tags = mlflow.get_model_version(NAME, champion.version).tags
    assert tags["evaluated.verdict"] == "fail"
    assert float(tags["evaluated.accuracy"]) < 0.2
    assert tags["gate.verdict"] == "pass", "what was decided at the promotion stays"
    entry = pointer.current(open_store(champion.uri.partition("/packs/")[0]), NAME, "champion")
    assert entry is not None
    assert entry.pack == champion.pack
    samples(data, shift=0)
    assert evaluate_published(NAME).decision.promote


def test_damaged_bytes_are_found_whatever_a_cache_holds(
    champion: OptimizeResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_server: str
) -> None:
    monkeypatch.setenv("MODELPRESS_CACHE", str(tmp_path / "cache"))
    store = open_store(champion.uri.partition("/packs/")[0])
    load.open_session(store, NAME)
    assert list((tmp_path / "cache").rglob("*")), "the cache is warm"
    key = keys.blob(load.load_manifest(store, NAME, champion.pack).shards[0].sha256)
    good = store.get(key)
    store.put(key, good[:-1] + bytes([good[-1] ^ 1]))
    try:
        with pytest.raises(CorruptionError, match="shard 0"):
            evaluate_published(NAME)
    finally:
        store.put(key, good)
    mlflow = MlflowClient(mlflow_server, mlflow_server)
    tags = mlflow.get_model_version(NAME, champion.version).tags
    assert tags["evaluated.verdict"] == "error", "an earlier verdict does not stand for today's"
    assert mlflow.get_run(tags["evaluated.run_id"]).info.status == "FAILED"
