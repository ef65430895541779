"""The float graph with its weights as inputs: one weight after another is tried without rebuilding it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import onnxruntime
from onnx import ModelProto, helper

from modelpress import graph
from modelpress.agreement import Inputs, Reference, divergence
from modelpress.plan.candidates import Floats
from modelpress.workload import Outputs


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
        self._distance = partial(divergence, outputs=outputs)
        self._reference = Reference(self._runner({}), len(batches))

    def disagreement(self, changed: Mapping[str, Floats]) -> float:
        """`divergence` of the graph with these weights from the one with its own."""
        return self._reference.distance(self._runner(changed), self._distance)

    def _runner(self, changed: Mapping[str, Floats]) -> Callable[[int], np.ndarray]:
        weights = self._weights | {name: _value(values) for name, values in changed.items()}

        def run(index: int) -> np.ndarray:
            outputs: np.ndarray = self._session.run_with_ort_values(self._output, {**self._batches[index], **weights})[
                0
            ].numpy()
            return outputs

        return run


def _value(array: np.ndarray) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
