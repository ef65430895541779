"""Scales that are powers of two: by the number, over whole graphs, and as a folder for a DPU."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, numpy_helper
from pydantic import ValidationError
from torch import nn

from modelpress import graph, load
from modelpress.checkpoint import Checkpoint
from modelpress.config import ExportConfig, QuantizeConfig
from modelpress.errors import ConfigError
from modelpress.export import export
from modelpress.quantize import powers, quantize
from modelpress.reports import QuantizeReport
from modelpress.store.local import LocalStore
from tests.packs import make_pack
from tests.toys import CNN_WEIGHTS, ImageToy, TextToy, Wrapped, make_cnn

OPTIONS = {"scales": "power-of-two", "per_channel": False}
FINITE = st.floats(-1e12, 1e12, allow_subnormal=False)
CALIBRATIONS = ["mse", "minmax", "percentile"]


@pytest.fixture(scope="module")
def cnn() -> tuple[ImageToy, Checkpoint]:
    workload = ImageToy()
    return workload, export(workload.module, workload, ExportConfig())[0]


@pytest.fixture(scope="module")
def quantized(cnn: tuple[ImageToy, Checkpoint]) -> dict[str, tuple[Checkpoint, QuantizeReport]]:
    workload, checkpoint = cnn
    made = {name: QuantizeConfig(calibration=name, **OPTIONS) for name in CALIBRATIONS}
    made["float scales"] = QuantizeConfig(per_channel=False)
    return {name: quantize(checkpoint, workload, config) for name, config in made.items()}


def is_power_of_two(number: float) -> bool:
    return number > 0 and math.frexp(number)[0] == 0.5


def outputs(checkpoint: Checkpoint, workload: ImageToy) -> np.ndarray:
    session = graph.session(checkpoint)
    return np.concatenate([graph.run(session, batch.inputs) for batch in workload.batches("evaluation", 16)])


def roundings(model: ModelProto) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Operator, scale and zero point of each node that rounds or turns back."""
    arrays = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    return [
        (node.op_type, arrays[node.input[1]], arrays[node.input[2]])
        for node in model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]


@given(FINITE, FINITE)
def test_the_least_power_of_two_covers_a_range(low: float, high: float) -> None:
    scale = powers.covering(low, high)
    assert is_power_of_two(scale)
    assert scale * powers.LOWEST <= low
    assert high <= scale * powers.HIGHEST
    if scale > 2.0**powers.LEAST and (low < 0 or high > 0):
        assert scale / 2 * powers.LOWEST > low or scale / 2 * powers.HIGHEST < high


def test_a_range_that_a_power_covers_to_the_bit_keeps_it() -> None:
    for exponent in (-20, 0, 13):
        assert powers.covering(-128 * 2.0**exponent, 127 * 2.0**exponent) == 2.0**exponent
        assert powers.covering(0.0, math.nextafter(127 * 2.0**exponent, math.inf)) == 2.0 ** (exponent + 1)


@given(st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=40))
def test_a_weight_is_rounded_no_worse_than_without_clipping(values: list[float]) -> None:
    weight = np.array(values, np.float32)
    scale = powers.weight_scale(weight)
    assert is_power_of_two(scale)

    def error(step: float) -> float:
        codes = np.clip(np.rint(weight.astype(np.float64) / step), -127, 127)
        return float(np.square(codes * step - weight).sum())

    whole = powers.covering(-float(np.abs(weight).max()), float(np.abs(weight).max()))
    assert error(scale) <= error(whole) <= weight.size * (whole / 2) ** 2 * (1 + 1e-9)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50), st.floats(-1e3, 0), st.floats(0.001, 1e3))
def test_a_histograms_range_is_whole_codes_of_the_least_error(counts: list[int], low: float, high: float) -> None:
    weights = np.array(counts, np.float64)
    first, last = powers.least_error_range(weights, low, high)
    scale = last / powers.HIGHEST
    assert is_power_of_two(scale)
    assert first == powers.LOWEST * scale
    middles = low + (np.arange(len(weights)) + 0.5) * (high - low) / len(weights)

    def error(step: float) -> float:
        return float(weights @ np.square(np.clip(np.rint(middles / step), -128, 127) * step - middles))

    whole = powers.covering(low, high)
    assert error(scale) <= min(error(whole), error(whole / 2), error(whole / 4)) * (1 + 1e-9)


def test_outliers_are_clipped_where_that_rounds_the_rest_better() -> None:
    counts = np.zeros(2048)
    counts[1024:1100], counts[-1] = 10_000, 1
    _, last = powers.least_error_range(counts, -100.0, 100.0)
    assert last < 50


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_every_scale_is_a_power_of_two_and_every_zero_point_0(
    cnn: tuple[ImageToy, Checkpoint], quantized: dict[str, tuple[Checkpoint, QuantizeReport]], calibration: str
) -> None:
    workload, checkpoint = cnn
    made, report = quantized[calibration]
    assert report.method == f"static-{calibration}-power-of-two"
    assert report.coverage == 1.0
    assert not any(row.kept_float for row in report.sensitivity)
    found = roundings(graph.join(made))
    assert len(found) > 2 * len(CNN_WEIGHTS)
    for operator, scale, zero in found:
        assert scale.size == 1, operator
        assert is_power_of_two(scale.item()), operator
        assert zero.dtype in (np.int8, np.int32), operator  # int32: a bias
        assert not zero.any(), operator
    expected, answered = outputs(checkpoint, workload), outputs(made, workload)
    assert 0 < np.abs(answered - expected).max() < 0.15 * np.abs(expected).max()
    assert report.agreement > 0.99


def test_powers_of_two_cost_little_beside_scales_of_any_value(
    quantized: dict[str, tuple[Checkpoint, QuantizeReport]],
) -> None:
    """A step that is a power of two is at most twice the one of any value, so the error's root is at most twice as
    large, and what agreement lacks of 1 is of the order of its square."""
    lost = {name: 1 - report.agreement for name, (_, report) in quantized.items()}
    assert lost["mse"] < 6 * lost["float scales"] + 1e-4


def test_nothing_is_rounded_between_a_product_and_its_relu(
    quantized: dict[str, tuple[Checkpoint, QuantizeReport]],
) -> None:
    model = graph.join(quantized["mse"][0])
    makers = {name: node for node in model.graph.node for name in node.output}
    relus = [node for node in model.graph.node if node.op_type == "Relu"]
    assert len(relus) == 3
    assert {makers[node.input[0]].op_type for node in relus} <= {"Conv", "Gemm"}
    readers = {name: node.op_type for node in model.graph.node for name in node.input}
    assert {readers[node.output[0]] for node in relus} == {"QuantizeLinear"}


def test_a_relu_behind_a_value_that_others_read_too_keeps_its_rounding() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            product = self.first(x)
            return self.second(torch.relu(product) + product).flatten(1)

    torch.manual_seed(0)
    workload = ImageToy(Wrapped(Both()).eval())
    checkpoint, _ = export(workload.module, workload, ExportConfig())
    made, _ = quantize(checkpoint, workload, QuantizeConfig(**OPTIONS))
    model = graph.join(made)
    makers = {name: node for node in model.graph.node for name in node.output}
    (relu,) = [node for node in model.graph.node if node.op_type == "Relu"]
    assert makers[relu.input[0]].op_type == "DequantizeLinear"
    expected, answered = outputs(checkpoint, workload), outputs(made, workload)
    assert np.abs(answered - expected).max() < 0.1 * np.abs(expected).max()


def test_a_bias_that_dwarfs_its_weights_still_fits() -> None:
    module = make_cnn()
    with torch.no_grad():
        module.body[9].weight *= 1e-12
        module.body[9].bias += 1e6
    workload = ImageToy(module)
    checkpoint, _ = export(module, workload, ExportConfig())
    made, _ = quantize(checkpoint, workload, QuantizeConfig(**OPTIONS))
    biases = [
        numpy_helper.to_array(one)
        for one in graph.join(made).graph.initializer
        if one.data_type == onnx.TensorProto.INT32
    ]
    assert biases
    assert max(int(np.abs(one.astype(np.int64)).max()) for one in biases) <= 2**25
    expected, answered = outputs(checkpoint, workload), outputs(made, workload)
    assert np.abs(answered - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"per_channel": True}, "per_channel false"),
        ({"per_channel": False, "embeddings": True}, "embeddings"),
        ({"per_channel": False, "scales_from": "champion"}, "scales_from"),
        ({"per_channel": False, "smooth": 0.0, "recovery": {"epochs": 1}}, "recovery"),
        ({"per_channel": False, "method": "dynamic"}, "only read with quantize.method 'static'"),
        ({"method": "weight-only"}, "quantize"),
    ],
    ids=str,
)
def test_what_does_not_go_with_powers_of_two_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        QuantizeConfig.model_validate({"scales": "power-of-two", **options})


def publish(folder: Path, checkpoint: Checkpoint) -> tuple[LocalStore, str]:
    store = LocalStore(folder / "store")
    pack = make_pack(folder / "shards", checkpoint, name="toy")
    pack.publish(store)
    return store, pack.digest


def test_a_folder_for_a_dpu_has_fixed_shapes_and_answers_as_the_pack(
    cnn: tuple[ImageToy, Checkpoint], quantized: dict[str, tuple[Checkpoint, QuantizeReport]], tmp_path: Path
) -> None:
    store, digest = publish(tmp_path, quantized["mse"][0])
    load.pull(store, "toy", digest, tmp_path / "pulled", "vitis-ai")
    session = onnxruntime.InferenceSession(tmp_path / "pulled" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [one.shape for one in session.get_inputs()] == [[1, 1, 8, 8]]
    assert [one.shape for one in session.get_outputs()] == [[1, 10]]
    batch = next(cnn[0].batches("evaluation", 5)).inputs["x"].numpy()
    found = np.concatenate([session.run(None, {"x": row[None]})[0] for row in batch])
    expected = graph.session(quantized["mse"][0]).run(None, {"x": batch})[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_pack_that_a_dpu_would_leave_to_the_cpu_is_refused(
    cnn: tuple[ImageToy, Checkpoint], quantized: dict[str, tuple[Checkpoint, QuantizeReport]], tmp_path: Path
) -> None:
    workload, checkpoint = cnn
    asymmetric = quantized["float scales"][0]
    by_channel, _ = quantize(checkpoint, workload, QuantizeConfig(calibration="minmax"))
    words = TextToy()
    text, _ = export(words.module, words, ExportConfig())
    for number, (refused, said) in enumerate(
        [(checkpoint, "nothing"), (asymmetric, "uint8"), (by_channel, "zero point"), (text, "axis 1 of input")]
    ):
        (tmp_path / str(number)).mkdir()
        store, digest = publish(tmp_path / str(number), refused)
        with pytest.raises(ConfigError, match=said) as caught:
            load.pull(store, "toy", digest, tmp_path / str(number) / "pulled", "vitis-ai")
        assert caught.value.fix
        assert not (tmp_path / str(number) / "pulled").exists()
