"""How far a graph's answers are from the float graph's, also for one weight after another without rebuilding it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import ModelProto, helper
from torch import Tensor

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.errors import StageError
from modelpress.plan.candidates import Floats
from modelpress.quantize.sensitivity import mean_cosine
from modelpress.workload import Outputs

Inputs = Mapping[str, Tensor]


def divergence(found: np.ndarray, expected: np.ndarray, outputs: Outputs) -> float:
    """How far outputs are from those expected, 0 where they are the same.

    Logits, (samples, …, classes): the mean over samples (and tokens) of KL(softmax(expected) ‖ softmax(found)), in
    nats. Embeddings, (samples, …): 1 − the mean cosine.

    Raises:
        StageError: outputs that are NaN or infinite.
    """
    wrong = int(np.count_nonzero(~np.isfinite(found)))
    if wrong:
        raise StageError(
            "comparing outputs with the float graph's",
            found=f"{wrong} of {found.size} NaN or infinite",
            expected="finite outputs",
            fix="look at the model on its calibration data, or keep wider plan.num_bits",
        )
    if outputs == "embeddings":
        return max(1.0 - mean_cosine(found.reshape(len(found), -1), expected.reshape(len(expected), -1)), 0.0)
    classes = expected.shape[-1]
    log_p, log_q = (_log_softmax(one.reshape(-1, classes)) for one in (expected, found))
    return max(float(np.sum(np.exp(log_p) * (log_p - log_q), axis=1).mean()), 0.0)


class Judge:
    """Compares checkpoints with the float one on fixed inputs.

    Args:
        reference: the float checkpoint.
        batches: named inputs.
        outputs: what the graph's first output is.
    """

    def __init__(self, reference: Checkpoint, batches: Sequence[Inputs], outputs: Outputs) -> None:
        self._batches, self._outputs = batches, outputs
        self._expected = list(self._run(reference))

    def disagreement(self, checkpoint: Checkpoint) -> float:
        """`divergence` from the float checkpoint."""
        return _mean(self._run(checkpoint), self._expected, self._outputs)

    def _run(self, checkpoint: Checkpoint) -> Iterable[np.ndarray]:
        session = graph.session(checkpoint)
        return (graph.run(session, batch) for batch in self._batches)


class FedWeights:
    """A float graph that takes the planned weights as inputs: trying others costs a call, and no session.

    Args:
        model: the float graph.
        weights: what may be replaced, by name.
        batches: named inputs.
        outputs: what the graph's first output is.
    """

    def __init__(
        self, model: ModelProto, weights: Mapping[str, Floats], batches: Sequence[Inputs], outputs: Outputs
    ) -> None:
        fed = ModelProto()
        fed.CopyFrom(model)
        for one in [one for one in fed.graph.initializer if one.name in weights]:
            fed.graph.input.append(helper.make_tensor_value_info(one.name, one.data_type, list(one.dims)))
            fed.graph.initializer.remove(one)
        self._session = graph.session(graph.split(fed))
        self._output = [self._session.get_outputs()[0].name]
        self._weights = {name: _value(values) for name, values in weights.items()}
        names = {one.name for one in self._session.get_inputs()}
        self._batches = [
            {name: _value(tensor.numpy()) for name, tensor in batch.items() if name in names} for batch in batches
        ]
        self._outputs = outputs
        self._expected = list(self._run({}))

    def disagreement(self, changed: Mapping[str, Floats]) -> float:
        """`divergence` of the graph with these weights from the one with its own."""
        return _mean(self._run(changed), self._expected, self._outputs)

    def _run(self, changed: Mapping[str, Floats]) -> Iterable[np.ndarray]:
        weights = self._weights | {name: _value(values) for name, values in changed.items()}
        for batch in self._batches:
            yield self._session.run_with_ort_values(self._output, {**batch, **weights})[0].numpy()


def _mean(found: Iterable[np.ndarray], expected: Sequence[np.ndarray], outputs: Outputs) -> float:
    """Over batches, each weighed by its samples."""
    total = sum(divergence(one, other, outputs) * len(other) for one, other in zip(found, expected, strict=True))
    return total / sum(len(other) for other in expected)


def _value(array: np.ndarray) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _log_softmax(logits: np.ndarray) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    values: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return values
