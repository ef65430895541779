"""A loaded model: a pack whose every byte was checked, as an ONNX Runtime session that has run once."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from modelpress import graph, load
from modelpress.errors import ServingError
from modelpress.store import Store
from serving.protocol import DATATYPES, RequestError, TensorSpec

log = logging.getLogger("modelpress.serving")

WARM_UP_SIZES = (1, 32, 256)
"""Tried in turn for axes other than the first that may differ per call: some models need more than one pixel."""

_ONNX_TYPES = {
    "bool": "BOOL",
    "float16": "FP16",
    "float": "FP32",
    "double": "FP64",
    **{name.lower(): name for name in DATATYPES if "INT" in name},
}
_REFUSALS = (
    native.EPFail,
    native.Fail,
    native.InvalidArgument,
    native.NotImplemented,
    native.RuntimeException,
)


class Engine:
    """One pack, ready to answer. Safe to call from threads.

    A request holds its engine until it is answered, so an engine that was replaced goes away with its last request.
    """

    def __init__(self, pack: str, session: onnxruntime.InferenceSession) -> None:
        self.pack = pack
        """Digest of the manifest: the version that clients see."""
        self.provider: str = session.get_providers()[0]
        """Execution provider in use."""
        self.inputs = [_spec(node) for node in session.get_inputs()]
        self.outputs = [_spec(node) for node in session.get_outputs()]
        self._session = session

    def infer(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Run the model on checked inputs.

        Raises:
            RequestError: the model can't run on these values (an index outside a table, sizes that don't fit).
        """
        try:
            found = self._session.run(list(outputs), dict(inputs))
        except _REFUSALS as error:
            # ONNX Runtime's own text names its source files: for the log, not for the client.
            log.warning("pack %s refused a request: %s", self.pack[:12], error)
            raise RequestError(
                "running the model", found="values or sizes that it can't run on", expected="inputs like its examples"
            ) from error
        return dict(zip(outputs, found, strict=True))

    def warm_up(self) -> None:
        """Run once on ones: first calls are slow, and a model that never runs must not become the one that answers.

        Raises:
            ServingError: it runs on none of the sizes tried.
        """
        names = [spec.name for spec in self.outputs]
        refusal: RequestError | None = None
        for size in WARM_UP_SIZES:
            try:
                self.infer({spec.name: _ones(spec, size) for spec in self.inputs}, names)
                return
            except RequestError as error:
                refusal = error
        raise ServingError(f"warming up pack {self.pack}", found=str(refusal), expected="an answer") from refusal


def load_engine(store: Store, name: str, pack: str, provider: str, threads: int) -> Engine:
    """Fetch a pack, check every digest in it, make a session, run it once.

    Raises:
        ModelpressError: whatever is wrong with the store, the bytes, the graph or the provider; see `modelpress.load`
            and `modelpress.graph.session`.
    """
    started = time.perf_counter()
    _, checkpoint = load.load_checkpoint(store, name, pack)
    engine = Engine(pack, graph.session(checkpoint, provider, threads))
    engine.warm_up()
    log.info("loaded %s, pack %s, in %.2f s", name, pack[:12], time.perf_counter() - started)
    return engine


def _spec(node: onnxruntime.NodeArg) -> TensorSpec:
    datatype = _ONNX_TYPES.get(node.type.removeprefix("tensor(").removesuffix(")"))
    if datatype is None:
        raise ServingError(
            f"reading the type of {node.name!r}", found=node.type, expected=f"a tensor of {', '.join(_ONNX_TYPES)}"
        )
    return TensorSpec(node.name, datatype, tuple(node.shape))


def _ones(spec: TensorSpec, size: int) -> np.ndarray:
    batch = [length if isinstance(length, int) else 1 for length in spec.shape[:1]]
    rest = [length if isinstance(length, int) else size for length in spec.shape[1:]]
    return np.ones(batch + rest, DATATYPES[spec.datatype])
