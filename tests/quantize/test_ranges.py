"""Ranges from slices of the calibration data are the ranges from all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from onnx import ModelProto

from modelpress import graph
from modelpress.config import ExportConfig
from modelpress.export import export
from modelpress.quantize.observe import Inputs
from modelpress.quantize.ranges import Here, Range, extremes, histograms, least_error_ranges
from modelpress.reduce import ByName
from tests.toys import TextToy


class InSlices:
    """An observer that sees a slice at a time, the last one first, and what is sent is JSON."""

    def __init__(self, slices: Sequence[Sequence[Inputs]]) -> None:
        self.slices = slices

    def extremes(self, model: ModelProto, values: Sequence[str]) -> ByName:
        return self._merged([extremes(model, values, one) for one in self.slices])

    def histograms(self, model: ModelProto, edges: Mapping[str, Range]) -> ByName:
        return self._merged([histograms(model, edges, one) for one in self.slices])

    def _merged(self, some: list[ByName]) -> ByName:
        found = ByName()
        for one in reversed(some):
            found = found.merge(ByName.model_validate_json(one.model_dump_json()))
        return found


@pytest.fixture(scope="module")
def case() -> tuple[ModelProto, list[str], list[Inputs]]:
    workload = TextToy()
    model = graph.join(export(workload.module, workload, ExportConfig())[0])
    values = [node.output[0] for node in model.graph.node if node.op_type in ("MatMul", "Gelu", "Div")]
    return model, values, [batch.inputs for batch in workload.batches("calibration", 8)]


def test_slices_give_the_ranges_of_one_process(case: tuple[ModelProto, list[str], list[Inputs]]) -> None:
    model, values, batches = case
    expected = least_error_ranges(model, values, Here(batches))
    assert len(expected) == len(values) > 1
    for slices in ([batches[:1], batches[1:]], [batches[::2], batches[1::2]], [[one] for one in batches]):
        assert least_error_ranges(model, values, InSlices(slices)) == expected


def test_a_range_clips_no_more_than_what_is_there(case: tuple[ModelProto, list[str], list[Inputs]]) -> None:
    model, values, batches = case
    seen = Here(batches).extremes(model, values).values
    for name, (low, high) in least_error_ranges(model, values, Here(batches)).items():
        one = seen[name]
        assert one.kind == "extremes"
        assert min(one.lows[0], 0.0) <= low <= high <= max(one.highs[0], 0.0)


def test_a_value_that_is_not_finite_keeps_its_extremes(case: tuple[ModelProto, list[str], list[Inputs]]) -> None:
    model, values, batches = case

    class Infinite(Here):
        def extremes(self, model: ModelProto, values: Sequence[str]) -> ByName:
            found = super().extremes(model, values)
            first = found.values[values[0]].model_copy(update={"highs": [np.inf]})
            return ByName(values={**found.values, values[0]: first})

    found = least_error_ranges(model, values, Infinite(batches))
    assert found[values[0]][1] == np.inf
    assert np.isfinite(found[values[1]]).all()
