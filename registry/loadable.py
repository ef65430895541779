"""What MLflow keeps of a pack so that it can be loaded by version and alias: models-from-code, a few kilobytes.

A logged model of MLflow's is a folder: here a script of three lines, the pack's name and digest, signature and input
example. They are made from the graph alone; nothing is pickled, and no weight is read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import mlflow.pyfunc
import onnx
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from modelpress import __version__, graph, load
from modelpress.checkpoint import Checkpoint
from modelpress.manifest import Manifest
from modelpress.pack_files import unpack_file
from modelpress.store.base import Store
from modelpress.store.local import local_errors
from registry import tensors
from registry.pack_model import PackConfig

MODEL_TYPE = "modelpress pack"
"""By which these are found among an experiment's logged models."""
SCRIPT = '''"""What MLflow runs to load this model version: the installed modelpress fetches and verifies its pack."""

from mlflow.models import set_model

from registry.pack_model import PackModel

set_model(PackModel())
'''


def log_pack(
    client: MlflowClient, experiment_id: str, run_id: str, store: Store, config: PackConfig, tags: Mapping[str, str]
) -> LoggedModel:
    """Log a published pack as a model of a run, and return it; it is ready when all of it is there.

    Args:
        client: MLflow.
        experiment_id: the run's experiment.
        run_id: the run that the pack comes from.
        store: where it is published; its graph is read there.
        config: which pack.
        tags: of the logged model.

    Raises:
        NotFoundError: no such pack.
        CorruptionError: the graph is not what the manifest says.
        WorkloadError: an input or an output that MLflow can't describe.
    """
    manifest = load.load_manifest(store, config.name, config.pack)
    found = _graph(store, manifest)
    model = client.create_logged_model(
        experiment_id,
        name=config.name.replace(".", "-"),  # MLflow takes no dot here, though it does in a registered model's name
        source_run_id=run_id,
        tags={"pack": config.pack, "pack_uri": config.uri, **tags},
        params={"pack": config.pack, "kind": manifest.kind},
        model_type=MODEL_TYPE,
    )
    with ExitStack() as stack:
        stack.push(partial(_failed, client, model.model_id))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modelpress-")))
        with local_errors(f"writing an MLflow model into {folder}", writing=True):
            saved = save(folder, config, found, Model(run_id=run_id, model_id=model.model_id))
        client.log_model_artifacts(model.model_id, str(saved))
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        return client.finalize_logged_model(model.model_id, "READY")


def save(folder: Path, config: PackConfig, found: onnx.ModelProto | None, model: Model) -> Path:
    """Write the MLflow model into a folder below an empty one, and return that.

    Args:
        folder: an empty folder.
        config: which pack.
        found: the graph, which the signature and the example are made from; None of a pack without one.
        model: what MLflow's file `MLmodel` is made from.
    """
    script, saved, nothing = folder / "pack.py", folder / "model", folder / "nothing"
    script.write_text(SCRIPT, encoding="utf-8")
    nothing.mkdir()
    described: dict[str, Any] = {}
    if found is not None:
        inputs, outputs = tensors.of_graph(found)
        described["signature"] = ModelSignature(_schema(inputs), _schema(outputs))
        described["input_example"] = {one.name: one.example() for one in inputs}
    mlflow.pyfunc.save_model(
        saved,
        mlflow_model=model,
        python_model=script,
        model_config=config.model_dump(mode="json"),
        metadata={"pack": config.pack, "pack_uri": config.uri},
        pip_requirements=[f"modelpress=={__version__}"],  # given, or MLflow would load the model to guess them
        uv_project_path=nothing,  # MLflow would add the lock file of the folder that this process was started in
        **described,
    )
    return saved


def _schema(described: list[tensors.Tensor]) -> Schema:
    return Schema(
        [
            TensorSpec(one.dtype, tuple(size if isinstance(size, int) else -1 for size in one.shape), one.name)
            for one in described
        ]
    )


def _graph(store: Store, manifest: Manifest) -> onnx.ModelProto | None:
    """The graph of a pack, without its weights; None of a pack that has none."""
    entry = next((entry for entry in manifest.files if entry.name == graph.GRAPH_FILE), None)
    if manifest.kind != "onnx" or entry is None:
        return None
    data = unpack_file(entry, load.fetcher(store, manifest)(entry.stored_sha256))
    return graph.parse(Checkpoint("onnx", {}, {graph.GRAPH_FILE: data}))


def _failed(
    client: MlflowClient,
    model_id: str,
    kind: type[BaseException] | None,
    _error: BaseException | None,
    _trace: TracebackType | None,
) -> None:
    """Say of a model that was not logged to its end that it failed."""
    if kind is not None:
        client.finalize_logged_model(model_id, "FAILED")
