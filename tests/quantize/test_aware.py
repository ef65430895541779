"""Quantization-aware training: it rounds what int8 rounds, and what it trains loses less in int8."""

from __future__ import annotations

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor, nn

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import ExportConfig, QuantizeConfig, TrainConfig
from modelpress.distill import imitation_loss
from modelpress.errors import CoverageError, StageError
from modelpress.export import export
from modelpress.quantize import quantize
from modelpress.quantize.aware import round_input, round_weight, train_aware_
from modelpress.quantize.from_module import quantize_module
from modelpress.quantize.weights import quantize_symmetric
from modelpress.workload import Workload
from tests.toys import ImageToy, Wrapped
from tests.train.toy import Toy

RECOVERY = TrainConfig(epochs=12, batch_size=16, learning_rate=3e-3)


def int8(**changes: object) -> QuantizeConfig:
    return QuantizeConfig.model_validate({"per_channel": False, "smooth": 0, "recovery": RECOVERY, **changes})


def uneven() -> Wrapped:
    """One scale has to serve rows that differ by a factor of a hundred."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)]
    with torch.no_grad():
        layers[1].weight[:4] *= 100
        layers[3].weight[:, :4] /= 100
        layers[3].weight *= 10  # so that it is sure of its classes
        layers[3].weight[:, 9] = 0
    return Wrapped(nn.Sequential(*layers)).eval()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), per_channel=st.booleans(), size=st.sampled_from([1e-20, 0.3, 1e6]))
def test_weights_are_rounded_as_they_will_be_stored(seed: int, per_channel: bool, size: float) -> None:
    weight = size * torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(seed))
    weight[2] = 0
    codes, scale = quantize_symmetric(weight.numpy(), 0 if per_channel else None)
    stored = codes * (scale.reshape(-1, 1, 1) if per_channel else scale)
    assert np.abs(round_weight(weight, per_channel).numpy() - stored).max() <= 1e-6 * np.abs(stored).max()


@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_inputs_are_rounded_as_onnx_runtime_rounds_them(shift: float) -> None:
    value = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) + shift
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in ("x", "y")]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": value.numpy()})
    low, high = torch.clamp(value.min(), max=0), torch.clamp(value.max(), min=0)
    assert np.abs(round_input(value, low, high).numpy() - expected).max() < 1e-5


def test_the_gradient_passes_through_the_rounding() -> None:
    weight = torch.randn(3, 5, requires_grad=True)
    round_weight(weight, per_channel=True).sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 5))


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_a_trained_module_loses_less_in_int8(method: str) -> None:
    """Its classes on held-out samples, that is; the training doesn't mind what all logits have in common."""
    module = uneven()
    workload = ImageToy(module, samples=768)
    before = copy.deepcopy(module.state_dict())
    checkpoint, _ = export(module, workload, ExportConfig(tolerance=0.01))
    options = {"method": method, "max_quality_drop": 0.5}
    rounded, plain = quantize(checkpoint, workload, int8(**options, recovery=None))
    recovery = RECOVERY.model_copy(update={"learning_rate": 1e-2})
    made, trained = quantize_module(
        module, checkpoint, workload, int8(**options, recovery=recovery), ExportConfig(tolerance=0.01)
    )
    assert trained.coverage == plain.coverage == 1.0
    assert trained.recovery is not None
    assert trained.recovery.epochs == RECOVERY.epochs
    assert divergence(checkpoint, made, workload) < 0.6 * divergence(checkpoint, rounded, workload)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    assert sum(tensor.numel() for tensor in made.tensors.values() if tensor.dtype == torch.int8) == 64 * 32


def divergence(expected: Checkpoint, found: Checkpoint, workload: Workload) -> float:
    (batch,) = workload.batches("evaluation", 768)
    outputs = [torch.from_numpy(graph.run(graph.session(one), batch.inputs)) for one in (found, expected)]
    return float(imitation_loss(*outputs, "logits"))


def test_zeros_stay_zeros_and_nothing_is_left_on_the_module() -> None:
    module = uneven()
    names = list(module.state_dict())
    before = copy.deepcopy(module.body[3].weight)
    report = train_aware_(module, ["body.1", "body.3"], ImageToy(module), int8())
    assert report.final_loss < report.first_loss
    after = module.body[3].weight
    assert (after[:, 9] == 0).all()
    assert not torch.equal(after, before)
    assert list(module.state_dict()) == names
    assert not any(child._forward_pre_hooks for child in module.modules())


def test_an_activation_that_is_not_finite_is_named() -> None:
    class Endless(Toy):
        def batches(self, split, batch_size, seed=None):
            for batch in super().batches(split, batch_size, seed):
                yield type(batch)({"x": batch.inputs["x"] * torch.inf}, batch.targets)

    workload = Endless()
    with pytest.raises(StageError, match=r"input of 'body\.0'"):
        train_aware_(workload.source(), ["body.0"], workload, int8())


def test_names_that_are_no_layers_are_refused() -> None:
    workload = Toy()
    with pytest.raises(CoverageError, match=r"body\.1"):
        train_aware_(workload.source(), ["body.1"], workload, int8())


def test_a_weight_that_two_layers_share_is_rounded_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x.flatten(1)).relu())

    torch.manual_seed(0)
    module = Tied().eval()
    config = int8(method="dynamic", recovery=RECOVERY.model_copy(update={"epochs": 1}))
    assert train_aware_(module, ["first", "second"], ImageToy(module), config).updates > 0
    assert module.second.weight is module.first.weight
