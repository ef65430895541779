"""A registered version is a model that MLflow loads: the pack from the store, verified, and nothing of it in MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from onnx import TensorProto, helper, numpy_helper

from modelpress import graph, load
from modelpress.checkpoint import Checkpoint
from modelpress.errors import ConfigError, CorruptionError, NotFoundError, UnsignedError, WorkloadError
from modelpress.settings import Settings
from modelpress.store.local import LocalStore
from registry import runs, versions
from registry.loadable import MODEL_TYPE, log_pack
from registry.pack_model import PackConfig
from registry.versions import Version
from tests.databases import Databases
from tests.packs import Pack, make_pack, onnx_checkpoint
from tests.trust.teams import Team

CITIES = np.arange(300, dtype=np.float32) / 2
"""Large enough to be no part of the graph itself."""


def persons_checkpoint() -> Checkpoint:
    """A graph of columns: age (n), income (n, 1) and city (n), which is looked up in a table."""
    named = helper.make_tensor_value_info
    inputs = [
        named("age", TensorProto.FLOAT, ["n"]),
        named("income", TensorProto.FLOAT, ["n", 1]),
        named("city", TensorProto.INT64, ["n"]),
    ]
    nodes = [
        helper.make_node("Gather", ["cities", "city"], ["rent"]),
        helper.make_node("Add", ["age", "rent"], ["both"]),
        helper.make_node("Squeeze", ["income", "last"], ["flat"]),
        helper.make_node("Add", ["both", "flat"], ["score"]),
    ]
    weights = [numpy_helper.from_array(CITIES, "cities"), numpy_helper.from_array(np.array([1], np.int64), "last")]
    body = helper.make_graph(nodes, "persons", inputs, [named("score", TensorProto.FLOAT, ["n"])], weights)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return graph.split(model)


@dataclass
class Registry:
    """MLflow on a database in a folder, and a store beside it that the environment names."""

    folder: Path
    client: MlflowClient
    store: LocalStore
    experiment: str

    def register(self, pack: Pack) -> Version:
        """Published, registered, and champion."""
        pack.publish(self.store)
        run, name = self.client.create_run(self.experiment).info.run_id, pack.manifest.name
        config = PackConfig(name=name, pack=pack.digest, uri=f"{self.store.uri}/packs/{name}/{pack.digest}.json")
        version, made = versions.register(
            self.client,
            name,
            pack=pack.digest,
            uri=config.uri,
            run_id=run,
            tags={},
            measured={},
            description="",
            log=lambda: log_pack(self.client, self.experiment, run, self.store, config, {"lineage": "test"}),
        )
        assert made
        versions.set_alias(self.client, version, "champion")
        return versions.by_number(self.client, name, version.number)

    def files(self, version: Version) -> dict[str, bytes]:
        """What was logged of a version."""
        found = Path(
            self.client.get_logged_model(version.tags["logged_model"]).artifact_location.removeprefix("file://")
        )
        return {
            path.relative_to(found).as_posix(): path.read_bytes()
            for path in found.rglob("*")
            # Loading from this very folder leaves these there.
            if path.is_file() and path.suffix != ".pyc" and path.name != "registered_model_meta"
        }


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, databases: Databases) -> Iterator[Registry]:
    folder = tmp_path_factory.mktemp("loadable")
    settings = Settings(home=folder, tracking_uri=databases.mlflow(folder))
    client = runs.open_client(settings)
    experiment = client.create_experiment("packs", artifact_location=(folder / "artifacts").as_uri())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", settings.mlflow_uri)
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        patch.setenv("MODELPRESS_HOME", str(folder))
        for name in ("MODELPRESS_STORE", "MODELPRESS_TRUST", "MODELPRESS_CACHE"):
            patch.delenv(name, raising=False)
        yield Registry(folder, client, LocalStore(folder / "store"), experiment)


@pytest.fixture(scope="module")
def matrix(registry: Registry) -> tuple[Pack, Version]:
    pack = make_pack(registry.folder / "matrix", onnx_checkpoint(), name="matrix")
    return pack, registry.register(pack)


@pytest.fixture(scope="module")
def persons(registry: Registry) -> mlflow.pyfunc.PyFuncModel:
    version = registry.register(make_pack(registry.folder / "persons", persons_checkpoint(), name="per.sons"))
    return mlflow.pyfunc.load_model(f"models:/per.sons/{version.number}")


def test_a_version_that_is_loaded_by_its_alias_answers_as_the_published_graph(
    registry: Registry, matrix: tuple[Pack, Version]
) -> None:
    x = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    expected = load.open_session(registry.store, "matrix", matrix[0].digest).run(["y"], {"x": x})[0]
    model = mlflow.pyfunc.load_model("models:/matrix@champion")
    frame = pd.DataFrame({"x": x.tolist()})
    for given in ({"x": x}, x, frame):
        assert np.array_equal(model.predict(given)["y"], expected)
    assert model.predict(model.input_example)["y"].shape == (1, 64)
    assert model.metadata.metadata["pack"] == matrix[0].digest


def test_mlflow_has_a_script_and_a_signature_and_no_weight(registry: Registry, matrix: tuple[Pack, Version]) -> None:
    pack, version = matrix
    files = registry.files(version)
    assert {"MLmodel", "pack.py", "input_example.json", "requirements.txt"} <= set(files)
    assert all(name.endswith((".py", ".json", ".txt", ".yaml", "MLmodel")) for name in files)
    assert sum(map(len, files.values())) < 20_000 < sum(shard.size_bytes for shard in pack.manifest.shards)
    assert pack.digest.encode() in files["MLmodel"]
    logged = registry.client.get_logged_model(version.tags["logged_model"])
    assert (logged.status.value, logged.model_type, logged.name) == ("READY", MODEL_TYPE, "matrix")
    assert logged.tags | {"pack": pack.digest, "model_version": f"matrix/{version.number}"} == logged.tags
    outputs = registry.client.get_run(version.run_id).outputs.model_outputs
    assert [one.model_id for one in outputs] == [logged.model_id]


def test_frames_of_numbers_are_taken_column_by_column(persons: mlflow.pyfunc.PyFuncModel) -> None:
    frame = pd.DataFrame({"city": [2, 0, 1], "income": [10.0, 20.0, 30.0], "age": [1, 2, 3]})
    assert persons.predict(frame)["score"].tolist() == [12.0, 22.0, 33.5]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"city": None}, r"missing inputs \['city'\]"),
        ({"city": np.zeros(2, np.int32)}, r"dtype of input int32 does not match expected dtype int64"),
        ({"income": np.zeros(2, np.float32)}, r"Shape of input \(2,\) does not match expected shape \(-1, 1\)"),
        ({"city": np.zeros(3, np.int64)}, r"axis 'n' of 2 in age, of 3 in city"),
        ({"city": np.array([0, 999])}, r"running the graph(.|\n)*999(.|\n)*values and sizes that it can run on"),
    ],
)
def test_what_the_graph_does_not_take_is_an_error_that_names_it(
    persons: mlflow.pyfunc.PyFuncModel, changes: dict[str, np.ndarray | None], said: str
) -> None:
    good = {"age": np.zeros(2, np.float32), "income": np.zeros((2, 1), np.float32), "city": np.zeros(2, np.int64)}
    given = {name: array for name, array in {**good, **changes}.items() if array is not None}
    with pytest.raises(MlflowException, match=said) as refused:
        persons.predict(given)
    assert refused.value.get_http_status_code() == 400
    assert persons.predict(good)["score"].tolist() == [0.0, 0.0]


def test_what_is_not_what_was_registered_is_not_loaded(
    registry: Registry, matrix: tuple[Pack, Version], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, version = matrix
    uri = f"models:/matrix/{version.number}"
    key = f"blobs/sha256/{pack.manifest.shards[0].sha256}"
    good = registry.store.get(key)
    registry.store.put(key, good[:-1] + bytes([good[-1] ^ 1]))
    try:
        with pytest.raises(CorruptionError, match=pack.manifest.shards[0].sha256):
            mlflow.pyfunc.load_model(uri)
    finally:
        registry.store.put(key, good)
    with pytest.raises(ConfigError, match=r"threads: .*greater than or equal to 0"):
        mlflow.pyfunc.load_model(uri, model_config={"threads": -1})
    monkeypatch.setenv("MODELPRESS_TRUST", str(Team(tmp_path, farm="publisher").path))
    with pytest.raises(UnsignedError, match="matrix"):
        mlflow.pyfunc.load_model(uri)
    monkeypatch.delenv("MODELPRESS_TRUST")
    monkeypatch.setenv("MODELPRESS_STORE", str(tmp_path / "elsewhere"))
    with pytest.raises(NotFoundError, match=rf"elsewhere(.|\n)*{pack.digest}\.json(.|\n)*set MODELPRESS_STORE"):
        mlflow.pyfunc.load_model(uri)


def test_a_pack_without_a_graph_says_how_it_is_loaded(registry: Registry) -> None:
    checkpoint = Checkpoint("torch", {"weight": torch.arange(12.0).reshape(3, 4)}, {}, {"architecture": {}})
    pack = make_pack(registry.folder / "torch", checkpoint, name="tensors")
    version = registry.register(pack)
    with pytest.raises(WorkloadError, match=r"of kind torch(.|\n)*modelpress\.load\.state_dict") as refused:
        mlflow.pyfunc.load_model(f"models:/tensors/{version.number}")
    call = str(refused.value.fix).partition("modelpress.")[2].partition(", into")[0]
    found = eval(call, {"load": load})
    assert torch.equal(found["weight"], checkpoint.tensors["weight"])


def test_a_model_that_could_not_be_logged_is_failed_and_no_version(registry: Registry) -> None:
    (registry.folder / "a-file").write_bytes(b"")
    experiment = registry.client.create_experiment("broken", artifact_location=(registry.folder / "a-file").as_uri())
    broken = Registry(registry.folder, registry.client, registry.store, experiment)
    with pytest.raises((OSError, MlflowException)):
        broken.register(make_pack(registry.folder / "broken", onnx_checkpoint(1), name="broken"))
    (logged,) = registry.client.search_logged_models([experiment])
    assert logged.status.value == "FAILED"
    assert registry.client.search_model_versions("name = 'broken'") == []
