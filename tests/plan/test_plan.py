from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from modelpress import agreement, graph
from modelpress.agreement import Judge, divergence
from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import CompressConfig, ExportConfig, PlanConfig
from modelpress.errors import BudgetExceededError, ConfigError, CoverageError, StageError, WorkloadError
from modelpress.export import export
from modelpress.plan import outline, plan
from modelpress.plan.candidates import Candidate, encode, fits
from modelpress.plan.fed import FedWeights
from modelpress.plan.importance import weighed
from modelpress.plan.rewrite import stored_weights
from modelpress.plan.tensors import planned_weights
from modelpress.reports import PlanReport
from tests.toys import CNN_WEIGHTS, ImageToy, TextToy, make_cnn

SCALES: dict[str, Any] = {"scales": ["tensor", "channel"], "group_sizes": [16]}


class TiedToy(TextToy):
    """A language model whose head is its table; outputs are logits per token."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(Tied().eval())

    def score(self, outputs: np.ndarray) -> np.ndarray:
        return (outputs.argmax(-1)[:, -1] > 50).astype(np.float64)

    def condense(self, outputs: np.ndarray, batch: object) -> np.ndarray:
        return outputs[:, -2:]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 32)
        self.inner = nn.Linear(32, 32)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.table(ids) * mask.unsqueeze(-1)
        return nn.functional.linear(hidden + torch.tanh(self.inner(hidden)), self.table.weight)


@pytest.fixture(scope="module")
def cnn() -> tuple[ImageToy, Checkpoint]:
    workload = ImageToy()
    return workload, export(workload.module, workload, ExportConfig())[0]


@pytest.fixture(scope="module")
def encoder() -> tuple[TextToy, Checkpoint]:
    workload = TextToy()
    return workload, export(workload.module, workload, ExportConfig())[0]


@pytest.fixture(scope="module")
def tied() -> tuple[TiedToy, Checkpoint]:
    workload = TiedToy()
    return workload, export(workload.module, workload, ExportConfig())[0]


@pytest.fixture(scope="module")
def planned(encoder) -> tuple[Checkpoint, PlanReport]:
    workload, checkpoint = encoder
    return plan(checkpoint, workload, PlanConfig(max_disagreement=1e-3, **SCALES, points=3))


def sharing(scale: str | int, **options: Any) -> PlanConfig:
    """One sharing of scales alone."""
    alone = {"scales": [], "group_sizes": [scale]} if isinstance(scale, int) else {"scales": [scale], "group_sizes": []}
    return PlanConfig.model_validate(alone | options)


def judge(checkpoint: Checkpoint, workload: Any) -> Judge:
    return Judge(checkpoint, batches(workload), partial(divergence, outputs="logits"))


def batches(workload) -> list[dict[str, Tensor]]:
    return [batch.inputs for batch in workload.batches("calibration", 8)]


@pytest.mark.parametrize("scale", ["tensor", "channel", 16, 8])
@pytest.mark.parametrize("num_bits", [2, 5, 8])
@pytest.mark.parametrize(("shape", "axis"), [((32, 24), 1), ((24, 32), 0), ((6, 4, 2, 4), 0), ((2, 32, 12), 2)])
def test_every_weight_is_within_half_a_scale(shape, axis: int, scale, num_bits: int) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weight[0] = 0
    candidate = Candidate(num_bits, scale)
    assert fits(candidate, shape, axis)
    coding = encode(weight, candidate, axis)
    assert coding.scale.dtype == np.float16
    halves = np.broadcast_to(coding.scale.astype(np.float32), coding.grouped).reshape(shape) / 2
    assert (np.abs(coding.dequantize() - weight) <= halves * (1 + 1e-5)).all()
    assert np.abs(coding.codes.astype(int)).max() == 2 ** (num_bits - 1) - 1
    counts = {"tensor": 1, "channel": shape[axis]}
    assert coding.scale.size == counts.get(scale, weight.size // scale if isinstance(scale, int) else 0)


@pytest.mark.parametrize("size", [1e-8, 1e-30, 1e8])
def test_scales_that_float16_cannot_hold_are_float32(size: float) -> None:
    weight = (np.random.default_rng(0).normal(size=(8, 16)) * size).astype(np.float32)
    coding = encode(weight, Candidate(8, "channel"), 0)
    assert coding.scale.dtype == np.float32
    assert np.abs(coding.dequantize() - weight).max() <= 0.5 * coding.scale.max() * (1 + 1e-5)


def test_groups_that_do_not_divide_are_not_offered() -> None:
    assert not fits(Candidate(4, 16), (24, 10), 1)
    assert not fits(Candidate(4, 16), (8, 1, 3, 3), 0)
    assert not fits(Candidate(4, 16), (8, 16), 0)  # one group: that is a scale per channel


@pytest.mark.parametrize("kind", ["cnn", "encoder", "tied"])
@pytest.mark.parametrize("scale", ["tensor", "channel", 16])
def test_the_graph_computes_with_the_dequantized_weights(kind: str, scale, request) -> None:
    workload, checkpoint = request.getfixturevalue(kind)
    model = graph.join(checkpoint)
    weights = {one.name: one for one in planned_weights(model, sharing(scale))}
    choice = {name: Candidate(4, scale) for name in weights}
    made = graph.split(stored_weights(model, choice, weights))
    onnx.checker.check_model(graph.join(made))
    by_hand = graph.join(checkpoint)
    for one in by_hand.graph.initializer:
        if one.name in weights:
            values = encode(weights[one.name].values, choice[one.name], weights[one.name].channel_axis).dequantize()
            one.CopyFrom(numpy_helper.from_array(values, one.name))
    sessions = graph.session(made), graph.session(graph.split(by_hand))
    for inputs in batches(workload):
        found, expected = (graph.run(session, inputs) for session in sessions)
        assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


def test_the_report_says_what_the_checkpoint_is(encoder, planned) -> None:
    workload, checkpoint = encoder
    made, report = planned
    assert report.divergence == "kl"
    assert judge(checkpoint, workload).disagreement(made) == pytest.approx(report.disagreement, rel=1e-9)
    assert 0 < report.disagreement <= report.max_disagreement
    assert report.coded_bytes == compress(made, CompressConfig())[1].stored_bytes
    assert report.predicted_bytes == report.coded_bytes
    assert report.float_bytes == compress(checkpoint, CompressConfig())[1].stored_bytes
    stored = {row.name: row.stored_bytes for row in compress(made, CompressConfig())[1].tensors}
    initializers = {one.name: one for one in graph.join(made).graph.initializer}
    for row in report.tensors:
        parts = [name for name in (row.name + "_codes", row.name + "_scale", row.name) if name in stored]
        assert row.coded_bytes == sum(stored[name] for name in parts)
        if row.num_bits is not None:
            codes = numpy_helper.to_array(initializers[row.name + "_codes"])
            assert np.abs(codes.astype(int)).max() == 2 ** (row.num_bits - 1) - 1
            assert initializers[row.name + "_codes"].data_type == TensorProto.INT8
    assert {row.num_bits for row in report.tensors} != {8}


def test_every_point_is_what_it_says(encoder, planned) -> None:
    workload, checkpoint = encoder
    _, report = planned
    dense = [point for point in report.uniform if "zeros" not in point.label]
    assert len(dense) == 18
    assert any(point.coded_bytes == report.coded_bytes for point in report.front)
    sizes = [point.coded_bytes for point in report.front]
    assert sizes == sorted(sizes, reverse=True)
    label = "4 bits, scale per channel"
    point = next(one for one in report.uniform if one.label == label)
    model = graph.join(checkpoint)
    weights = {one.name: one for one in planned_weights(model, PlanConfig(**SCALES))}
    made = graph.split(stored_weights(model, {name: Candidate(4, "channel") for name in weights}, weights))
    assert point.coded_bytes == compress(made, CompressConfig())[1].stored_bytes
    found = judge(checkpoint, workload).disagreement(made)
    assert point.disagreement == pytest.approx(found, rel=1e-3)


def test_a_larger_budget_takes_no_more_bytes(cnn) -> None:
    workload, checkpoint = cnn
    sizes = []
    for budget in (1e-7, 1e-6, 1e-5, 1e-4):
        _, report = plan(checkpoint, workload, PlanConfig(max_disagreement=budget, **SCALES, points=0))
        assert report.disagreement <= budget
        sizes.append(sum(row.coded_bytes + row.inline_bytes for row in report.tensors))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_a_weight_that_is_shared_is_planned_once(tied) -> None:
    workload, checkpoint = tied
    rows = outline(checkpoint, workload, sharing("channel"))
    assert sorted(row.shape for row in rows) == [[32, 32], [100, 32]]
    made, report = plan(checkpoint, workload, sharing("channel", max_disagreement=0.05, points=0))
    assert len(report.tensors) == 2
    names = [one.name for one in graph.join(made).graph.initializer]
    assert len(names) == len(set(names))
    assert sum(list(one.dims) == [100, 32] for one in graph.join(made).graph.initializer) == 1


def test_planning_is_deterministic_and_leaves_its_input_alone(encoder, planned) -> None:
    workload, checkpoint = encoder
    before = checkpoint.to_bytes()
    made, report = plan(checkpoint, workload, PlanConfig(max_disagreement=1e-3, **SCALES, points=3))
    assert made.to_bytes() == planned[0].to_bytes()
    assert report == planned[1]
    assert checkpoint.to_bytes() == before


def test_what_is_ignored_stays_in_float(cnn) -> None:
    workload, checkpoint = cnn
    config = sharing("tensor", max_disagreement=1e-3, ignore=["body.7.*"], points=0)
    made, report = plan(checkpoint, workload, config)
    assert {node for row in report.tensors for node in row.nodes} == set(CNN_WEIGHTS) - {"body.7.Gemm"}
    name = next(name for name in checkpoint.tensors if name.startswith("body.7") and "weight" in name)
    assert torch.equal(made.tensors[name], checkpoint.tensors[name])


def test_weights_that_are_fed_give_what_weights_that_are_stored_give(encoder) -> None:
    workload, checkpoint = encoder
    model = graph.join(checkpoint)
    weights = {one.name: one for one in planned_weights(model, sharing("tensor"))}
    name, weight = next(iter(weights.items()))
    candidate = Candidate(3, "tensor")
    fed = FedWeights(model, {one: other.values for one, other in weights.items()}, batches(workload), "logits")
    found = fed.disagreement({name: encode(weight.values, candidate, weight.channel_axis).dequantize()})
    made = graph.split(stored_weights(model, {name: candidate}, weights))
    assert found == pytest.approx(judge(checkpoint, workload).disagreement(made), rel=1e-3)
    assert fed.disagreement({}) == 0


def test_divergences_are_those_of_the_textbook() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    expected = 0.5 * np.log(2) - 0.25 * np.log(2)
    assert divergence(np.log(q) + 3, np.log(p) - 1, "logits") == pytest.approx(expected)
    assert divergence(np.array([[0.0, 2.0]]), np.array([[1.0, 1.0]]), "embeddings") == pytest.approx(1 - 0.5**0.5)
    with pytest.raises(StageError, match="1 of 2 NaN"):
        divergence(np.array([[0.0, np.nan]]), np.array([[1.0, 1.0]]), "embeddings")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"targets": ["body.8*"]}, ConfigError, "'body.8*', which matches none of 4 eligible nodes"),
        ({"ignore": ["conv*"]}, ConfigError, "plan.ignore"),
        ({"ignore": ["*"]}, CoverageError, "none of 4 eligible layers"),
        ({"group_sizes": [640]}, ConfigError, "plan.group_sizes 640"),
        ({"max_disagreement": 1e-15, "points": 0}, BudgetExceededError, "at most 1e-15"),
    ],
    ids=str,
)
def test_bad_configs_are_named(cnn, options: dict, error: type[Exception], said: str) -> None:
    workload, checkpoint = cnn
    with pytest.raises(error) as raised:
        plan(checkpoint, workload, sharing("tensor", **{"num_bits": [8, 4], **options}))
    assert said in str(raised.value)


def test_weights_that_are_not_finite_are_named(cnn) -> None:
    workload, checkpoint = cnn
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    name = next(name for name in tensors if name.startswith("body.7"))
    tensors[name][0, 3] = torch.nan
    with pytest.raises(StageError, match=rf"(?s)planning '{name}'.*1 of its 3072 values NaN or infinite"):
        outline(Checkpoint("onnx", tensors, checkpoint.files), workload, sharing("tensor"))


def test_too_little_calibration_data_is_refused(cnn) -> None:
    _, checkpoint = cnn
    with pytest.raises(WorkloadError, match=r"(?s)found: 5 samples.*at least 8.*calibration_samples"):
        plan(checkpoint, ImageToy(samples=5), sharing("tensor"))


def test_zeros_are_the_least_important_weights_of_each_channel() -> None:
    """Wanda's score by hand: a weight that is small may still matter, by what it multiplies."""
    weight = np.array([[3.0, -1.0, 2.0, 4.0], [0.5, 8.0, -0.25, 1.0]], np.float32)
    importance = np.array([[1.0, 10.0, 1.0, 0.1]], np.float32)
    by_size = encode(weight, Candidate(8, "tensor", 0.5), 0).codes
    by_score = encode(weight, Candidate(8, "tensor", 0.5), 0, importance).codes
    assert (by_size == 0).tolist() == [[False, True, True, False], [True, False, True, False]]
    assert (by_score == 0).tolist() == [[False, False, True, True], [False, False, True, True]]
    kept = encode(weight, Candidate(8, "tensor"), 0).codes
    assert (by_score[by_score != 0] == kept[by_score != 0]).all()


def graph_of(nodes: list[onnx.NodeProto], weights: dict[str, tuple[int, ...]], shape: list[Any]) -> onnx.ModelProto:
    """From x to y, both of `shape`, with random weights."""
    generator = np.random.default_rng(0)
    given = [
        numpy_helper.from_array(generator.normal(size=size).astype(np.float32), name) for name, size in weights.items()
    ]
    ends = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], given),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return model


def test_weights_on_a_grid_are_planned_without_any_loss() -> None:
    """The one choice is the first of the chain, and no step leads to it."""
    module = make_cnn()
    with torch.no_grad():
        for one in module.parameters():
            if one.ndim == 2:
                codes = torch.randint(-7, 8, one.shape, generator=torch.Generator().manual_seed(0))
                codes[0, 0] = 7
                one.copy_(codes * 2.0**-6)
    workload = ImageToy(module)
    checkpoint = export(module, workload, ExportConfig())[0]
    config = sharing("tensor", num_bits=[4], sparsity=[0.0], targets=["*Gemm"], max_disagreement=1e-9, points=2)
    made, report = plan(checkpoint, workload, config)
    assert [row.num_bits for row in report.tensors] == [4, 4]
    assert report.disagreement == 0
    assert report.coded_bytes < report.float_bytes
    assert judge(checkpoint, workload).disagreement(made) == 0


@pytest.mark.parametrize("inner", [16, 24])
def test_a_weight_that_is_read_along_both_axes_has_no_importance(inner: int) -> None:
    nodes = [
        onnx.helper.make_node("Gemm", ["x", "w"], ["h"], "in", transB=1),
        onnx.helper.make_node("Gemm", ["h", "w"], ["y"], "out"),
    ]
    model = graph_of(nodes, {"w": (inner, 24)}, ["n", 24])
    (found,) = weighed(model, planned_weights(model, sharing("tensor")), [{"x": torch.randn(8, 24)}])
    assert found.nodes == ("in", "out")
    assert found.importance is None


def test_a_value_that_a_convolution_and_a_product_read_is_weighed_along_the_axis_of_each() -> None:
    nodes = [
        onnx.helper.make_node("Conv", ["x", "k"], ["h"], "conv", kernel_shape=[1]),
        onnx.helper.make_node("MatMul", ["x", "w"], ["z"], "product"),
        onnx.helper.make_node("Add", ["h", "z"], ["y"], "sum"),
    ]
    model = graph_of(nodes, {"k": (5, 5, 1), "w": (5, 5)}, ["n", 5, 5])
    x = torch.randn(8, 5, 5) * torch.arange(1, 6)[:, None]
    found = {one.name: one.importance for one in weighed(model, planned_weights(model, sharing("tensor")), [{"x": x}])}
    assert found["k"][3].ravel() == pytest.approx(x.square().mean((0, 2)).sqrt().numpy(), rel=1e-5)
    assert found["w"].ravel() == pytest.approx(x.square().mean((0, 1)).sqrt().numpy(), rel=1e-5)


def test_importance_is_what_the_products_read(cnn, encoder) -> None:
    for workload, checkpoint in (cnn, encoder):
        model, inputs = graph.join(checkpoint), batches(workload)
        found = {one.nodes[0]: one for one in weighed(model, planned_weights(model, sharing("tensor")), inputs)}
        for one in found.values():
            if one.importance is not None:
                assert np.broadcast_shapes(one.importance.shape, one.values.shape) == one.values.shape
        if "table.Gather" in found:
            assert found["table.Gather"].importance is None
            hidden = [torch.as_tensor(workload.module.table(batch["ids"])) for batch in inputs]
            expected = np.sqrt(np.mean([one.square().mean((0, 1)).detach().numpy() for one in hidden], axis=0))
            assert found["up.MatMul"].importance.ravel() == pytest.approx(expected, rel=1e-5)
        else:
            images = torch.cat([batch["x"] for batch in inputs])
            assert found["body.0.Conv"].importance == pytest.approx(images.square().mean().sqrt().item(), rel=1e-5)
            hidden = workload.module.body[:3](images).square().mean((0, 2, 3)).sqrt().detach().numpy()
            assert found["body.3.Conv"].importance.shape == (12, 8, 1, 1)
            assert found["body.3.Conv"].importance[5].ravel() == pytest.approx(hidden, rel=1e-4)


def test_what_a_reference_cannot_hold_it_computes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = [np.full((4, 2), float(index + 1), np.float32) for index in range(5)]
    asked: list[int] = []

    def run(index: int) -> np.ndarray:
        asked.append(index)
        return outputs[index]

    monkeypatch.setattr(agreement, "MAX_HELD_BYTES", 2 * outputs[0].nbytes)
    reference = agreement.Reference(run, 5)
    asked.clear()
    found = reference.distance(lambda index: outputs[index] + index, lambda one, other: float((one - other).mean()))
    assert found == pytest.approx(2.0)
    assert asked == [2, 3, 4]
