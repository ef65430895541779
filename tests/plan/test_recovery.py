from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn

from modelpress import graph
from modelpress.checkpoint import from_module
from modelpress.compress import compress
from modelpress.config import CompressConfig, ExportConfig, PlanConfig, TrainConfig
from modelpress.errors import BudgetExceededError, ConfigError, StageError
from modelpress.export import export
from modelpress.plan import plan
from modelpress.plan.candidates import Candidate, encode
from modelpress.plan.recovery import Rounded, Rounding, plan_module, round_weight
from tests.toys import ImageToy, TextToy

TRAINING = TrainConfig(epochs=20, batch_size=16, learning_rate=3e-3)
COARSE: dict[str, Any] = {
    "num_bits": [2, 3, 4],
    "group_sizes": [16],
    "sparsity": [0.0, 0.5],
    "points": 0,
    "recovery": TRAINING,
}


@given(st.integers(2, 8), st.sampled_from(["tensor", "channel", 8]), st.integers(0, 1), st.integers(0, 2**32 - 1))
def test_training_rounds_as_the_pack_does(num_bits: int, scale: Any, channel_axis: int, seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(16, 16)).astype(np.float32)
    weight[3] = 0
    candidate = Candidate(num_bits, scale)
    stored = encode(weight, candidate, channel_axis).dequantize()
    assert np.array_equal(round_weight(torch.from_numpy(weight), candidate, channel_axis).numpy(), stored)


def test_the_gradient_passes_and_zeros_stay() -> None:
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    module = Line()
    zeros = torch.zeros(3, 4, dtype=torch.bool)
    zeros[0] = True
    rounded = Rounded(module, {"layer.weight": Rounding(Candidate(2, "channel"), True, 1, zeros)})
    rounded(x=torch.ones(1, 4)).sum().backward()
    assert torch.equal(module.layer.weight.grad, torch.ones(3, 4))
    rounded.hold()
    assert torch.equal(module.layer.weight == 0, zeros)


@pytest.mark.parametrize("toy", [ImageToy, TextToy])
def test_training_within_a_plan_brings_it_closer(toy: type[ImageToy] | type[TextToy]) -> None:
    workload = toy()
    module = workload.source()
    before = from_module(module).to_bytes()
    source = export(module, workload, ExportConfig())[0]
    config = PlanConfig(max_disagreement=0.05 if toy is TextToy else 0.002, **COARSE)
    made, report = plan_module(module, source, workload, config, ExportConfig(), CompressConfig())
    assert from_module(module).to_bytes() == before
    assert report.recovery is not None
    assert report.untrained_disagreement is not None
    assert report.disagreement < 0.8 * report.untrained_disagreement
    assert report.coded_bytes == compress(made, CompressConfig())[1].stored_bytes
    initializers = {one.name: one for one in graph.join(made).graph.initializer}
    for row in report.tensors:
        if row.num_bits is None:
            continue
        codes = numpy_helper.to_array(initializers[row.name + "_codes"])
        assert codes.dtype == np.int8
        assert np.abs(codes.astype(int)).max() <= 2 ** (row.num_bits - 1) - 1
        assert np.mean(codes == 0) >= (row.sparsity or 0)


class Doubled(nn.Module):
    """The weight that is multiplied is none of the parameters: it is twice one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(100, 32)
        self.inner = nn.Parameter(torch.randn(32, 32))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.matmul(self.table(ids), 2 * self.inner) * mask.unsqueeze(-1)
        return hidden.sum(dim=1)


def test_a_weight_that_is_no_parameter_is_named() -> None:
    workload = TextToy(Doubled().eval())
    module = workload.source()
    source = export(module, workload, ExportConfig())[0]
    with pytest.raises(StageError, match=r"no parameter of the module with its 1024 values") as caught:
        plan_module(module, source, workload, PlanConfig(max_disagreement=0.05, **COARSE), ExportConfig())
    assert "plan.ignore: matmul" in str(caught.value).lower()


def test_a_training_that_leaves_the_budget_is_an_error() -> None:
    workload = ImageToy()
    module = workload.source()
    source = export(module, workload, ExportConfig())[0]
    wild = TRAINING.model_copy(update={"learning_rate": 1.0, "epochs": 2})
    config = PlanConfig(max_disagreement=0.002, **(COARSE | {"recovery": wild}))
    with pytest.raises(BudgetExceededError, match=r"plan\.recovery\.learning_rate"):
        plan_module(module, source, workload, config, ExportConfig())


def test_weights_that_two_parameters_equal_are_named() -> None:
    workload = TextToy()
    module = workload.source()
    source = export(module, workload, ExportConfig())[0]
    module.twin = nn.Parameter(module.up.weight.detach().clone())
    with pytest.raises(StageError, match=r"parameters of equal values: .*twin"):
        plan_module(module, source, workload, PlanConfig(max_disagreement=0.05, **COARSE), ExportConfig())


def test_without_a_module_or_a_training_there_is_none() -> None:
    workload = ImageToy()
    module = workload.source()
    source = export(module, workload, ExportConfig())[0]
    with pytest.raises(ConfigError, match="plan_module"):
        plan(source, workload, PlanConfig(recovery=TRAINING))
    with pytest.raises(ConfigError, match=r"no plan\.recovery"):
        plan_module(module, source, workload, PlanConfig(), ExportConfig())
