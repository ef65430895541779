"""A published pack as MLflow runs it: what `mlflow.pyfunc.load_model` and `mlflow models serve` find behind a version.

What MLflow keeps of a version is a script that names the class below, the pack's name and digest, a signature and an
example; never a weight. The pack is read from the store that the environment names, every byte is checked, and with
`MODELPRESS_TRUST` its signatures before them.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from onnxruntime.capi import onnxruntime_pybind11_state as native
from pydantic import Field, StringConstraints, ValidationError

from modelpress import load
from modelpress.config.base import Config, PackName
from modelpress.errors import ConfigError, NotFoundError, WorkloadError
from modelpress.providers import CPU, Provider
from modelpress.settings import read_settings
from modelpress.store.base import Store, open_store
from registry import tensors

REFUSALS = (native.Fail, native.InvalidArgument, native.NotImplemented, native.RuntimeException)
"""What ONNX Runtime says of values that it can't run on: an index outside of a table, sizes that don't fit."""


class PackConfig(Config):
    """What a model version says of its pack, and how it is run: `load_model(uri, model_config={"threads": 1})`."""

    name: PackName
    """Name of the pack."""
    pack: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Digest of its manifest."""
    uri: str
    """Where it was published; it is read from the store that the environment names."""
    provider: Provider = CPU
    """Execution provider of ONNX Runtime that must be in use."""
    threads: int = Field(default=0, ge=0)
    """Threads per inference; 0 takes the cores that this process may use."""


class PackModel(PythonModel):
    """One pack, fetched and verified when it is loaded. Safe to call from threads."""

    def load_context(self, context: PythonModelContext) -> None:
        """Fetch the pack, check every digest, and make a session from memory.

        Raises:
            ConfigError: the version does not say which pack it is, or a setting is not legal.
            NotFoundError: the store has no such pack; where it was published is named.
            WorkloadError: a pack of tensors without a graph.
            and see `load.open_session`.
        """
        config = _config(context.model_config)
        settings = read_settings()
        store = open_store(settings.store_uri, settings)
        _check_kind(store, config)
        self._session = load.open_session(store, config.name, config.pack, config.provider, config.threads)
        self._inputs = tensors.of_session(self._session)
        self._outputs = [one.name for one in self._session.get_outputs()]

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002
        # MLflow makes a schema out of an annotation, but not of this one; what comes is a dict of arrays, or a frame of
        # which it has made one by the signature.
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> dict[str, np.ndarray]:
        """The outputs by name.

        Raises:
            MlflowException: other inputs than the graph's, or values that it can't run on; the input is named.
        """
        try:
            inputs = tensors.check(self._inputs, model_input)
            try:
                found = self._session.run(self._outputs, inputs)
            except REFUSALS as error:
                raise WorkloadError(
                    "running the graph", found=str(error)[:300], expected="values and sizes that it can run on"
                ) from error
        except WorkloadError as error:
            # As MLflow's own error its text reaches the client of `mlflow models serve`.
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return dict(zip(self._outputs, found, strict=True))


def _config(found: object) -> PackConfig:
    try:
        return PackConfig.model_validate(found)
    except ValidationError as error:
        raise ConfigError(
            "reading the configuration of a model version",
            found="; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()),
            expected="what modelpress wrote: name, pack, uri, provider, threads",
        ) from error


def _check_kind(store: Store, config: PackConfig) -> None:
    """Refuse a pack that is not there, and one that nothing here can run."""
    try:
        manifest = load.load_manifest(store, config.name, config.pack)
    except NotFoundError as error:
        raise NotFoundError(
            f"loading {config.name}, pack {config.pack}, from {store.uri}",
            found=error.found or "no such pack",
            expected=f"the store where it was published as {config.uri}",
            fix="set MODELPRESS_STORE to that store, and MODELPRESS_S3_ENDPOINT_URL where it is not on AWS",
        ) from error
    if manifest.kind != "onnx":
        raise WorkloadError(
            f"loading {config.name}, pack {config.pack}, as a model that answers",
            found=f"a pack of kind {manifest.kind}: tensors by name, and no graph that says how to run them",
            expected="a pack of kind onnx",
            fix=f"load the tensors, modelpress.load.state_dict({store.uri!r}, {config.name!r}, {config.pack!r}), into "
            "a module of your own",
        )
