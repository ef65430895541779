"""A recipe whose model is in MLflow: found by alias, pinned to its version, fetched once, and never unpickled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect.logging import disable_run_logger

from flows.optimize import optimize
from modelpress import load
from modelpress.config import OptimizeConfig
from modelpress.errors import CorruptionError, ModelpressError, NotFoundError, WorkloadError
from modelpress.reports import SourceReport
from modelpress.settings import Settings
from modelpress.store.base import open_store
from registry import sources
from tasks import models
from tasks.records import Finished
from tasks.runner import RunContext
from tests.decoders import make_decoder_folder, make_text_folder

NAME = "small-decoder"


@pytest.fixture
def settings(tmp_path: Path, mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in ("MODELPRESS_STORE", "MODELPRESS_WORK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODELPRESS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELPRESS_TRACKING_URI", mlflow_server)
    return Settings()


@pytest.fixture
def client(mlflow_server: str) -> MlflowClient:
    return MlflowClient(mlflow_server, mlflow_server)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_folder(tmp_path_factory.mktemp("texts"), ("json",))


def logged(client: MlflowClient, folder: Path, inside: str | None = "model") -> str:
    """A run with a folder as its artifact."""
    experiment = client.get_experiment_by_name("sources")
    number = experiment.experiment_id if experiment else client.create_experiment("sources")
    run: str = client.create_run(number).info.run_id
    client.log_artifacts(run, str(folder), inside)
    return run


def registered(client: MlflowClient, name: str, run: str) -> str:
    """The number of a new version with the alias `chosen`."""
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    number: str = client.create_model_version(name, f"runs:/{run}/model", run, await_creation_for=0).version
    client.set_registered_model_alias(name, "chosen", number)
    return number


def recipe(model: str, texts: Path) -> OptimizeConfig:
    return OptimizeConfig.model_validate(
        {
            "name": NAME,
            "workload": {
                "kind": "causal-lm", "model": model, "data": str(texts), "length": 16, "train_samples": 4,
                "calibration_samples": 8, "evaluation_samples": 16,
            },
            "compress": {"min_decode_bytes_per_second": 0},
            "evaluate": {"batch_sizes": [1], "latency_seconds": 0.01},
            "promote": False,
        }
    )  # fmt: skip


def test_a_run_pins_the_alias_and_notices_when_it_moves(
    prefect_server: str, settings: Settings, client: MlflowClient, tmp_path: Path, texts: Path
) -> None:
    first = registered(client, NAME + "-source", logged(client, make_decoder_folder(tmp_path / "one", texts, layers=1)))
    alias = recipe(f"models:/{NAME}-source@chosen", texts)
    result = optimize(alias)
    origin = f"models:/{NAME}-source/{first}"
    assert client.get_run(result.mlflow_run).data.tags["source_model"] == origin
    lineage = load.load_manifest(open_store(settings.store_uri), NAME, result.pack).lineage
    assert lineage[origin] == sources.fetch(settings, origin).sha256

    def source(model: str) -> Finished[SourceReport]:
        workload = sources.pin(settings, recipe(model, texts).workload)
        with disable_run_logger():
            return models.source.fn(RunContext(name=NAME, mlflow_run=result.mlflow_run, workload=workload))

    assert source(alias.workload.model).reused
    second = registered(client, NAME + "-source", logged(client, make_decoder_folder(tmp_path / "two", texts)))
    moved = source(alias.workload.model)
    assert not moved.reused
    assert moved.report.origin == f"models:/{NAME}-source/{second}"
    assert moved.report.origin_sha256 not in (None, lineage[origin])
    assert moved.report.parameters > result.source_bytes / 4
    assert source(f"mlflow://{origin}").reused  # a version stays what it was


def test_a_fetched_folder_is_checked_and_the_flavour_of_transformers_is_known(
    settings: Settings, client: MlflowClient, tmp_path: Path, texts: Path
) -> None:
    """MLflow's transformers flavour keeps the tokenizer apart; a run's artifact has its tokenizer beside it."""
    plain = make_decoder_folder(tmp_path / "plain", texts, layers=1)
    flavour = tmp_path / "flavour"
    (flavour / "components" / "tokenizer").mkdir(parents=True)
    plain.rename(flavour / "model")
    (flavour / "model" / "tokenizer.json").rename(flavour / "components" / "tokenizer" / "tokenizer.json")
    (flavour / "MLmodel").write_text("flavors: {transformers: {model_binary: model}}\n")
    (flavour / "model" / "pytorch_model.bin").write_bytes(b"never fetched")
    for name in ("1_Pooling", "onnx"):  # how sentence-transformers pools; and what is no module of theirs
        (flavour / "model" / name).mkdir()
        (flavour / "model" / name / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (flavour / "components" / "tokenizer" / "config.json").write_text("{}")  # beside the weights there is another
    run = logged(client, flavour)
    source = sources.fetch(settings, f"runs:/{run}/model")
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {path.name for path in source.folder.iterdir()}
    assert (source.folder / "1_Pooling" / "config.json").read_text() == '{"pooling_mode_cls_token": true}'
    assert "LlamaForCausalLM" in (source.folder / "config.json").read_text()
    assert not list(settings.home.rglob("*.bin")) + list(settings.home.rglob("onnx"))
    assert sources.fetch(settings, f"runs:/{run}/model") == source
    weights = source.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CorruptionError, match="delete that folder"):
        sources.fetch(settings, f"runs:/{run}/model")
    (source.folder.parent / sources.MARK).write_text("")
    with pytest.raises(CorruptionError, match=r"the digest of what was fetched(.|\n)*fix: delete"):
        sources.fetch(settings, f"runs:/{run}/model")


def test_a_run_that_went_on_is_fetched_again(
    settings: Settings, client: MlflowClient, tmp_path: Path, texts: Path
) -> None:
    """Another model of the same sizes has files of the same sizes: the end of the run tells them apart."""
    folder = make_decoder_folder(tmp_path / "model", texts, layers=1)
    run = logged(client, folder)
    client.set_terminated(run)
    first = sources.fetch(settings, f"runs:/{run}/model")
    client.update_run(run, status="RUNNING")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    client.log_artifacts(run, str(folder), "model")
    client.set_terminated(run)
    second = sources.fetch(settings, f"runs:/{run}/model")
    assert second.sha256 != first.sha256
    assert (second.folder / "model.safetensors").read_bytes() == weights.read_bytes()
    assert sources.fetch(settings, f"runs:/{run}/model") == second


@pytest.mark.parametrize(
    ("files", "kind", "said"),
    [
        (("MLmodel", "data/model.pth"), WorkloadError, r"pickled model, data/model\.pth(.|\n)*save_pretrained"),
        (("config.json", "pytorch_model.bin"), WorkloadError, r"pickled model, pytorch_model\.bin"),
        (("graph.onnx",), WorkloadError, r"graph\.onnx(.|\n)*Hugging Face folder"),
    ],
)
def test_what_is_no_folder_of_safetensors_is_refused_by_name(
    settings: Settings,
    client: MlflowClient,
    tmp_path: Path,
    files: tuple[str, ...],
    kind: type[ModelpressError],
    said: str,
) -> None:
    for name in files:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(json.dumps({}))
    with pytest.raises(kind, match=said):
        sources.fetch(settings, f"runs:/{logged(client, tmp_path / 'in')}/model")
    assert not (settings.home / "models").exists()


def test_names_that_mean_nothing_are_said(settings: Settings, client: MlflowClient, texts: Path) -> None:
    def pin(model: str) -> None:
        sources.pin(settings, recipe(model, texts).workload)

    with pytest.raises(WorkloadError, match=r"expected: models:/NAME/VERSION"):
        pin("models:/nobody/latest")
    with pytest.raises(NotFoundError, match="no such model or alias"):
        pin("models:/nobody@champion")
    with pytest.raises(NotFoundError, match="no such version"):
        pin("mlflow://models:/nobody/3")
    with pytest.raises(NotFoundError, match="looking for runs:/"):
        sources.fetch(settings, f"runs:/{'0' * 32}/model")
    client.create_registered_model("packed")
    number = client.create_model_version("packed", "pack-file:///x", tags={"pack": "ab" * 32}).version
    with pytest.raises(WorkloadError, match=r"that modelpress published(.|\n)*lineage"):
        sources.fetch(settings, f"models:/packed/{number}")
