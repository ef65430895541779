"""How stages run: what a flow run reads once, what it checks each time, and what a measurement is keyed by."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from modelpress.config import EvaluateConfig, ProfileConfig, WorkloadConfig
from modelpress.errors import OverlapError
from modelpress.providers import CUDA, MIGRAPHX, VITIS_AI, Provider, on_gpu
from modelpress.reports import ArtifactRef
from modelpress.settings import Settings
from registry import runs
from tasks import evaluation, models, profiling
from tasks.runner import RunContext, open_workload
from tests.databases import Databases


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("1 2\n3 4\n5 6\n")
    return path


@pytest.fixture
def workload(data: Path) -> WorkloadConfig:
    factory = "tests.tasks.data_on_disk:OnDisk"
    return WorkloadConfig(kind="custom", factory=factory, options={"path": str(data)}, calibration_samples=1)


def test_a_workload_is_read_once_in_a_flow_run_and_afresh_in_the_next(data: Path, workload: WorkloadConfig) -> None:
    first = open_workload(workload, "run-1")
    data.write_text("1 2\n3 4\n7 8\n")
    assert open_workload(workload, "run-1") is first
    assert open_workload(workload, "run-2").identity() != first.identity()


@pytest.fixture
def context(
    tmp_path: Path, workload: WorkloadConfig, monkeypatch: pytest.MonkeyPatch, databases: Databases
) -> Iterator[Callable[[], RunContext]]:
    """A new flow run's context, over one work store and one MLflow database."""
    databases.mlflow(tmp_path / "home")
    monkeypatch.setenv("MODELPRESS_HOME", str(tmp_path / "home"))
    for name in ("MODELPRESS_WORK", "MODELPRESS_STORE", "MODELPRESS_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    client = runs.open_client(Settings())
    experiment = client.create_experiment("stages", artifact_location=(tmp_path / "artifacts").as_uri())

    def make() -> RunContext:
        return RunContext(name="stages", mlflow_run=client.create_run(experiment).info.run_id, workload=workload)

    with disable_run_logger():  # the tasks' functions run here without a flow
        yield make


def test_overlap_is_found_also_where_the_source_is_taken_from_an_earlier_run(
    context: Callable[[], RunContext], data: Path
) -> None:
    assert not models.source.fn(context()).reused
    assert models.source.fn(context()).reused
    lines = data.read_text().splitlines() * 2
    data.write_text("\n".join(lines))
    again = context()
    assert not models.source.fn(again).reused
    # The same lines in another order: this workload's identity stays, and two splits share a sample now.
    data.write_text("\n".join([lines[1], *lines[:1], *lines[2:]]))
    with pytest.raises(OverlapError, match="train and calibration"):
        models.source.fn(context())


def test_a_measurement_of_another_machine_is_not_taken_and_the_model_is(
    context: Callable[[], RunContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvaluateConfig(batch_sizes=[1], latency_seconds=0.01)

    def run() -> tuple[bool, bool]:
        here = context()
        source = models.source.fn(here)
        return source.reused, evaluation.evaluate.fn(here, source.output, config, "source", "source").reused

    assert run() == (False, False)
    assert run() == (True, True)
    here = evaluation.host_fingerprint()
    assert here["processor"]
    assert here["cores"]
    monkeypatch.setattr(evaluation, "host_fingerprint", lambda: here | {"cores": 512})
    assert run() == (True, False)


def test_a_damaged_output_is_mended_by_a_run_that_reuses_nothing(
    context: Callable[[], RunContext], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output: ArtifactRef = models.source.fn(context()).output
    place = Path(output.uri.removeprefix("file://"))
    good = place.read_bytes()
    place.chmod(0o644)
    place.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    assert models.source.fn(context()).reused
    monkeypatch.setenv("MODELPRESS_REUSE", "false")
    assert not models.source.fn(context()).reused
    assert place.read_bytes() == good


@pytest.mark.parametrize("stage", ["evaluate", "profile"])
def test_a_gpu_is_held_for_a_gpus_provider_and_what_the_machine_tells_it_is_part_of_the_key(
    stage: str, workload: WorkloadConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}
    for module in (evaluation, profiling):
        monkeypatch.setattr(module, "run_stage", lambda *_, **given: asked.update(given))
    context = RunContext(name="stages", mlflow_run="none", workload=workload)
    graph = ArtifactRef(uri="file:///graph", sha256="0" * 64, size_bytes=1)

    def run(provider: Provider, label: str = "quantize") -> tuple[bool, object]:
        if stage == "evaluate":
            evaluation.evaluate.fn(context, graph, EvaluateConfig(provider=provider), "quantize", label)
        else:
            profiling.profile.fn(context, graph, graph, ProfileConfig(provider=provider), None)
        extra = asked["extra"]
        assert isinstance(extra, dict)
        return asked["gpu"] is not None, extra.get("provider_options")

    for provider in typing.get_args(Provider):
        assert run(provider) == (on_gpu(provider), None)
    options = {"migraphx_fp16_enable": "1"}
    monkeypatch.setenv("MODELPRESS_PROVIDER_OPTIONS", json.dumps({MIGRAPHX: options}))
    assert run(MIGRAPHX) == (True, options)
    assert run(CUDA) == (True, None)
    assert run(VITIS_AI) == (False, None)
    if stage == "evaluate":
        assert run(MIGRAPHX, "source") == (False, None), "a torch module is measured on the CPU"
