from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from torch import Tensor

from modelpress import graph, load
from modelpress.checkpoint import Checkpoint
from modelpress.config import ExportConfig, QuantizeConfig, parse_config
from modelpress.errors import ConfigError, StageError
from modelpress.export import export
from modelpress.quantize import float8, quantize
from modelpress.quantize.float8 import LARGEST, SMALLEST_NORMAL, round_to_float8
from modelpress.quantize.groups import storable
from modelpress.quantize.selection import eligible_layers
from modelpress.quantize.weight_only import float8_layers
from modelpress.store.local import LocalStore
from tests.packs import assert_same, make_pack
from tests.toys import ImageToy, TextToy, make_cnn

SHARES = {"method": "weight-only", "algorithm": "fp8", "min_coverage": 0, "max_quality_drop": 2}


@pytest.fixture(scope="module")
def texts() -> tuple[TextToy, Checkpoint]:
    workload = TextToy()
    return workload, export(workload.module, workload, ExportConfig())[0]


@pytest.fixture(scope="module")
def images() -> tuple[ImageToy, Checkpoint]:
    workload = ImageToy(make_cnn())
    return workload, export(workload.module, workload, ExportConfig())[0]


def spread(shape: tuple[int, ...], seed: int, size: float) -> Tensor:
    """Numbers of many magnitudes, with zeros; the largest about `size`."""
    generator = torch.Generator().manual_seed(seed)
    exponents = 14 * torch.rand(shape, generator=generator)
    made = size * 2.0**-exponents * (2 * torch.rand(shape, generator=generator) - 1)
    return made * (torch.rand(shape, generator=generator) > 0.1)


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 6),
    inputs=st.integers(1, 90),
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-30, 3e-7, 0.02, 1.0, 7e4, 1e30]),
    axis=st.sampled_from([None, 0, 1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rounding_errs_by_a_sixteenth(
    outputs: int, inputs: int, seed: int, size: float, axis: int | None, dtype: torch.dtype
) -> None:
    weight = spread((outputs, inputs), seed, size)
    made = round_to_float8(weight, axis, dtype)
    assert made.codes.dtype == torch.float8_e4m3fn
    assert made.scale.shape == tuple(n if axis == place else 1 for place, n in enumerate(weight.shape))
    assert torch.equal(made.scale.to(dtype).float(), made.scale)
    found = made.dequantize().double()
    assert torch.isfinite(found).all()
    error, scaled = (found - weight.double()).abs(), (weight.double() / made.scale.double()).abs()
    # A scale that bfloat16 rounded down leaves the largest weights a 256th beyond the largest number.
    normal = (scaled >= SMALLEST_NORMAL) & (scaled <= LARGEST * 1.005)
    assert (error <= weight.double().abs() * 2**-4 * (1 + 1e-6))[normal].all()
    assert (error <= made.scale.double() * 2**-10 * (1 + 1e-6)).logical_or(scaled >= SMALLEST_NORMAL).all()
    assert (scaled <= LARGEST * 1.005).all()
    assert (found[weight == 0] == 0).all()


def test_the_largest_weight_comes_back_and_nothing_becomes_nan() -> None:
    weight = torch.tensor([[-3.0, 2.9999, 0.1], [1e-45, -1e-45, 0.0], [0.0, 0.0, 0.0]])
    made = round_to_float8(weight, 0)
    assert made.dequantize()[0, 0] == pytest.approx(-3.0)
    assert torch.equal(made.dequantize()[1:], torch.zeros(2, 3))
    for dtype in (torch.float16, torch.bfloat16):
        largest = torch.linspace(1.0, 2.0, 300).unsqueeze(1)
        rounded = round_to_float8(largest, 0, dtype)
        assert (rounded.codes.float() <= LARGEST).all()
        assert torch.allclose(rounded.dequantize(), largest, rtol=0.005)


def test_scales_are_never_subnormal_where_they_are_stored() -> None:
    tiny = torch.finfo(torch.float16).tiny
    scale = torch.tensor([0.0, 1e-42, tiny / 8, 3.0])
    assert torch.equal(storable(scale, torch.float16), torch.tensor([1.0, 1.0, tiny, 3.0]))
    assert torch.equal(storable(scale, torch.float32), torch.tensor([1.0, 1.0, tiny / 8, 3.0]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(texts, value: float) -> None:
    with pytest.raises(StageError, match="1 of its values NaN or infinite"):
        round_to_float8(torch.tensor([[1.0, value]]), 0)
    workload, checkpoint = texts
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    tensors[next(name for name in tensors if name.startswith("up"))][3, 4] = value
    with pytest.raises(StageError, match=r"(?s)quantizing 'up\.MatMul'.*1 of its values NaN"):
        quantize(Checkpoint("onnx", tensors, checkpoint.files), workload, QuantizeConfig(**SHARES))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("toy", ["texts", "images"])
def test_a_graph_stores_a_byte_for_each_weight(
    toy: str, per_channel: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    workload, checkpoint = request.getfixturevalue(toy)
    quantized, report = quantize(checkpoint, workload, QuantizeConfig(**SHARES, per_channel=per_channel))
    assert report.method == "weight-only-fp8"
    assert report.coverage == 1.0
    assert 0.99 < report.agreement < 1.0
    model = graph.join(quantized)
    codes = [one for one in model.graph.initializer if one.data_type == TensorProto.FLOAT8E4M3FN]
    assert sum(int(np.prod(one.dims)) for one in codes) == report.quantized_weights == report.eligible_weights
    assert sum(len(one.raw_data) for one in codes) == report.quantized_weights
    scales = [one for one in model.graph.initializer if one.name.endswith("_scale")]
    assert {sorted(one.dims)[-1] > 1 for one in scales} == {per_channel}
    assert next(one.version for one in model.opset_import if one.domain == "") == 19
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    left = [one.name for one in optimized.initializer if one.data_type == TensorProto.FLOAT8E4M3FN]
    assert not left, "weights are made anew in each call"


def test_the_graph_computes_what_the_rounded_module_does(images) -> None:
    workload, checkpoint = images
    quantized, _ = quantize(checkpoint, workload, QuantizeConfig(**SHARES))
    rounded = make_cnn()
    body = rounded.body
    norm, conv = body[1], body[0]
    with torch.no_grad():  # the exporter folds the normalisation into the convolution before it
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        conv.weight.mul_(factor.view(-1, 1, 1, 1))
        conv.bias.copy_((conv.bias - norm.running_mean) * factor + norm.bias)
        body[1] = torch.nn.Identity()
        for layer in (body[0], body[3], body[7], body[9]):
            layer.weight.copy_(round_to_float8(layer.weight, 0).dequantize())
    session = graph.session(quantized)
    for batch in workload.batches("evaluation", 16):
        assert np.allclose(graph.run(session, batch.inputs), rounded(**batch.inputs).detach().numpy(), atol=1e-5)


def test_an_operator_set_without_the_type_is_refused(texts) -> None:
    model = graph.join(texts[1])
    weights = float8_layers(model, eligible_layers(model, False), per_channel=True)
    model.opset_import[0].version = 17
    with pytest.raises(StageError, match=r"(?s)operator set 17.*export\.opset to 19"):
        float8.store_(model, weights)


def test_a_pack_gives_back_every_bit(texts, tmp_path: Path) -> None:
    workload, checkpoint = texts
    quantized, _ = quantize(checkpoint, workload, QuantizeConfig(**SHARES))
    dtypes = {tensor.dtype for tensor in quantized.tensors.values()}
    assert torch.float8_e4m3fn in dtypes
    store = LocalStore(tmp_path / "store")
    pack = make_pack(tmp_path / "shards", quantized)
    pack.publish(store)
    coded = {tensor.name: tensor for tensor in pack.manifest.tensors if tensor.dtype == "F8_E4M3"}
    assert len(coded) == 2
    assert all(tensor.stored_bytes < 2048 for tensor in coded.values())
    _, loaded = load.load_checkpoint(store, "demo", pack.digest)
    assert_same(loaded, quantized)
    load.pull(store, "demo", pack.digest, tmp_path / "pulled", "onnx")
    assert json.loads((tmp_path / "pulled" / "modelpress.json").read_text())["kind"] == "onnx"
    session = onnxruntime.InferenceSession(tmp_path / "pulled" / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = next(workload.batches("evaluation", 4)).inputs
    assert np.array_equal(graph.run(session, inputs), graph.run(graph.session(quantized, threads=1), inputs))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"group_size": 64}, "group_size is only read with an integer quantize.algorithm"),
        ({"symmetric": False}, "symmetric is only read with an integer"),
        ({"num_bits": 4}, "'fp8' needs quantize.num_bits 8"),
        ({"method": "static"}, "quantize.algorithm is only read with quantize.method 'weight-only'"),
        ({"act_order": True}, "act_order needs quantize.algorithm 'gptq'"),
        ({"algorithm": "rtn", "per_channel": False}, "per_channel is only read with .* quantize.algorithm 'fp8'"),
    ],
)
def test_options_that_nobody_reads_are_refused(change: dict, expected: str) -> None:

    workload = {"kind": "image-classification", "model": "digits-cnn", "data": "digits"}
    with pytest.raises(ConfigError, match=expected):
        parse_config({"name": "a", "workload": workload, "quantize": SHARES | change})
