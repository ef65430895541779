from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import ExportConfig, QuantizeConfig
from modelpress.errors import ConfigError, CoverageError, StageError
from modelpress.export import export
from modelpress.quantize import quantize
from modelpress.quantize.observe import hessians, observe
from modelpress.workload import Batch
from tests.toys import ImageToy, TextToy, TinyEncoder, make_cnn

SHARES = {"min_coverage": 0, "max_quality_drop": 2}


def weight_only(**options) -> QuantizeConfig:
    return QuantizeConfig(method="weight-only", **{"num_bits": 4, "group_size": 32, **SHARES, **options})


class Deep(nn.Module):
    """A table and six residual layers whose inputs are correlated."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(100, width)
        self.mix = nn.Linear(width, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
        with torch.no_grad():
            self.mix.weight.copy_(torch.randn(width, 6) @ torch.randn(6, width) / 6)
            for layer in self.layers:
                layer.weight *= 2

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.mix(self.table(ids))
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


@pytest.fixture(scope="module")
def deep() -> tuple[TextToy, Checkpoint]:
    workload = TextToy(Deep().eval(), samples=64)
    return workload, export(workload.module, workload, ExportConfig())[0]


@pytest.fixture(scope="module")
def pruned() -> tuple[TextToy, Checkpoint]:
    torch.manual_seed(0)
    module = TinyEncoder().eval()
    with torch.no_grad():
        module.up.weight[torch.rand_like(module.up.weight) < 0.5] = 0
    workload = TextToy(module)
    return workload, export(module, workload, ExportConfig())[0]


def outputs(checkpoint: Checkpoint, workload: TextToy | ImageToy) -> np.ndarray:
    session = graph.session(checkpoint)
    return np.concatenate([graph.run(session, batch.inputs) for batch in workload.batches("evaluation", 16)])


def products(checkpoint: Checkpoint) -> list[onnx.NodeProto]:
    return [node for node in graph.parse(checkpoint).graph.node if node.op_type == "MatMulNBits"]


def attribute(node: onnx.NodeProto, name: str) -> int:
    return next(one.i for one in node.attribute if one.name == name)


OPTIONS = [
    {"algorithm": "rtn"},
    {"algorithm": "gptq"},
    {"algorithm": "gptq", "symmetric": False, "act_order": True},
    {"algorithm": "hqq", "symmetric": False},
    {"algorithm": "rtn", "num_bits": 8, "group_size": 16},
    {"algorithm": "gptq", "num_bits": 8, "symmetric": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_product_takes_grouped_weights(deep, options: dict) -> None:
    workload, checkpoint = deep
    config = weight_only(**options)
    quantized, report = quantize(checkpoint, workload, config)
    assert report.method == f"weight-only-{config.algorithm}-int{config.num_bits}"
    assert report.coverage == 1.0
    assert report.quantized_weights == 7 * 48 * 48
    nodes = products(quantized)
    assert len(nodes) == 7
    assert {(attribute(node, "bits"), attribute(node, "block_size")) for node in nodes} == {
        (config.num_bits, config.group_size)
    }
    sizes = [tensor.nbytes for tensor in quantized.tensors.values() if tensor.dtype == torch.uint8]
    groups = -(-48 // config.group_size)
    assert sum(sizes) >= 7 * 48 * groups * config.group_size * config.num_bits // 8 > 0
    # The table stays in float: nobody asked for it.
    floats = [one for one in graph.join(quantized).graph.initializer if one.data_type == TensorProto.FLOAT]
    assert max(int(np.prod(one.dims)) for one in floats) == 100 * 48
    assert report.agreement > (0.95 if config.num_bits == 4 else 0.999)
    assert np.abs(outputs(quantized, workload) - outputs(checkpoint, workload)).max() > 0


def test_gptq_agrees_better_with_the_float_graph_than_rounding(deep) -> None:
    workload, checkpoint = deep
    drops = {
        name: 1 - quantize(checkpoint, workload, weight_only(algorithm=name))[1].agreement for name in ("rtn", "gptq")
    }
    assert drops["gptq"] < 0.7 * drops["rtn"]


def test_embeddings_are_stored_as_int8_rows(deep) -> None:
    workload, checkpoint = deep
    quantized, report = quantize(checkpoint, workload, weight_only(embeddings=True))
    assert report.coverage == 1.0
    assert report.eligible_weights == 100 * 48 + 7 * 48 * 48
    assert [tuple(tensor.shape) for tensor in quantized.tensors.values() if tensor.dtype == torch.int8] == [(100, 48)]


def test_sensitive_layers_take_eight_bits(deep) -> None:
    workload, checkpoint = deep
    loose = quantize(checkpoint, workload, weight_only(algorithm="rtn"))[1]
    budget = 0.4 * (1 - loose.agreement)
    quantized, report = quantize(checkpoint, workload, weight_only(algorithm="rtn", max_quality_drop=budget))
    bits = {node.name: attribute(node, "bits") for node in products(quantized)}
    kept = {row.node for row in report.sensitivity if row.kept_float}
    assert kept == {name for name, count in bits.items() if count == 8}
    assert 0 < len(kept) < 7
    assert len(bits) == 7
    assert report.coverage == 1.0
    assert 1 - report.agreement <= budget


@pytest.mark.parametrize("options", OPTIONS[:3] + OPTIONS[4:], ids=str)
def test_pruned_weights_stay_zero(pruned, options: dict) -> None:
    workload, checkpoint = pruned
    quantized, _ = quantize(checkpoint, workload, weight_only(**options))
    model = graph.join(quantized)
    stored = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    node = next(node for node in products(quantized) if node.name == "up.MatMul")
    bits, size = attribute(node, "bits"), attribute(node, "block_size")
    packed = stored[node.input[1]].reshape(64, -1)
    codes = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(64, -1)
    groups = 32 // size
    zero = np.full((64, groups), 2 ** (bits - 1))
    if len(node.input) > 3:
        points = stored[node.input[3]].reshape(64, -1)
        zero = points if bits == 8 else np.stack([points & 15, points >> 4], axis=-1).reshape(64, -1)[:, :groups]
    means_zero = codes == zero.repeat(size, axis=1)
    assert means_zero[workload.module.up.weight.detach().numpy() == 0].all()
    assert means_zero.mean() < 0.9


def test_real_zero_points_refuse_a_pruned_weight(pruned) -> None:
    workload, checkpoint = pruned
    with pytest.raises(StageError, match=r"(?s)'up\.MatMul'.*4\d% zeros"):
        quantize(checkpoint, workload, weight_only(algorithm="hqq", symmetric=False))


def test_a_gemm_keeps_its_bias_and_a_convolution_stays_in_float() -> None:
    workload = ImageToy(make_cnn())
    checkpoint, _ = export(workload.module, workload, ExportConfig())
    quantized, report = quantize(checkpoint, workload, weight_only(num_bits=8))
    assert report.coverage == pytest.approx((3072 + 160) / 4168)
    expected, found = outputs(checkpoint, workload), outputs(quantized, workload)
    assert 0 < np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    with pytest.raises(ConfigError, match=r"(?s)'body.3.Conv'.*a convolution"):
        quantize(checkpoint, workload, weight_only(targets=["body.3.Conv"]))
    with pytest.raises(ConfigError, match="matches none"):
        quantize(checkpoint, workload, weight_only(targets=["body.8.Gemm"]))
    with pytest.raises(CoverageError, match="min_coverage"):
        quantize(checkpoint, workload, weight_only(targets=["body.9.Gemm"], min_coverage=0.5))


class Masked(TextToy):
    """The second half of every row is padding."""

    def batches(self, split, batch_size, seed=None):
        for batch in super().batches(split, batch_size, seed):
            ids = torch.cat([batch.inputs["ids"], torch.zeros_like(batch.inputs["ids"])], dim=1)
            mask = torch.cat([batch.inputs["mask"], torch.zeros_like(batch.inputs["mask"])], dim=1)
            yield Batch({"ids": ids, "mask": mask, "attention_mask": mask})


def test_padding_does_not_count() -> None:
    plain, padded = TextToy(), Masked()
    checkpoint, _ = export(plain.module, plain, ExportConfig())
    model = graph.join(checkpoint)
    value = next(node.input[0] for node in model.graph.node if node.name == "up.MatMul")
    first, second = (
        hessians(model, [value], [batch.inputs for batch in workload.batches("calibration", 16)])[value]
        for workload in (plain, padded)
    )
    assert torch.allclose(first, second, rtol=1e-5, atol=1e-6)
    rows = next(observe(model, [value], [next(plain.batches("calibration", 16)).inputs]))[value]
    assert rows.shape == (16 * 6, 32)


def test_a_calibration_value_that_is_not_finite_is_named(deep) -> None:
    _, checkpoint = deep
    model = graph.join(checkpoint)
    for initializer in model.graph.initializer:
        if list(initializer.dims) == [100, 48]:
            values = np.array(numpy_helper.to_array(initializer))
            values[:] = np.nan
            initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
    with pytest.raises(StageError, match=r"(?s)observing .* NaN or infinite"):
        quantize(graph.split(model), TextToy(), weight_only(algorithm="gptq"))


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_a_weight_that_is_not_finite_is_named(deep, algorithm: str) -> None:
    workload, checkpoint = deep
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    name = next(name for name in tensors if name.startswith("layers.2"))
    tensors[name][3, 4] = torch.inf
    broken = Checkpoint("onnx", tensors, checkpoint.files)
    with pytest.raises(StageError, match=r"(?s)quantizing 'layers\.2\.MatMul'.*1 of its values NaN or infinite"):
        quantize(broken, workload, weight_only(algorithm=algorithm, targets=["layers.2.*"]))
