from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from modelpress import graph
from modelpress.config import ExportConfig, QuantizeConfig
from modelpress.export import export
from modelpress.quantize import quantize
from modelpress.quantize.observe import observe
from modelpress.quantize.smooth import LEAST_SHARE, _factor, smooth
from tests.toys import TextToy


class Block(nn.Module):
    """Post-norm and pre-norm blocks on embeddings of which three features are far larger than the others."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(100, width)
        self.first, self.second, self.last = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.plain = nn.Linear(width, width)
        with torch.no_grad():
            self.first.weight[:3] *= 60
            self.second.weight[5] *= 60
            self.up.weight[7] *= 40

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.first(self.table(ids))
        hidden = hidden + torch.tanh(self.query(hidden) * self.key(hidden))
        inner = self.down(self.up(self.second(hidden)).relu())
        hidden = self.last(hidden + inner)
        hidden = self.plain(hidden.tanh())
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


@pytest.fixture(scope="module")
def block():
    workload = TextToy(Block().eval())
    checkpoint, _ = export(workload.module, workload, ExportConfig(tolerance=0.01))
    return workload, checkpoint, [batch.inputs for batch in workload.batches("calibration", 16)]


def outputs(model: onnx.ModelProto, batches: list) -> np.ndarray:
    session = graph.session(graph.split(model))
    return np.concatenate([graph.run(session, batch) for batch in batches])


def products(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    constants = {one.name for one in model.graph.initializer}
    return {node.name: node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in constants}


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
def test_smoothing_changes_nothing_in_float(block, alpha: float) -> None:
    _, checkpoint, batches = block
    model = graph.join(checkpoint)
    before = copy.deepcopy(model)
    made = smooth(model, set(products(model)), batches, alpha)
    assert model == before
    expected, found = outputs(model, batches), outputs(made, batches)
    assert np.abs(found - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())
    onnx.checker.check_model(made)


def test_outliers_move_where_a_producer_can_take_them(block) -> None:
    _, checkpoint, batches = block
    model = graph.join(checkpoint)
    made = smooth(model, set(products(model)), batches, 0.5)

    def peak(one: onnx.ModelProto, name: str) -> float:
        """Largest channel of a product's input, in those of the middle one."""
        value = products(one)[name].input[0]
        rows = np.concatenate([found[value] for found in observe(one, [value], batches)])
        channels = np.abs(rows).max(axis=0)
        return float(channels.max() / np.median(channels))

    for name in ("query.MatMul", "key.MatMul", "up.MatMul", "down.MatMul"):
        assert peak(made, name) < 0.4 * peak(model, name), name
    assert peak(made, "plain.MatMul") == pytest.approx(peak(model, "plain.MatMul")), "tanh takes no scale"
    # The residual reads the first normalisation as it was; nobody reads the second beside `up`.
    normalisations = [node for node in made.graph.node if node.op_type == "LayerNormalization"]
    assert len(normalisations) == 4
    assert products(made)["query.MatMul"].input[0] == products(made)["key.MatMul"].input[0]


def test_nodes_that_are_not_named_read_what_they_read(block) -> None:
    _, checkpoint, batches = block
    model = graph.join(checkpoint)
    made = smooth(model, {"query.MatMul"}, batches, 0.5)
    before, after = products(model)["key.MatMul"], products(made)["key.MatMul"]
    assert before == after
    assert np.abs(outputs(made, batches) - outputs(model, batches)).max() < 1e-5


def test_pruned_weights_stay_zero(block) -> None:
    _, checkpoint, batches = block
    model = graph.join(checkpoint)
    weight = products(model)["query.MatMul"].input[1]
    for initializer in model.graph.initializer:
        if initializer.name == weight:
            values = np.array(numpy_helper.to_array(initializer))
            values[::2] = 0
            initializer.CopyFrom(numpy_helper.from_array(values, weight))
    made = smooth(model, set(products(model)), batches, 0.5)
    found = {one.name: numpy_helper.to_array(one) for one in made.graph.initializer}[weight]
    assert (found[::2] == 0).all()
    assert (found[1::2] != 0).all()


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_smoothing_brings_the_integer_graph_closer(block, method: str) -> None:
    workload, checkpoint, _ = block
    agreement = [
        quantize(checkpoint, workload, QuantizeConfig(method=method, smooth=alpha, max_quality_drop=2))[1].agreement
        for alpha in (0, 0.7)
    ]
    assert 1 - agreement[1] < 0.5 * (1 - agreement[0])


def test_what_a_body_or_an_output_reads_is_left_alone() -> None:
    """A value or a weight that is read elsewhere must not change in float."""
    torch.manual_seed(0)
    workload = TextToy()
    model = graph.join(export(workload.module, workload, ExportConfig())[0])
    batches = [batch.inputs for batch in workload.batches("calibration", 16)]
    nodes = [node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    weight = next(node.input[1] for node in model.graph.node if node.name == nodes[-1])
    shape = next(list(one.dims) for one in model.graph.initializer if one.name == weight)
    model.graph.output.append(helper.make_tensor_value_info(weight, TensorProto.FLOAT, shape))
    made = smooth(model, nodes, batches, 0.7)
    values = [one for one in made.graph.initializer if one.name == weight]
    before = [one for one in model.graph.initializer if one.name == weight]
    assert values[0].raw_data == before[0].raw_data
    branch = helper.make_graph(
        [helper.make_node("Identity", [weight], ["inner"])],
        "branch",
        [],
        [helper.make_empty_tensor_value_info("inner")],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    model.graph.node.append(helper.make_node("If", ["always"], ["read"], "if", then_branch=branch, else_branch=branch))
    assert smooth(model, nodes, batches, 0.7) == model


def test_a_channel_that_hardly_shows_in_calibration_is_not_blown_up() -> None:
    quiet = _factor(np.array([1.0, 1.0, 1.0, 1e-4], np.float32), [np.ones((4, 3), np.float32)], 0.7)
    assert quiet.max() / quiet.min() <= (1 / LEAST_SHARE) ** 0.7 * 1.001
