"""Magnitude pruning: exactly the zeros that were asked for, the smallest weights, for good."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modelpress.config import PruneConfig, TrainConfig
from modelpress.errors import ConfigError, CoverageError, StageError
from modelpress.prune import prune_
from modelpress.prune.zeros import prunable_weights
from tests.train.toy import Toy


def net(width: int = 12) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(45, width), nn.ReLU(), nn.Linear(width, 3)),
    )


def workload() -> Toy:
    return Toy(net, shape=(1, 5, 5))


@settings(max_examples=25, deadline=None)
@given(sparsity=st.floats(0.02, 0.95), seed=st.integers(0, 5), levels=st.sampled_from([0, 3]))
def test_each_tensor_gets_exactly_its_zeros(sparsity: float, seed: int, levels: int) -> None:
    """Also where many weights are equal in size (`levels`), so that a threshold alone would take too many."""
    toy = workload()
    module = toy.source()
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in prunable_weights(module).values():
            weight.copy_(torch.randint(1, levels + 1, weight.shape) if levels else torch.randn(weight.shape))
    before = {name: weight.detach().clone() for name, weight in prunable_weights(module).items()}
    report = prune_(module, toy, PruneConfig(method="magnitude", sparsity=sparsity))
    changes = {change.name: change for change in report.tensors}
    for name, weight in prunable_weights(module).items():
        zeros = weight == 0
        assert int(zeros.sum()) == round(sparsity * weight.numel())
        assert torch.equal(weight[~zeros], before[name][~zeros])
        if zeros.any():
            assert before[name][zeros].abs().max() <= before[name][~zeros].abs().min()
            assert changes[f"{name}.weight"].zeros == int(zeros.sum())
    assert report.zeros_after == sum(change.zeros for change in report.tensors)
    assert report.parameters_after == report.parameters_before


def test_ties_are_broken_the_same_way_each_time() -> None:
    toy = workload()
    first, second = toy.source(), toy.source()
    for module in (first, second):
        for weight in prunable_weights(module).values():
            nn.init.constant_(weight, 0.5)
        prune_(module, toy, PruneConfig(method="magnitude", sparsity=0.3))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    weight = first.body[4].weight.flatten()
    assert not weight[: round(0.3 * weight.numel())].any()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8])
def test_global_scope_takes_the_smallest_of_all(sparsity: float) -> None:
    toy = workload()
    module = toy.source()
    before = torch.cat([weight.detach().abs().flatten() for weight in prunable_weights(module).values()])
    prune_(module, toy, PruneConfig(method="magnitude", scope="global", sparsity=sparsity))
    after = torch.cat([weight.detach().abs().flatten() for weight in prunable_weights(module).values()])
    assert int((after == 0).sum()) == round(sparsity * len(before))
    assert before[after == 0].max() <= before[after != 0].min()


def test_zeros_stay_zeros_in_the_recovery() -> None:
    toy = workload()
    module = toy.source()
    plain = copy.deepcopy(module)
    prune_(plain, toy, PruneConfig(method="magnitude", sparsity=0.8))
    config = PruneConfig(method="magnitude", sparsity=0.8, recovery=TrainConfig(epochs=5, weight_decay=0.1))
    report = prune_(module, toy, config)
    assert report.recovery is not None
    for (name, weight), expected in zip(
        prunable_weights(module).items(), prunable_weights(plain).values(), strict=True
    ):
        assert torch.equal(weight == 0, expected == 0), name
        assert not torch.equal(weight, expected), name


def test_recovery_brings_the_answers_back() -> None:
    toy = workload()
    module = toy.source()
    x = toy.x[toy.rows["evaluation"]]
    expected = module(x).softmax(-1).detach()
    plain, recovered = copy.deepcopy(module), copy.deepcopy(module)
    prune_(plain, toy, PruneConfig(method="magnitude", sparsity=0.7))
    training = TrainConfig(epochs=60, batch_size=16, learning_rate=0.01)
    prune_(recovered, toy, PruneConfig(method="magnitude", sparsity=0.7, recovery=training))
    distance = [float((m(x).softmax(-1) - expected).abs().mean().detach()) for m in (plain, recovered)]
    assert distance[1] < 0.6 * distance[0]


def test_targets_and_ignore_leave_the_rest_alone() -> None:
    toy = workload()
    module = toy.source()
    before = copy.deepcopy(module.state_dict())
    config = PruneConfig(method="magnitude", sparsity=0.5, targets=["body.*"], ignore=["body.6"])
    report = prune_(module, toy, config)
    assert [change.name for change in report.tensors] == ["body.0.weight", "body.4.weight"]
    assert torch.equal(module.body[6].weight, before["body.6.weight"])
    assert report.touched_parameters == 45 + 45 * 12
    assert report.eligible_parameters == 45 + 45 * 12 + 36
    assert report.coverage == (45 + 45 * 12) / (45 + 45 * 12 + 36)


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    toy = Toy(Tied)
    report = prune_(toy.source(), toy, PruneConfig(method="magnitude", sparsity=0.5))
    assert report.eligible_parameters == 16
    assert len(report.tensors) == 1


def test_errors_come_before_anything_changed() -> None:
    toy = workload()
    module = toy.source()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CoverageError, match="would become zero"):
        prune_(module, toy, PruneConfig(method="magnitude", sparsity=0.995))
    with torch.no_grad():
        module.body[6].weight.mul_(1e-6)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CoverageError, match=r"body\.6"):
        prune_(module, toy, PruneConfig(method="magnitude", scope="global", sparsity=0.5))
    with pytest.raises(ConfigError, match=r"body\.4"):
        prune_(module, toy, PruneConfig(method="magnitude", targets=["bdy.4"]))
    with pytest.raises(CoverageError, match="removes nothing"):
        prune_(module, toy, PruneConfig(method="magnitude", sparsity=0.0001))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_weights_that_are_not_finite_are_refused() -> None:
    toy = workload()
    module = toy.source()
    with torch.no_grad():
        module.body[4].weight[0, 0] = math.nan
    with pytest.raises(StageError, match=r"body\.4"):
        prune_(module, toy, PruneConfig(method="magnitude"))
    attention = Toy(lambda: nn.Embedding(3, 3))
    with pytest.raises(CoverageError, match="no linear"):
        prune_(attention.source(), attention, PruneConfig(method="magnitude"))
