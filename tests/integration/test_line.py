"""The whole line against a real Prefect server, a real MLflow server and a store in a folder."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from flows.optimize import OptimizeResult, optimize
from flows.promote import promote, rollback
from modelpress import load, pointer, run_records
from modelpress.config import GateConfig, OptimizeConfig, load_config
from modelpress.errors import BudgetExceededError, CorruptionError, GateError, NotFoundError
from modelpress.settings import Settings
from modelpress.store.base import Store, open_store
from modelpress.workload import check_disjoint, load_workload
from serving.engine import load_engine
from serving.processed import ProcessedEngine
from tests.integration.conftest import free_port, serving

QUICK = load_config(Path(__file__).parents[2] / "configs" / "digits-quick.yaml")
HARDWARE = "tests"
STAGES = {
    "source",
    "export-source",
    "distill",
    "prune",
    "export",
    "quantize",
    "compress",
    "shard",
    "upload",
    "register",
}

RUN = """
from flows.optimize import optimize
from modelpress.config import load_config
optimize(load_config({recipe!r}))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, prefect_server: str, mlflow_server: str) -> Iterator[Path]:
    """A fresh place for stores; flows of this module read it from the environment."""
    home = tmp_path_factory.mktemp("line")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELPRESS_HOME", str(home))
        patch.setenv("MODELPRESS_TRACKING_URI", mlflow_server)
        patch.setenv("MODELPRESS_HARDWARE", HARDWARE)
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
        for name in ("MODELPRESS_STORE", "MODELPRESS_WORK"):
            patch.delenv(name, raising=False)
        yield home


@pytest.fixture(scope="module")
def first(home: Path) -> OptimizeResult:
    """A run on empty stores."""
    return optimize(QUICK)


@pytest.fixture(scope="module")
def store(first: OptimizeResult) -> Store:
    return open_store(Settings().store_uri)


@pytest.fixture(scope="module")
def client(mlflow_server: str) -> MlflowClient:
    return MlflowClient(mlflow_server, mlflow_server)


def run_of(client: MlflowClient, result: OptimizeResult) -> Any:
    return client.get_run(result.mlflow_run)


def children(client: MlflowClient, parent: Any) -> dict[str, Any]:
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    found = client.search_runs([parent.info.experiment_id], query)
    return {run.data.tags["stage"]: run for run in found}


def champion(store: Store) -> str:
    entry = pointer.current(store, QUICK.name, "champion")
    assert entry is not None
    return entry.pack


def test_a_first_run_delivers_a_verified_promoted_pack(first: OptimizeResult, store: Store) -> None:
    assert {"source", "distill", "prune", "quantize", "upload", "register"} <= set(first.recomputed)
    assert first.decision is not None
    assert first.decision.promote, first.decision.line()
    assert champion(store) == first.pack
    report = load.verify(store, QUICK.name, "champion")
    assert report.read_bytes == first.published_bytes
    rows = {row.stage: row for row in first.stages}
    assert list(rows) == [
        *("source", "source (onnx)", "distill", "prune", "export", "quantize", "compress", "shard", "upload")
    ]
    assert rows["source"].quality is not None
    assert rows["source"].quality.value > 0.8
    assert rows["quantize"].quality is not None
    assert rows["quantize"].quality.baseline == rows["source"].quality.value
    assert rows["quantize"].runtime == "onnxruntime"


def test_the_pack_answers_its_golden_samples_and_reads_images(first: OptimizeResult, store: Store) -> None:
    engine = load_engine(store, QUICK.name, first.pack, "CPUExecutionProvider", 1)
    assert engine.tested is not None
    assert (engine.tested.samples, engine.tested.agreement) == (4, 1.0)
    assert engine.front is not None
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    images = {"image": np.array([buffer.getvalue()], dtype=object)}
    shown = ProcessedEngine(engine, engine.front)
    prepared = shown.prepare(images)
    found = shown.finish(engine.infer(prepared, ["output"]), prepared, ["labels", "output"])
    logits = engine.infer({"image": pixels[None, None].astype(np.float32) / np.float32(255)}, ["output"])["output"]
    assert (found["output"] == logits).all()
    assert found["labels"][0, 0] == str(logits.argmax()).encode()


def test_a_second_run_recomputes_nothing_and_says_so(
    first: OptimizeResult, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    entries = len(pointer.history(store, QUICK.name, "champion"))
    with caplog.at_level("INFO", logger="prefect"):
        again = optimize(QUICK)
    assert again.recomputed == []
    assert all(row.reused for row in again.stages)
    assert (again.pack, again.version) == (first.pack, first.version)
    assert "everything reused, nothing recomputed" in caplog.text
    assert len(pointer.history(store, QUICK.name, "champion")) == entries
    assert len(run_records.kept(store, QUICK.name, first.pack)) == 1, "a run that did nothing is not told"


def test_mlflow_holds_the_run_tree(first: OptimizeResult, client: MlflowClient) -> None:
    parent = run_of(client, first)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["distill.train.epochs"] == str(QUICK.distill.train.epochs if QUICK.distill else 0)
    assert parent.data.metrics["published_bytes"] == first.published_bytes
    served = next(row for row in first.stages if row.stage == "quantize")
    assert served.quality is not None
    assert parent.data.metrics["served.quality.value"] == pytest.approx(served.quality.value)
    assert any(key.startswith("system/") for key in parent.data.metrics)
    found = children(client, parent)
    assert set(found) >= STAGES
    assert {"evaluate-source", "evaluate-distill", "evaluate-quantize"} <= set(found)
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert found["quantize"].data.metrics["coverage"] > 0
    assert found["prune"].data.params["sparsity"] == "0.25"
    assert found["evaluate-quantize"].data.metrics["latency.b32.p50_seconds"] > 0


def test_mlflow_holds_the_artifacts_of_the_run_and_of_each_stage(first: OptimizeResult, client: MlflowClient) -> None:
    parent = run_of(client, first)
    names = {entry.path for entry in client.list_artifacts(first.mlflow_run)}
    assert {"config.json", "result.json", "report.md", "stages.png", "report.html"} <= names
    child = children(client, parent)["quantize"]
    report = json.loads(Path(client.download_artifacts(child.info.run_id, "report.json")).read_text())
    assert report["method"].startswith("static")
    assert report["sensitivity"] is not None


def test_the_page_of_the_run_lies_beside_the_pack(first: OptimizeResult, store: Store, client: MlflowClient) -> None:
    (found,) = run_records.kept(store, QUICK.name, first.pack)
    assert found.record is not None
    told = run_records.told(store, found.record)
    assert [stage.stage for stage in told.stages][: len(first.stages)] == [row.stage for row in first.stages]
    assert told.links["MLflow run"] == first.mlflow_url
    page = run_records.read_page(store, found.record)
    assert page == Path(client.download_artifacts(first.mlflow_run, "report.html")).read_bytes()
    for text in (first.pack, "The way, stage by stage", "Where the bytes went", "conditions passed, 0 failed"):
        assert text in page.decode()
    assert len(page) < 3_000_000


def test_a_page_that_can_not_be_kept_fails_no_run(
    first: OptimizeResult, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    name = "digits-unkept"
    in_the_way = Path(Settings().store_uri, "packs", name, "runs")
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_bytes(b"")
    state = optimize(variant(name=name, promote=False), return_state=True)
    assert state.is_completed()
    result = state.result()
    (told,) = result.page_problems
    assert told.startswith(f"keeping the run, and its page, beside pack {name}@{result.pack}")
    assert "start the same recipe again" in told
    assert told in caplog.text
    run = run_of(client, result)
    assert (run.info.status, run.data.tags["page_problems"]) == ("FINISHED", told)
    logged = json.loads(Path(client.download_artifacts(result.mlflow_run, "result.json")).read_text())
    assert logged["page_problems"] == [told]
    assert result.pack in Path(client.download_artifacts(result.mlflow_run, "report.html")).read_text()
    words = Path(client.download_artifacts(result.mlflow_run, "report.md")).read_text()
    assert "**not done**: keeping the run" in words
    assert first.page_problems == []
    in_the_way.unlink()


def test_the_model_version_carries_the_packs_identity(first: OptimizeResult, client: MlflowClient) -> None:
    version = client.get_model_version(QUICK.name, first.version)
    assert version.tags["pack"] == first.pack
    assert version.tags["pack_uri"] == first.uri
    assert version.tags["flow_run_url"] == first.flow_run_url
    assert version.tags["gate.verdict"] == "pass"
    served = next(row for row in first.stages if row.stage == "quantize")
    figures = f"figures.{HARDWARE}"
    assert version.tags[f"{figures}.provider"] == "CPUExecutionProvider"
    assert float(version.tags[f"{figures}.p99_seconds"]) == pytest.approx(served.latency[0].p99_seconds, rel=1e-4)
    assert version.run_id == first.mlflow_run
    for alias in ("challenger", "champion"):
        assert client.get_model_version_by_alias(QUICK.name, alias).version == version.version
    stored = client.download_artifacts(first.mlflow_run, f"gate/version-{first.version}.json")
    assert first.decision is not None
    assert json.loads(Path(stored).read_text())["decision"] == first.decision.model_dump(mode="json")


def test_the_model_version_and_the_runs_tell_of_each_other(
    first: OptimizeResult, store: Store, client: MlflowClient
) -> None:
    """From the version to each stage's run by the digest of its output, and from the run to the version."""
    version, parent = client.get_model_version(QUICK.name, first.version), run_of(client, first)
    stages, manifest = children(client, parent), load.load_manifest(store, QUICK.name, first.pack)
    for stage in ("source", "distill", "prune", "export", "quantize", "compress"):
        digest = version.tags[f"lineage.{stage}"]
        assert stages[stage].data.tags["output_sha256"] == digest == manifest.lineage[stage]
    assert version.tags["lineage.source-onnx"] == stages["export-source"].data.tags["output_sha256"]
    assert version.tags["lineage.distill"] in stages["prune"].data.tags["inputs_sha256"]
    assert parent.data.tags["model_version"] == f"{QUICK.name}/{first.version}"
    assert parent.data.tags["pack"] == stages["register"].data.tags["pack"] == first.pack
    assert version.tags["report_uri"] == f"runs:/{first.mlflow_run}/report.md"
    report = Path(client.download_artifacts(first.mlflow_run, "report.md")).read_text()
    for link in (first.mlflow_url, first.flow_run_url, parent.data.tags["model_version_url"], first.pack):
        assert link in report
    for text in ("source (teacher)", "distill (student)", first.pack, first.mlflow_url, first.flow_run_url):
        assert text in version.description
    logged = client.get_logged_model(version.tags["logged_model"])
    assert logged.source_run_id == first.mlflow_run
    assert {metric.key: metric.value for metric in logged.metrics}["accuracy"] == float(version.tags["accuracy"])


def test_the_data_are_inputs_of_the_runs_by_their_digests(first: OptimizeResult, client: MlflowClient) -> None:
    def splits(run_id: str) -> dict[str, tuple[str, str, str]]:
        found = {}
        for one in client.get_run(run_id).inputs.dataset_inputs:
            tags = {tag.key: tag.value for tag in one.tags}
            assert one.dataset.name == QUICK.workload.data
            assert tags["sha256"].startswith(one.dataset.digest)
            found[tags["split"]] = (tags["mlflow.data.context"], tags["samples"], tags["sha256"])
        return found

    stages = children(client, run_of(client, first))
    seen = check_disjoint(load_workload(QUICK.workload))
    contexts = {"train": "training", "calibration": "calibration", "evaluation": "evaluation"}
    expected = {split: (contexts[split], str(one.samples), one.sha256) for split, one in seen.items()}
    assert splits(first.mlflow_run) == expected
    for stage, used in {"distill": "train", "quantize": "calibration", "evaluate-quantize": "evaluation"}.items():
        assert splits(stages[stage].info.run_id).items() >= {used: expected[used]}.items()
    assert splits(stages["compress"].info.run_id) == {}


def test_a_training_is_a_curve(first: OptimizeResult, client: MlflowClient) -> None:
    run = children(client, run_of(client, first))["distill"].info.run_id
    report = json.loads(Path(client.download_artifacts(run, "report.json")).read_text())
    history = client.get_metric_history(run, "train.loss")
    assert [(one.step, one.value) for one in history] == list(enumerate(report["train"]["losses"], 1))
    assert len(history) > 1


def test_mlflow_serves_the_champion(
    first: OptimizeResult, store: Store, client: MlflowClient, mlflow_server: str, tmp_path: Path
) -> None:
    session = load.open_session(store, QUICK.name, champion(store))
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name
    images = np.random.default_rng(0).random((3, *session.get_inputs()[0].shape[1:]), np.float32)
    (expected,) = session.run([output], {name: images})
    port = free_port()
    options = ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    command = ["mlflow", "models", "serve", "-m", f"models:/{QUICK.name}@champion", *options]
    url = f"http://127.0.0.1:{port}"
    path = (
        f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # it starts uvicorn by name: in a shell, activate .venv
    )
    with serving(command, f"{url}/ping", tmp_path, {"MLFLOW_TRACKING_URI": mlflow_server, "PATH": path}):
        frame = {"columns": [name], "data": [[image.ravel().tolist()] for image in images]}
        for body in ({"inputs": {name: images.tolist()}}, {"dataframe_split": frame}):
            answer = httpx.post(f"{url}/invocations", json=body, timeout=30)
            assert answer.status_code == 200, answer.text
            assert np.allclose(answer.json()["predictions"][output], expected, atol=1e-6)
        refused = httpx.post(f"{url}/invocations", json={"inputs": {"picture": [[0.0]]}}, timeout=30)
        assert refused.status_code == 400
        assert name in refused.text


def test_prefect_and_mlflow_link_to_each_other(first: OptimizeResult, client: MlflowClient) -> None:
    tags = run_of(client, first).data.tags
    flow_run = UUID(tags["prefect.flow_run_id"])
    assert tags["prefect.flow_run_url"].endswith(f"/runs/flow-run/{flow_run}")
    with get_client(sync_client=True) as prefect:
        found = prefect.read_flow_run(flow_run)
        of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run]))
        artifacts = prefect.read_artifacts(artifact_filter=of_run)
    assert found.name == "optimize-digits-quick"
    assert found.state is not None
    assert found.state.is_completed()
    by_key = {artifact.key: artifact for artifact in artifacts}
    assert first.mlflow_run in str(by_key["digits-quick-mlflow"].data)
    assert f"/#/models/digits-quick/versions/{first.version}" in str(by_key["digits-quick-version"].data)
    table = json.loads(str(by_key["digits-quick-stages"].data))
    assert [row["stage"] for row in table] == [row.stage for row in first.stages]


def variant(**changes: Any) -> OptimizeConfig:
    return OptimizeConfig.model_validate({**QUICK.model_dump(mode="json"), **changes})


def test_over_budget_stops_the_flow_and_publishes_nothing(
    first: OptimizeResult, store: Store, client: MlflowClient
) -> None:
    before = {info.key for info in store.list()}
    hasty = {**QUICK.model_dump(mode="json")["distill"], "architecture": {"channels": [1, 1], "hidden": 1}}
    strict = {**QUICK.model_dump(mode="json")["evaluate"], "max_quality_drop": 0.05}
    state = optimize(variant(distill=hasty, evaluate=strict), return_state=True)
    assert state.is_failed()
    assert state.message is not None
    assert "BudgetExceededError" in state.message
    assert "after distill" in state.message
    with pytest.raises(BudgetExceededError, match=r"evaluate\.max_quality_drop, 0\.0500"):
        state.result()
    assert {info.key for info in store.list()} == before
    experiment = run_of(client, first).info.experiment_id
    newest = client.search_runs([experiment], "tags.prefect.flow_run_id != ''", max_results=1)[0]
    assert newest.info.status == "FAILED"
    assert newest.data.tags["error"].startswith("BudgetExceededError")
    assert {"report.md", "report.html"} <= {entry.path for entry in client.list_artifacts(newest.info.run_id)}
    page = Path(client.download_artifacts(newest.info.run_id, "report.html")).read_text()
    assert "This run was stopped, and published nothing: BudgetExceededError" in page


def test_a_refused_candidate_changes_nothing_but_challenger_and_a_rollback_returns(
    first: OptimizeResult, store: Store, client: MlflowClient
) -> None:
    raw = optimize(variant(compress=None, promote=False))
    assert set(raw.recomputed) == {"compress", "shard", "upload", "register"}
    assert raw.decision is None
    assert champion(store) == first.pack

    impossible = GateConfig(margin=0.3, min_compression_ratio=100_000)
    with pytest.raises(GateError, match=r"compression ratio: fail, .* at least 100000× is asked"):
        promote(QUICK.name, raw.version, impossible)
    assert champion(store) == first.pack
    assert client.get_model_version_by_alias(QUICK.name, "champion").version == first.version
    assert client.get_model_version_by_alias(QUICK.name, "challenger").version == raw.version
    assert client.get_model_version(QUICK.name, raw.version).tags["gate.verdict"] == "fail"

    # What a promotion that was killed between MLflow's alias and the pointer leaves; started again, it ends the work.
    client.set_registered_model_alias(QUICK.name, "champion", raw.version)
    assert champion(store) == first.pack
    decision = promote(QUICK.name, "challenger")
    assert decision.promote
    assert "quality against the champion" in {check.name for check in decision.checks}
    assert champion(store) == raw.pack
    assert client.get_model_version_by_alias(QUICK.name, "champion").version == raw.version

    assert rollback(QUICK.name) == first.pack
    assert champion(store) == first.pack
    assert client.get_model_version_by_alias(QUICK.name, "champion").version == first.version
    last = pointer.history(store, QUICK.name, "champion")[-1]
    assert last.reason == "rollback"
    with pytest.raises(NotFoundError, match="an earlier pack to go back to"):
        rollback(QUICK.name)


def test_a_plan_is_a_stage_of_the_line(first: OptimizeResult, client: MlflowClient) -> None:
    """In place of `quantize`, on what the stages before it left; what it promised is what is published."""
    plan = {"max_disagreement": 0.02, "num_bits": [8, 5, 3], "group_sizes": [], "points": 3}
    planned = optimize(variant(quantize=None, plan=plan, promote=False))
    assert set(planned.recomputed) == {"plan", "evaluate plan", "compress", "shard", "upload", "register"}
    rows = {row.stage: row for row in planned.stages}
    assert list(rows)[-4:] == ["plan", "compress", "shard", "upload"]
    assert rows["plan"].runtime == "onnxruntime"
    assert rows["plan"].quality is not None
    assert planned.published_bytes < first.published_bytes

    found = {stage: run.data for stage, run in children(client, run_of(client, planned)).items()}
    assert found["plan"].metrics["coded_bytes"] == found["compress"].metrics["stored_bytes"]
    assert 0 < found["plan"].metrics["disagreement"] <= 0.02
    assert found["plan"].metrics["coverage"] == 1
    assert found["plan"].params["max_disagreement"] == "0.02"
    assert "plan.png" in {entry.path for entry in client.list_artifacts(planned.mlflow_run)}
    flow_run = UUID(run_of(client, planned).data.tags["prefect.flow_run_id"])
    with get_client(sync_client=True) as prefect:
        of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run]))
        artifacts = {artifact.key: artifact for artifact in prefect.read_artifacts(artifact_filter=of_run)}
    choices = [row["choice"] for row in json.loads(str(artifacts["digits-quick-plan"].data))]
    assert {"the plan", "8 bits, scale per tensor"} <= set(choices)
    assert optimize(variant(quantize=None, plan=plan, promote=False)).recomputed == []


def test_damaged_published_bytes_are_never_promoted(first: OptimizeResult, store: Store, client: MlflowClient) -> None:
    other = optimize(variant(shard={"max_shard_size": 24576}, promote=False))
    manifest = load.load_manifest(store, QUICK.name, other.pack)
    shard = manifest.shards[0]
    key = f"blobs/sha256/{shard.sha256}"
    good = store.get(key)
    store.put(key, bytes([good[-1] ^ 1]) + good[1:])
    try:
        with pytest.raises(CorruptionError, match=rf"reading shard 0 \({shard.sha256}\)"):
            promote(QUICK.name, other.pack)
        assert champion(store) == first.pack
    finally:
        store.put(key, good)


@pytest.mark.faults
@pytest.mark.parametrize("stage", [pytest.param("source", marks=pytest.mark.e2e), "quantize"])
def test_a_killed_run_goes_on_where_it_was_and_ends_with_the_same_digest(
    stage: str, first: OptimizeResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str
) -> None:
    monkeypatch.setenv("MODELPRESS_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    recipe = Path(__file__).parents[2] / "configs" / "digits-quick.yaml"
    process = subprocess.Popen([sys.executable, "-c", RUN.format(recipe=str(recipe))])
    try:
        records = tmp_path / "work" / "stages" / stage
        end = time.monotonic() + 120
        while not list(records.glob("*.json")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not list((tmp_path / "store").rglob("packs/**/*.json")), "nothing is published before the end"

    resumed = optimize(QUICK)
    finished = {"source"} if stage == "source" else {"source", "distill", "prune", "export", "quantize"}
    assert finished.isdisjoint(resumed.recomputed)
    assert "upload" in resumed.recomputed
    assert resumed.pack == first.pack
