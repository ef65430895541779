"""A loaded model: a pack whose every byte was checked, as an ONNX Runtime session that has run once."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from modelpress import golden, graph, load
from modelpress.cache import BlobCache, open_cache
from modelpress.errors import CorruptionError, SelfTestError, ServingError
from modelpress.golden import GOLDEN_FILE, Golden, Outcome
from modelpress.providers import is_of
from modelpress.store import Store
from serving.processed import Front
from serving.refusals import NotReadyError, RequestError
from serving.rows import UNTRIED, examine
from serving.tensors import DATATYPES, TensorSpec

log = logging.getLogger("modelpress.serving")

WARM_UP_SIZES = (1, 32, 256)
"""Tried in turn for axes other than the first that may differ per call: some models need more than one pixel."""
MAX_WARM_UP_BYTES = 2**28
"""Shapes are the pack's own word: an input that declares more is not made."""
MAX_RANK = 32
"""What every numpy can hold."""
TUNING = graph.Tuning(spinning=False)
"""Of ONNX Runtime's session, by `benchmarks/serving_threads.py`: threads that spin take cores from the event loop."""

_ONNX_TYPES = {
    "bool": "BOOL",
    "float16": "FP16",
    "float": "FP32",
    "double": "FP64",
    **{name.lower(): name for name in DATATYPES if "INT" in name},
}
_FAILURES = (*graph.LOST_DEVICE, native.Fail, native.NotImplemented, native.RuntimeException)
"""What may be the request's fault (sizes that don't fit) or the machine's (no memory, a lost device)."""
_NO_MEMORY = ("allocat", "out of memory", "bad_alloc")


class Engine:
    """One pack, ready to answer. Safe to call from threads.

    A request holds its engine until it is answered, so an engine that was replaced goes away with its last request.
    """

    def __init__(
        self, pack: str, session: onnxruntime.InferenceSession, lineage: Mapping[str, Any] | None = None
    ) -> None:
        self.pack = pack
        """Digest of the manifest: the version that clients see."""
        self.provider: str = session.get_providers()[0]
        """Execution provider in use."""
        self.inputs = [_spec(node) for node in session.get_inputs()]
        self.outputs = [_spec(node) for node in session.get_outputs()]
        self.broken = False
        """It does not even answer what it answered at its warm-up: it must be loaded again."""
        self.tested: Outcome | None = None
        """How it answered its golden samples; None where its pack has none."""
        self.front: Front | None = None
        """The processing that its pack brings, for who sends texts or images; None where it brings none."""
        self.lineage = dict(lineage or {})
        """Where the manifest says that it comes from."""
        self.rows = UNTRIED
        """Whether requests may be joined."""
        self.row_seconds = 0.0
        """What a row takes, as last measured; belongs to whoever joins requests."""
        self._session = session
        self._device = "cuda" if is_of("cuda", self.provider) else None
        self._known: dict[str, np.ndarray] = {}
        self._probing = threading.Lock()

    def infer(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Run the model on checked inputs.

        Raises:
            RequestError: the model can't run on these values (an index outside a table, sizes that don't fit).
            NotReadyError: the machine can't run it, or not on so much.
        """
        try:
            answers = self._run(list(outputs), dict(inputs))
        except native.InvalidArgument as error:
            self._log_refusal(error)
            raise _refused() from error
        except (*_FAILURES, MemoryError) as error:
            self._log_refusal(error)
            self._probe()
            if self.broken or _lacks_memory(error) or isinstance(error, graph.LOST_DEVICE):
                found = "that its execution provider failed" if self.broken else "too little memory, or a busy device"
                raise NotReadyError("running the model", found=found, expected="another try later") from error
            raise _refused() from error
        return dict(zip(outputs, answers, strict=True))

    def self_test(self, samples: Golden) -> None:
        """Ask what was asked when the pack was published, and compare.

        Raises:
            SelfTestError: it does not run on the samples, or answers otherwise; see `golden.check`.
        """
        doing = f"testing pack {self.pack} on its golden samples"
        names = {spec.name for spec in self.inputs}
        if set(samples.inputs) != names:
            raise SelfTestError(doing, found=f"samples of {sorted(samples.inputs)}", expected=f"of {sorted(names)}")
        try:
            answers = self._run([spec.name for spec in self.outputs], samples.inputs)
        except (native.InvalidArgument, *_FAILURES, MemoryError) as error:
            raise SelfTestError(doing, found=str(error) or type(error).__name__, expected="an answer") from error
        found = dict(zip((spec.name for spec in self.outputs), answers, strict=True))
        self.tested, self._known = golden.check(samples, found, doing), samples.inputs

    def warm_up(self) -> None:
        """Run once, on the golden samples or on ones: first calls are slow, and a model that never runs must not become
        the one that answers.

        Raises:
            ServingError: it gives finite numbers for none of the sizes tried.
        """
        if self._known:
            failure = self._failure()
            if failure is not None:
                raise ServingError(
                    f"warming up pack {self.pack}", found=failure, expected="an answer of finite numbers"
                )
            return
        problem = f"inputs of more than {MAX_WARM_UP_BYTES} bytes"
        for size in WARM_UP_SIZES:
            if sum(_ones_bytes(spec, size) for spec in self.inputs) > MAX_WARM_UP_BYTES:
                break
            self._known = {spec.name: _ones(spec, size) for spec in self.inputs}
            found = self._failure()
            if found is None:
                return
            problem = found
        raise ServingError(f"warming up pack {self.pack}", found=problem, expected="an answer of finite numbers")

    def learn_rows(self) -> None:
        """Find out whether requests may be joined; after the warm-up."""
        operators = getattr(self._session, "operators", None)
        if operators is None:  # a session of another make: its graph can't be looked at
            return
        self.rows = examine(self.inputs, self.outputs, operators, self._answers, self._known)
        self.row_seconds = self.rows.seconds

    def _answers(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        """Answers to a trial; None where it can't run on it."""
        names = [spec.name for spec in self.outputs]
        try:
            return dict(zip(names, self._run(names, inputs), strict=True))
        except (native.InvalidArgument, *_FAILURES, MemoryError):
            return None

    def _run(self, outputs: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        if self._device is None:
            found: list[np.ndarray] = self._session.run(outputs, inputs)
            return found
        # Bound to the device, inputs are copied once and outputs are made there, in the arena of the provider.
        binding = self._session.io_binding()
        for name, array in inputs.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, self._device, 0)
        self._session.run_with_iobinding(binding)
        bound: list[np.ndarray] = binding.copy_outputs_to_cpu()
        return bound

    def _failure(self) -> str | None:
        """What is wrong with the answer to the known inputs; None: nothing."""
        try:
            answers = self._run([spec.name for spec in self.outputs], self._known)
        except (native.InvalidArgument, *_FAILURES, MemoryError) as error:
            return str(error) or type(error).__name__
        for spec, answer in zip(self.outputs, answers, strict=True):
            if answer.dtype.kind == "f" and not np.isfinite(answer).all():
                return f"NaN or infinity in output {spec.name!r}"
        return None

    def _probe(self) -> None:
        """Find out whether a failure was the request's or ours: a request must not take a sound model down."""
        with self._probing:
            if not self.broken and (failure := self._failure()) is not None:
                log.error("pack %s does not run any more: %s", self.pack[:12], failure)
                self.broken = True

    def _log_refusal(self, error: Exception) -> None:
        # ONNX Runtime's own text names its source files: for the log, not for the client.
        log.warning("pack %s refused a request: %s", self.pack[:12], error)


def load_engine(
    store: Store, name: str, pack: str, provider: str, threads: int, cache: BlobCache | None = None
) -> Engine:
    """Fetch a pack, check every digest, make a session, test it on the pack's golden samples, run it once more.

    Nothing of it is left where it raises. Blobs come from `cache` where it has them, and are kept there; None takes the
    one that MODELPRESS_CACHE names, if any.

    Raises:
        SelfTestError: it does not answer what it answered when it was published.
        ModelpressError: whatever is wrong with the store, the bytes, the graph or the provider; see
            `load.load_checkpoint` and `graph.session`.
    """
    started = time.perf_counter()
    manifest, checkpoint = load.load_checkpoint(store, name, pack, cache=cache or open_cache())
    try:
        engine = Engine(pack, graph.session(checkpoint, provider, threads, TUNING), manifest.lineage)
    except UnicodeDecodeError as error:
        raise CorruptionError(f"reading the signature of pack {pack}", found=str(error), expected="UTF-8") from error
    engine.front = Front.of_files(checkpoint.files, engine.inputs, engine.outputs)
    if GOLDEN_FILE in checkpoint.files:
        engine.self_test(golden.read(checkpoint.files[GOLDEN_FILE]))
    engine.warm_up()
    engine.learn_rows()
    tested = engine.tested
    said = f"golden samples differ by {tested.difference:.1e} at most" if tested else "it has no golden samples"
    log.info("loaded %s, pack %s, in %.2f s; %s", name, pack[:12], time.perf_counter() - started, said)
    return engine


def _spec(node: onnxruntime.NodeArg) -> TensorSpec:
    datatype = _ONNX_TYPES.get(node.type.removeprefix("tensor(").removesuffix(")"))
    if datatype is None:
        raise ServingError(
            f"reading the type of {node.name!r}", found=node.type, expected=f"a tensor of {', '.join(_ONNX_TYPES)}"
        )
    shape = tuple(node.shape)
    if len(shape) > MAX_RANK:
        raise ServingError(
            f"reading the shape of {node.name!r}", found=f"{len(shape)} axes", expected=f"at most {MAX_RANK}"
        )
    return TensorSpec(node.name, datatype, shape)


def _refused() -> RequestError:
    return RequestError(
        "running the model", found="values or sizes that it can't run on", expected="inputs like its examples"
    )


def _lacks_memory(error: Exception) -> bool:
    """ONNX Runtime has no type of its own for it."""
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in _NO_MEMORY)


def _ones(spec: TensorSpec, size: int) -> np.ndarray:
    return np.ones(_sizes(spec, size), DATATYPES[spec.datatype])


def _ones_bytes(spec: TensorSpec, size: int) -> int:
    return math.prod(_sizes(spec, size)) * DATATYPES[spec.datatype].itemsize


def _sizes(spec: TensorSpec, size: int) -> list[int]:
    batch = [length if isinstance(length, int) else 1 for length in spec.shape[:1]]
    return batch + [length if isinstance(length, int) else size for length in spec.shape[1:]]
