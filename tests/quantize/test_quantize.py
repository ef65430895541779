from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import ExportConfig, QuantizeConfig
from modelpress.errors import ConfigError, CoverageError, StageError
from modelpress.export import export
from modelpress.quantize import quantize
from modelpress.reports import QuantizeReport
from modelpress.workload import Batch, Workload
from tests.toys import CNN_WEIGHTS, ENCODER_WEIGHTS, ImageToy, TextToy, TinyEncoder, Wrapped

STATIC = [{"calibration": name} for name in ("mse", "minmax", "percentile", "entropy")]


@pytest.fixture(scope="module")
def cnn() -> tuple[ImageToy, Checkpoint]:
    workload = ImageToy()
    return workload, export(workload.module, workload, ExportConfig())[0]


@pytest.fixture(scope="module")
def encoder() -> tuple[TextToy, Checkpoint]:
    workload = TextToy()
    return workload, export(workload.module, workload, ExportConfig())[0]


def outputs(checkpoint: Checkpoint, workload: Workload) -> np.ndarray:
    session = graph.session(checkpoint)
    return np.concatenate([graph.run(session, batch.inputs) for batch in workload.batches("evaluation", 16)])


def integer_weights(checkpoint: Checkpoint) -> int:
    """Elements of the int8 initializers of two and more dimensions, wherever they are stored."""
    model = graph.join(checkpoint)
    return sum(
        int(np.prod(one.dims))
        for one in model.graph.initializer
        if one.data_type == TensorProto.INT8 and len(one.dims) > 1
    )


def float_weights(checkpoint: Checkpoint) -> int:
    model = graph.join(checkpoint)
    return sum(
        int(np.prod(one.dims))
        for one in model.graph.initializer
        if one.data_type == TensorProto.FLOAT and len(one.dims) > 1 and min(one.dims) > 1
    )


@pytest.mark.parametrize("options", [*STATIC, {"per_channel": False}], ids=str)
def test_static_int8_stays_close_and_covers_every_weight(cnn, options: dict) -> None:
    workload, checkpoint = cnn
    quantized, report = quantize(checkpoint, workload, QuantizeConfig(**options))
    assert report.eligible_weights == report.quantized_weights == sum(CNN_WEIGHTS.values())
    assert report.coverage == 1.0
    assert integer_weights(quantized) == sum(CNN_WEIGHTS.values())
    assert float_weights(quantized) == 0
    expected, found = outputs(checkpoint, workload), outputs(quantized, workload)
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    assert report.agreement > 0.99
    assert {row.node for row in report.sensitivity} == set(CNN_WEIGHTS)


@pytest.mark.parametrize("embeddings", [True, False])
def test_dynamic_int8_counts_the_tables_it_was_asked_for(encoder, embeddings: bool) -> None:
    workload, checkpoint = encoder
    quantized, report = quantize(
        checkpoint, workload, QuantizeConfig(method="dynamic", embeddings=embeddings, max_quality_drop=0.05)
    )
    asked = {name: count for name, count in ENCODER_WEIGHTS.items() if embeddings or "Gather" not in name}
    assert {row.node for row in report.sensitivity} == set(asked)
    assert report.quantized_weights == sum(asked.values()) == integer_weights(quantized)
    assert float_weights(quantized) == sum(ENCODER_WEIGHTS.values()) - sum(asked.values())
    expected, found = outputs(checkpoint, workload), outputs(quantized, workload)
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    operators = {node.op_type for node in graph.parse(quantized).graph.node}
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= operators


@pytest.mark.parametrize("method", ["dynamic", "static"])
def test_a_weight_that_spoils_its_tensors_scale_is_found(method: str) -> None:
    layers = [nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
    torch.manual_seed(0)
    module = Wrapped(nn.Sequential(*layers)).eval()
    with torch.no_grad():
        # Neuron 5 never fires, so that its outgoing weights may be as large as they like.
        layers[1].weight[5], layers[1].bias[5] = 0, -1
        layers[3].weight[:, 5] = 1000
    workload = ImageToy(module)
    checkpoint, _ = export(module, workload, ExportConfig())
    _, report = quantize(checkpoint, workload, QuantizeConfig(method=method, per_channel=False))
    assert [row.node for row in report.sensitivity if row.kept_float] == ["body.3.Gemm"]
    assert report.quantized_weights == 64 * 32 + 32 * 10


@pytest.mark.parametrize("options", [{"method": "dynamic", "embeddings": True}, {"calibration": "percentile"}], ids=str)
def test_quantizing_is_deterministic_and_leaves_its_input_alone(cnn, encoder, options: dict) -> None:
    workload, checkpoint = encoder if "embeddings" in options else cnn
    before = checkpoint.to_bytes()
    config = QuantizeConfig(**options, max_quality_drop=0.05)
    first, report = quantize(checkpoint, workload, config)
    second, again = quantize(checkpoint, workload, config)
    assert first.to_bytes() == second.to_bytes()
    assert report == again
    assert checkpoint.to_bytes() == before


def test_files_and_metadata_are_kept(encoder) -> None:
    workload, checkpoint = encoder
    given = Checkpoint("onnx", checkpoint.tensors, checkpoint.files | {"labels.txt": b"a b"}, {"origin": "toy"})
    quantized, _ = quantize(given, workload, QuantizeConfig(method="dynamic", max_quality_drop=0.05))
    assert quantized.files["labels.txt"] == b"a b"
    assert quantized.metadata == {"origin": "toy"}


def with_outlier(module: TinyEncoder, compensated: bool) -> TinyEncoder:
    """One feature of the hidden layer, read by `down`, is a thousand times the others: int8 steps grow with it."""
    with torch.no_grad():
        module.up.weight[3] *= 1000
        module.up.bias[3] = 3000
        module.down.weight[:, 3] *= 0.001 if compensated else 0
    return module.eval()


@pytest.mark.parametrize("compensated", [False, True])
def test_the_layer_with_the_outlier_is_found_and_computes_in_float(compensated: bool) -> None:
    workload = TextToy(with_outlier(TinyEncoder(), compensated))
    checkpoint, _ = export(workload.module, workload, ExportConfig(tolerance=0.01))
    budget = 0.01
    quantized, report = quantize(checkpoint, workload, QuantizeConfig(method="dynamic", max_quality_drop=budget))
    assert [(row.node, row.kept_float) for row in report.sensitivity] == [("down.MatMul", True), ("up.MatMul", False)]
    assert report.sensitivity[0].disagreement > 10 * report.sensitivity[1].disagreement
    assert 1 - report.agreement <= budget
    # The small weights that compensate the outlier do not survive rounding; without them, stored integers do.
    assert integer_weights(quantized) == (2048 if compensated else 4096)
    expected, found = outputs(checkpoint, workload), outputs(quantized, workload)
    cosine = (expected * found).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(found, axis=1)
    assert cosine.mean() > 1 - 2 * budget


def test_a_budget_that_nothing_fits_is_an_error(cnn) -> None:
    workload, checkpoint = cnn
    with pytest.raises(CoverageError, match=r"(?s)4 of 4 layers in float.*max_quality_drop, 1e-09") as caught:
        quantize(checkpoint, workload, QuantizeConfig(max_quality_drop=1e-9))
    assert "body.7.Gemm" in str(caught.value.found)
    assert caught.value.exit_code == 5


def test_ignored_layers_stay_and_count_against_coverage(cnn) -> None:
    workload, checkpoint = cnn
    _, report = quantize(checkpoint, workload, QuantizeConfig(ignore=["body.9.*", "body.0.Conv"]))
    assert report.quantized_weights == CNN_WEIGHTS["body.3.Conv"] + CNN_WEIGHTS["body.7.Gemm"]
    assert report.coverage == pytest.approx(3936 / 4168)
    assert {row.node for row in report.sensitivity} == {"body.3.Conv", "body.7.Gemm"}
    with pytest.raises(CoverageError, match=r"min_coverage, 50\.0%"):
        quantize(checkpoint, workload, QuantizeConfig(targets=["body.0.Conv"]))


@pytest.mark.parametrize("field", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_is_an_error_with_near_matches(cnn, field: str) -> None:
    workload, checkpoint = cnn
    with pytest.raises(ConfigError) as caught:
        quantize(checkpoint, workload, QuantizeConfig(**{field: ["body.3.conv"]}))
    assert f"quantize.{field}" in caught.value.doing
    assert "'body.3.Conv'" in str(caught.value.expected)


def test_dynamic_refuses_convolutions_and_says_what_to_do(cnn) -> None:
    workload, checkpoint = cnn
    with pytest.raises(ConfigError, match="'static'"):
        quantize(checkpoint, workload, QuantizeConfig(method="dynamic", targets=["body.3.Conv"]))
    _, report = quantize(checkpoint, workload, QuantizeConfig(method="dynamic"))
    assert report.coverage == pytest.approx((3072 + 160) / 4168), "convolutions are eligible, and stay in float"


def test_a_graph_without_weights_is_an_error() -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1, 8, 8]) for name in ("x", "y")]
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], "relu")], "g", values[:1], values[1:])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(CoverageError, match="no MatMul, Gemm or Conv"):
        quantize(graph.split(model), ImageToy(), QuantizeConfig())


@pytest.mark.parametrize(("options", "named"), [({"smooth": 0}, "body.0.Conv"), ({}, "body.9.Gemm")], ids=str)
def test_an_activation_without_a_finite_range_is_named(cnn, options: dict, named: str) -> None:
    class Infinite(ImageToy):
        def batches(self, split, batch_size, seed=None):
            for batch in super().batches(split, batch_size, seed):
                yield Batch({"x": batch.inputs["x"] * (torch.inf if split == "calibration" else 1)})

    _, checkpoint = cnn
    with pytest.raises(CoverageError, match=f"calibrating '{re.escape(named)}'") as caught:
        quantize(checkpoint, Infinite(), QuantizeConfig(**options))
    assert "NaN" in str(caught.value.fix)


def test_no_temporary_file_is_left(cnn, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    workload, checkpoint = cnn
    quantize(checkpoint, workload, QuantizeConfig())
    assert list(tmp_path.iterdir()) == []


def test_progress_moves_and_ends(encoder) -> None:
    workload, checkpoint = encoder
    seen: list[tuple[int, int, str]] = []
    config = QuantizeConfig(method="dynamic", embeddings=True, max_quality_drop=0.05)
    quantize(checkpoint, workload, config, lambda *call: seen.append(call))
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][1] == 4
    assert any("sensitivity of up.MatMul" in note for _, _, note in seen)


def report_of(model: onnx.ModelProto, workload: Workload) -> tuple[Checkpoint, QuantizeReport]:
    return quantize(graph.split(model), workload, QuantizeConfig(method="dynamic", embeddings=True, min_coverage=0))


def test_a_table_that_a_float_node_still_reads_counts_as_float() -> None:
    """The bytes decide: an int8 copy beside the float original saves nothing."""
    random = np.random.default_rng(0)
    table = random.standard_normal((100, 32)).astype(np.float32)
    weight = random.standard_normal((32, 32)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], "rows"),
        helper.make_node("ReduceMean", ["table", "axes"], ["mean"], "mean", keepdims=0),
        helper.make_node("ReduceMean", ["rows", "second"], ["pooled"], "pool", keepdims=0),
        helper.make_node("Add", ["pooled", "mean"], ["sum"], "add"),
        helper.make_node("MatMul", ["sum", "weight"], ["y"], "product"),
    ]
    constants = [
        numpy_helper.from_array(array, name)
        for name, array in (("table", table), ("weight", weight), ("axes", np.array([0])), ("second", np.array([1])))
    ]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "l"])]
    output = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])]
    body = helper.make_graph(nodes, "g", inputs, output, constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    _, report = report_of(model, TextToy())
    assert report.eligible_weights == 3200 + 1024
    assert report.quantized_weights == 1024


class Shared(nn.Module):
    """One weight in two layers: the second reads a feature a thousand times the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flatten = nn.Flatten()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 10)
        with torch.no_grad():
            self.first.weight[:, 3] = 0
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(self.flatten(x)).relu()
        spike = nn.functional.one_hot(torch.tensor(3), 64) * 3000.0
        return self.head(self.second(hidden + spike).relu())


@pytest.mark.parametrize("ignored", [None, "second.Gemm", "second.Gemm_1"])
@pytest.mark.parametrize("method", ["dynamic", "static"])
def test_layers_that_share_a_weight_are_quantized_or_kept_together(method: str, ignored: str | None) -> None:
    workload = ImageToy(Shared().eval())
    checkpoint, _ = export(workload.module, workload, ExportConfig())
    config = QuantizeConfig(method=method, ignore=[ignored] if ignored else [], min_coverage=0, max_quality_drop=0.02)
    quantized, report = quantize(checkpoint, workload, config)
    chosen = {"second.Gemm", "second.Gemm_1"} - {ignored}
    assert chosen | {"head.Gemm"} == {row.node for row in report.sensitivity}
    # The spike in its activations spoils the second call, and with it the weight for both.
    assert {row.node for row in report.sensitivity if row.kept_float} == (
        chosen if "second.Gemm_1" in chosen else set()
    )
    assert len({row.disagreement for row in report.sensitivity if row.node in chosen}) == 1
    expected, found = outputs(checkpoint, workload), outputs(quantized, workload)
    cosine = (expected * found).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(found, axis=1)
    assert cosine.mean() > 0.97


@pytest.mark.parametrize("method", ["dynamic", "static"])
def test_layers_that_share_a_weight_share_its_integers(method: str) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    second.weight = first.weight
    workload = ImageToy(Wrapped(nn.Sequential(nn.Flatten(), first, nn.ReLU(), second)).eval())
    checkpoint, _ = export(workload.module, workload, ExportConfig())
    quantized, report = quantize(checkpoint, workload, QuantizeConfig(method=method, max_quality_drop=0.05))
    assert report.eligible_weights == report.quantized_weights == integer_weights(quantized) == 64 * 64
    assert float_weights(quantized) == 0
    assert len(report.sensitivity) == 2


def tied_table() -> onnx.ModelProto:
    """Token embeddings, averaged and compared with the same table."""
    table = np.random.default_rng(0).standard_normal((100, 32)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], "rows"),
        helper.make_node("ReduceMean", ["rows", "second"], ["mean"], "pool", keepdims=0),
        helper.make_node("Gemm", ["mean", "table"], ["y"], "product", transB=1),
    ]
    constants = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1]), "second")]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "l"])]
    output = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 100])]
    body = helper.make_graph(nodes, "g", inputs, output, constants)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_a_table_that_a_product_needs_in_another_form_is_refused() -> None:
    workload, checkpoint = TextToy(), graph.split(tied_table())
    config = QuantizeConfig(method="dynamic", embeddings=True, max_quality_drop=0.05, min_coverage=0)
    with pytest.raises(StageError, match=r"(?s)'table_quantized'.*quantize\.ignore"):
        quantize(checkpoint, workload, config)
    ignoring = config.model_copy(update={"ignore": ["product"]})
    quantized, _ = quantize(checkpoint, workload, ignoring)
    assert np.abs(outputs(quantized, workload) - outputs(checkpoint, workload)).max() < 0.5


def test_a_table_that_a_static_product_stored_is_read_from_its_integers() -> None:
    workload, checkpoint = TextToy(), graph.split(tied_table())
    quantized, report = quantize(checkpoint, workload, QuantizeConfig(embeddings=True, max_quality_drop=0.05))
    assert report.quantized_weights == integer_weights(quantized) == 3200
    assert float_weights(quantized) == 0


@pytest.mark.parametrize("method", ["dynamic", "static", "weight-only"])
def test_nodes_without_names_get_some(method: str) -> None:
    workload = TextToy()
    model = graph.join(export(workload.module, workload, ExportConfig())[0])
    for node in model.graph.node:
        node.name = "" if node.op_type == "MatMul" else "same"
    options = {"num_bits": 4} if method == "weight-only" else {}
    _, report = quantize(graph.split(model), workload, QuantizeConfig(method=method, max_quality_drop=0.1, **options))
    assert report.coverage > 0
    assert len({row.node for row in report.sensitivity}) == len(report.sensitivity) == 2
