"""Structured pruning: what is gone was zero's equal, every tensor shrank, and the rest made up for it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modelpress.checkpoint import Checkpoint, from_module, to_module
from modelpress.config import PruneConfig, TrainConfig
from modelpress.distill import count_parameters
from modelpress.errors import ConfigError, CoverageError, ExportError, StageError
from modelpress.moments import Moments
from modelpress.prune import prune_
from modelpress.prune.dependencies import Group, Reader, find_groups
from modelpress.prune.repair import repaired_costs, without
from modelpress.reports import PruneReport
from tests.prune.models import ALL, CASES, Attention, settled, toy_of
from tests.train.toy import Toy


@pytest.mark.parametrize("case", CASES)
def test_what_hangs_together_is_found(case: str) -> None:
    toy = toy_of(case)
    groups, _ = find_groups(settled(toy), toy.example(3))
    assert {group.kind for group in groups} == CASES[case][2]


def test_groups_of_the_cnn() -> None:
    toy = toy_of("cnn")
    groups, refused = find_groups(settled(toy), toy.example(3))
    assert groups == [
        Group("channels", 8, 1, ["body.0"], ["body.1"], [Reader("body.4", 1)]),
        Group("channels", 12, 1, ["body.4"], [], [Reader("body.7", 9)]),
        Group("neurons", 16, 1, ["body.7"], [], [Reader("body.10", 1)]),
    ]
    assert refused == {"body.10": "its output meets the model's output"}


def test_producers_that_meet_are_one_group() -> None:
    toy = toy_of("residual")
    groups, _ = find_groups(settled(toy), toy.example(3))
    assert [sorted(group.producers) for group in groups] == [["body.branch", "body.stem"]]
    assert groups[0].followers == ["body.norm", "body.depthwise"]
    assert {reader.name: reader.block for reader in groups[0].readers} == {"body.branch": 1, "body.head": 36}


def test_groups_of_an_encoder() -> None:
    toy = toy_of("bert")
    groups, refused = find_groups(settled(toy), toy.example(3))
    layer = "body.bert.encoder.layer.0"
    heads, neurons = groups[:2]
    assert (heads.kind, heads.size, heads.width) == ("heads", 4, 4)
    assert sorted(heads.producers) == [f"{layer}.attention.self.{name}" for name in ("key", "query", "value")]
    assert heads.readers == [Reader(f"{layer}.attention.output.dense", 4)]
    assert (neurons.kind, neurons.size, neurons.producers) == ("neurons", 24, [f"{layer}.intermediate.dense"])
    assert len(groups) == 4
    assert "layer_norm" in refused[f"{layer}.output.dense"] or "add" in refused[f"{layer}.output.dense"]


def masked(dense: nn.Module, report: PruneReport, groups: list[Group]) -> nn.Module:
    """The dense model with zeros where the pruned one has nothing: the readers' columns of what was removed."""
    module = copy.deepcopy(dense)
    kept = {change.name: change.kept for change in report.tensors if change.kept is not None}
    with torch.no_grad():
        for group in groups:
            gone = sorted(set(range(group.size)) - set(kept[f"{group.producers[0]}.weight"] or []))
            for reader in group.readers:
                weight = module.get_submodule(reader.name).weight
                for structure in gone:
                    weight[:, structure * reader.block : (structure + 1) * reader.block] = 0
    return module


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("sparsity", "importance"), [(0.25, "activation"), (0.5, "magnitude"), (0.5, "taylor")])
def test_pruned_equals_masked(case: str, sparsity: float, importance: str) -> None:
    toy = toy_of(case)
    dense = settled(toy)
    groups, _ = find_groups(dense, toy.example(3))
    pruned = copy.deepcopy(dense)
    config = PruneConfig(structures=ALL, sparsity=sparsity, repair=False, importance=importance)
    report = prune_(pruned, toy, config)
    assert all(parameter.requires_grad for parameter in pruned.parameters())
    expected = masked(dense, report, groups)(toy.x)
    assert (pruned(toy.x) - expected).abs().max() < 1e-5
    assert (expected - dense(toy.x)).abs().max() > 1e-3
    assert report.parameters_after == count_parameters(pruned) < report.parameters_before == count_parameters(dense)
    for group in groups:
        change = next(c for c in report.tensors if c.name == f"{group.producers[0]}.weight")
        assert len(change.kept or []) == group.size - round(sparsity * group.size)
        assert change.after[0] == len(change.kept or []) * group.width


@pytest.mark.parametrize("case", CASES)
def test_every_shrunken_tensor_is_reported(case: str) -> None:
    toy = toy_of(case)
    module = settled(toy)
    before = {name: list(value.shape) for name, value in module.state_dict().items()}
    report = prune_(module, toy, PruneConfig(structures=ALL, sparsity=0.5))
    after = {name: list(value.shape) for name, value in module.state_dict().items()}
    shrunk = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert {change.name: (change.before, change.after) for change in report.tensors} == shrunk
    assert 0 < report.touched_parameters <= report.eligible_parameters
    assert report.coverage == report.touched_parameters / report.eligible_parameters
    assert report.metrics()["coverage"] == report.coverage


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("importance", ["activation", "magnitude"])
def test_repair_is_nearer_to_the_dense_model(case: str, importance: str) -> None:
    toy = toy_of(case)
    dense = settled(toy)
    x = toy.x[toy.rows["calibration"]]
    error = {}
    for repair in (False, True):
        module = copy.deepcopy(dense)
        prune_(module, toy, PruneConfig(structures=ALL, sparsity=0.5, repair=repair, importance=importance))
        error[repair] = float((module(x) - dense(x)).square().mean().detach())
    assert error[True] < 0.8 * error[False]


@pytest.mark.parametrize("case", CASES)
def test_a_pruned_model_is_rebuilt_from_its_checkpoint(case: str) -> None:
    toy = toy_of(case)
    module = settled(toy)
    prune_(module, toy, PruneConfig(structures=ALL, sparsity=0.5))
    back = to_module(Checkpoint.from_bytes(from_module(module).to_bytes()), toy)
    assert torch.equal(back(toy.x), module(toy.x))
    assert repr(back) == repr(module)


def test_a_pruned_model_can_be_trained_and_pruned_again() -> None:
    toy = toy_of("cnn")
    module = settled(toy)
    report = prune_(module, toy, PruneConfig(sparsity=0.25, recovery=TrainConfig(epochs=2)))
    assert report.recovery is not None
    assert report.recovery.updates > 0
    assert all(parameter.requires_grad for parameter in module.parameters())
    again = prune_(module, toy, PruneConfig(sparsity=0.5))
    assert again.parameters_after < report.parameters_after


def test_least_squares_repair_equals_the_formula() -> None:
    """W' = W H[:, k] H[k, k]⁻¹, also when removed in two rounds; and the cost is the loss that it leaves."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 9, generator=generator, dtype=torch.float64)
    x[:, 3] = x[:, 0] - 2 * x[:, 5] + 0.01 * x[:, 3]
    w = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    h = x.T @ x / len(x)
    inverse = torch.linalg.inv(h)
    repaired, rest = without(w, inverse, torch.tensor([3]))
    repaired, _ = without(repaired, rest, torch.tensor([7, 8]))
    kept = [0, 1, 2, 4, 5, 6]
    expected = w @ h[:, kept] @ torch.linalg.inv(h[kept][:, kept])
    assert torch.allclose(repaired[:, kept], expected)
    assert not repaired[:, [3, 7, 8]].any()
    costs = repaired_costs(w, inverse, 3)
    for block in range(3):
        gone, _ = without(w, inverse, torch.arange(3) + 3 * block)
        assert float(costs[block]) == pytest.approx(float(((gone - w) @ x.T).square().sum() / len(x)), rel=1e-6)


def test_a_neuron_that_repeats_another_is_removed_without_loss() -> None:
    toy = Toy(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    module = toy.source()
    with torch.no_grad():
        module.body[0].weight[4:] = module.body[0].weight[:2]
        module.body[0].bias[4:] = module.body[0].bias[:2]
    expected = module(toy.x).detach()
    report = prune_(module, toy, PruneConfig(structures=["neurons"], sparsity=0.34))
    assert module.body[0].out_features == 4
    kept = report.tensors[0].kept or []
    assert {index % 4 for index in kept} == {0, 1, 2, 3}
    assert torch.allclose(module(toy.x), expected, atol=0.02)


def test_moments_leave_padding_out() -> None:
    layer = nn.Linear(3, 2)
    inputs = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    whole, part = Moments(layer), Moments(layer)
    whole.add(inputs, mask)
    inputs[0, 2:] = 1e6
    part.add(inputs, mask)
    assert part.rows == 6
    assert torch.equal(whole.sum, part.sum)


def test_targets_and_ignore_choose_groups() -> None:
    toy = toy_of("cnn")
    module = settled(toy)
    prune_(module, toy, PruneConfig(sparsity=0.5, targets=["body.[04]"], ignore=["body.0"]))
    assert (module.body[0].out_channels, module.body[4].out_channels, module.body[7].out_features) == (8, 6, 16)
    only = settled(toy)
    prune_(only, toy, PruneConfig(sparsity=0.5, structures=["neurons"]))
    assert (only.body[0].out_channels, only.body[7].out_features) == (8, 8)


def test_errors_come_before_anything_changed() -> None:
    toy = toy_of("cnn")
    module = settled(toy)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ConfigError, match=r"body\.10(.|\n)*the model's output"):
        prune_(module, toy, PruneConfig(targets=["body.10"]))
    with pytest.raises(ConfigError, match="bdy"):
        prune_(module, toy, PruneConfig(ignore=["bdy.4"]))
    with pytest.raises(CoverageError, match="would go"):
        prune_(module, toy, PruneConfig(sparsity=0.97))
    with pytest.raises(CoverageError, match="heads"):
        prune_(module, toy, PruneConfig(structures=["heads"]))
    with pytest.raises(CoverageError, match="removes nothing"):
        prune_(module, toy, PruneConfig(sparsity=0.01))
    toy.x[0, 0, 0, 0] = float("nan")
    toy.x[toy.rows["calibration"][0]] = float("inf")
    with pytest.raises(StageError, match="NaN"):
        prune_(module, toy, PruneConfig())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_what_cannot_be_traced_says_so() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) if float(x.sum()) > 0 else x)

    toy = Toy(Branching)
    with pytest.raises(ExportError, match="magnitude"):
        prune_(toy.source(), toy, PruneConfig())


@pytest.mark.parametrize("shape", [(5, 4, -1), (5, 4, 2)], ids=["silently wrong", "fails"])
def test_a_forward_pass_with_sizes_of_its_own_is_noticed(shape: tuple[int, ...]) -> None:
    """A reshape to a fixed number of heads would mix the heads that are left."""

    class Fixed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).view(len(x), *shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.head(self.out(mixed.transpose(1, 2).flatten(2)).mean(dim=1))

    toy = Toy(Fixed, (5, 8))
    with pytest.raises(StageError, match=r"masked one(.|\n)*heads"):
        prune_(toy.source(), toy, PruneConfig(structures=["heads"], sparsity=0.5))


def test_a_layer_that_is_called_twice_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(self.a(x).relu())).relu())

    toy = Toy(Twice)
    groups, _ = find_groups(toy.source(), toy.example(3))
    assert [group.producers for group in groups] == [["body.b"]]


def sequence() -> nn.Module:
    """A 1-D convolution that another reads, and a linear layer behind it."""
    layers = [nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 3))


def padded(**options: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, **options), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))

    return make


@pytest.mark.parametrize("repair", [True, False])
@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (sequence, (3, 8), r"body\.2, which reads it, is a Conv1d"),
        (padded(padding="same"), (3, 8, 8), r"body\.2, which reads it, pads by 'same'"),
        (padded(padding="valid"), (3, 8, 8), r"body\.2, which reads it, pads by 'valid'"),
    ],
    ids=["conv1d", "same", "valid"],
)
def test_what_an_unsupported_layer_reads_is_left_alone(
    make: Callable[[], nn.Module], shape: tuple[int, ...], reason: str, repair: bool
) -> None:
    toy = Toy(make, shape)
    module = toy.source()
    module(**toy.example(2))
    prune_(module, toy, PruneConfig(sparsity=0.5, repair=repair))
    assert (module.body[0].out_channels, module.body[2].out_channels, module.body[5].out_features) == (6, 2, 4)
    with pytest.raises(ConfigError, match=reason):
        prune_(module, toy, PruneConfig(targets=["body.0"], repair=repair))


@pytest.mark.parametrize("repair", [True, False])
def test_too_few_inputs_to_judge_by_are_refused(repair: bool) -> None:
    """A repair that is fitted to one sample fits that one alone."""
    toy = Toy(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), samples=60)  # a fourth calibrates
    module = toy.source()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(StageError, match=r"15 rows(.|\n)*at least 16(.|\n)*calibration_samples"):
        prune_(module, toy, PruneConfig(structures=["neurons"], repair=repair))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    prune_(module, toy, PruneConfig(structures=["neurons"], repair=False, importance="magnitude"))  # which asks no data
