"""Weight sharing: few values in each weight, zeros that stay zeros, values that learn together."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import ExportConfig, QuantizeConfig, TrainConfig
from modelpress.distill import RECOVERY_LOSS, distillation_loss, frozen
from modelpress.errors import ConfigError, CoverageError, StageError
from modelpress.export import export
from modelpress.quantize import quantize
from modelpress.quantize.codebook import cluster_
from modelpress.quantize.from_module import fold_norms_, quantize_module
from modelpress.workload import Workload
from tests.toys import CNN_WEIGHTS, ENCODER_WEIGHTS, ImageToy, TextToy, TinyEncoder, Wrapped
from tests.train.toy import Toy

RECOVERY = TrainConfig(epochs=8, batch_size=16, learning_rate=5e-3)


def net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(45, 24), nn.ReLU(), nn.Linear(24, 3)),
    )


def toy() -> Toy:
    return Toy(net, shape=(1, 5, 5))


def codebook(**changes: object) -> QuantizeConfig:
    return QuantizeConfig.model_validate({"method": "codebook", "num_bits": 2, **changes})


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters() if value.dim() > 1}


def pruned(module: nn.Module, sparsity: float) -> nn.Module:
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() > 1:
                weight[weight.abs() < weight.abs().quantile(sparsity)] = 0
    return module


@settings(max_examples=12, deadline=None)
@given(bits=st.integers(2, 8), sparsity=st.sampled_from([0.0, 0.5, 0.9]), recovery=st.booleans())
def test_each_weight_holds_at_most_its_values_and_zeros_stay(bits: int, sparsity: float, recovery: bool) -> None:
    workload = toy()
    module = pruned(workload.source(), sparsity)
    before = weights_of(module)
    names = list(module.state_dict())
    config = codebook(num_bits=bits, recovery=RECOVERY.model_copy(update={"epochs": 2}) if recovery else None)
    report = cluster_(module, workload, config)
    assert list(module.state_dict()) == names, "no trace of the training is left"
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in module.parameters())
    rows = {row.name: row for row in report.tensors}
    for name, after in weights_of(module).items():
        assert torch.equal(after == 0, before[name] == 0)
        assert after.unique().numel() <= min(2**bits, before[name].unique().numel())
        assert after[after != 0].unique().numel() <= 2**bits - 1
        assert rows[name].zeros == int((after == 0).sum())
        # Equal before the training means equal after it, and the other way round but for chance.
        if not recovery:
            assert rows[name].values == after.unique().numel()
    assert report.shared_weights == report.eligible_weights == sum(weight.numel() for weight in before.values())
    assert (report.recovery is not None) == recovery


def test_trained_values_imitate_the_model_better_than_the_means_do() -> None:
    workload = Toy()
    original = pruned(workload.source(), 0.3)
    losses, sharing = [], []
    for recovery in (None, RECOVERY):
        module = copy.deepcopy(original)
        cluster_(module, workload, codebook(recovery=recovery))
        with frozen(original), torch.no_grad():
            loss = distillation_loss(original, workload, RECOVERY_LOSS)
            losses.append(sum(float(loss(module, batch)) for batch in workload.batches("train", 16)))
        weight = module.body[0].weight.detach()
        sharing.append([(weight == value) for value in weight.unique()])
    assert losses[1] < 0.5 * losses[0]
    assert all(torch.equal(*pair) for pair in zip(*sharing, strict=True)), "members stay with their cluster"


def test_a_centroids_gradient_is_the_sum_over_its_members() -> None:
    """One step of plain gradient descent moves a centroid by the sum of what its members would have moved."""
    workload = toy()
    module = workload.source()
    step = TrainConfig(
        epochs=1, batch_size=48, optimizer="sgd", momentum=0, learning_rate=0.1, schedule="constant",
        warmup_fraction=0, max_grad_norm=0,
    )  # fmt: skip
    config = codebook(targets=["body.6"])
    start = copy.deepcopy(module)
    cluster_(start, workload, config)
    probe = copy.deepcopy(start).train()
    with frozen(copy.deepcopy(module)) as teacher:
        (batch,) = workload.batches("train", 48, seed=0)
        distillation_loss(teacher, workload, RECOVERY_LOSS)(probe, batch).backward()
    cluster_(module, workload, config.model_copy(update={"recovery": step}))
    before, after, gradient = start.body[6].weight, module.body[6].weight, probe.body[6].weight.grad
    for value in before.unique():
        members = before == value
        moved = value - 0.1 * gradient[members].sum()
        assert after[members].unique().item() == pytest.approx(moved.item(), abs=1e-6)


def test_a_tied_weight_is_one_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    workload = Toy(Tied, shape=(8,))
    module = workload.source()
    report = cluster_(module, workload, codebook(recovery=RECOVERY))
    assert report.shared_weights == report.eligible_weights == 64
    assert module.body.first.weight is module.body.second.weight
    assert module.body.first.weight.unique().numel() <= 4


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_constant_weight_stays_what_it_is(value: float) -> None:
    workload = toy()
    module = workload.source()
    nn.init.constant_(module.body[4].weight, value)
    cluster_(module, workload, codebook())
    assert (module.body[4].weight == torch.tensor(value)).all()
    cluster_(module, workload, codebook(recovery=RECOVERY))
    assert module.body[4].weight.unique().numel() == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named_unless_it_is_ignored(bad: float) -> None:
    workload = toy()
    module = workload.source()
    with torch.no_grad():
        module.body[4].weight[1, 1] = bad
    with pytest.raises(StageError, match=r"'body\.4'"):
        cluster_(module, workload, codebook())
    report = cluster_(module, workload, codebook(ignore=["body.4"]))
    assert {row.name for row in report.tensors} == {"body.0.weight", "body.6.weight"}


def test_patterns_must_match_and_leave_something() -> None:
    workload = toy()
    with pytest.raises(ConfigError, match=r"quantize\.targets"):
        cluster_(workload.source(), workload, codebook(targets=["body.7"]))
    with pytest.raises(CoverageError, match="none of 3 layers"):
        cluster_(workload.source(), workload, codebook(ignore=["*"]))
    with pytest.raises(CoverageError, match="no linear or convolution layer"):
        cluster_(nn.ReLU(), workload, codebook())


def outputs(checkpoint: Checkpoint, workload: Workload) -> np.ndarray:
    session = graph.session(checkpoint)
    return np.concatenate([graph.run(session, batch.inputs) for batch in workload.batches("evaluation", 16)])


def exported(workload: ImageToy | TextToy) -> Checkpoint:
    return export(workload.module, workload, ExportConfig())[0]


@pytest.fixture(scope="module")
def encoder() -> tuple[TextToy, Checkpoint]:
    workload = TextToy()
    return workload, exported(workload)


def test_a_convolution_with_its_normalisation_is_shared_as_it_is_exported() -> None:
    """The export multiplies the normalisation into the convolution, which would leave no two channels alike."""
    workload = ImageToy()
    norm = workload.module.body[1]
    norm.running_var.uniform_(0.1, 4), norm.running_mean.uniform_(-1, 1)
    before = {name: value.clone() for name, value in workload.module.state_dict().items()}
    checkpoint, config = exported(workload), codebook(num_bits=5)
    made, report = quantize_module(workload.module, checkpoint, workload, config, ExportConfig())
    assert report.coverage == 1.0
    assert report.eligible_weights == report.quantized_weights == sum(CNN_WEIGHTS.values())
    assert report.agreement > 0.99
    assert report.codebook is not None
    for row in report.codebook.tensors:
        assert row.values <= 32
    after = workload.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "the module given stays as it is"
    assert list(made.tensors) == ["body.7.weight_indices"]
    expected, found = outputs(checkpoint, workload), outputs(made, workload)
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_a_normalisation_is_left_where_something_else_reads_the_convolution() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.last = nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.conv(x)
            return self.last(self.norm(hidden) + hidden).flatten(1)

    module = Skipping().eval()
    nn.init.uniform_(module.norm.running_var, 2, 3)
    expected = copy.deepcopy(module.state_dict())
    assert fold_norms_(module, ImageToy(module)) == []
    found = module.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("embeddings", [True, False])
def test_tables_are_shared_when_asked_for(encoder, embeddings: bool) -> None:
    workload, checkpoint = encoder
    config = codebook(num_bits=5, embeddings=embeddings, max_quality_drop=0.05)
    made, report = quantize_module(workload.module, checkpoint, workload, config, ExportConfig())
    asked = {name: count for name, count in ENCODER_WEIGHTS.items() if embeddings or "Gather" not in name}
    assert report.quantized_weights == report.eligible_weights == sum(asked.values())
    assert sum(tensor.numel() for tensor in made.tensors.values() if tensor.dtype == torch.uint8) == sum(asked.values())


def test_a_budget_or_coverage_that_is_missed_is_an_error_with_both_numbers(encoder) -> None:
    workload, checkpoint = encoder
    given = workload.module, checkpoint, workload
    with pytest.raises(CoverageError, match=r"(?s)4096 of 4096.*agreement 0\.\d+.*max_quality_drop, 1e-06"):
        quantize_module(*given, codebook(max_quality_drop=1e-6), ExportConfig())
    with pytest.raises(CoverageError, match=r"(?s)2048 of 4096.*50\.0%.*min_coverage, 90\.0%"):
        quantize_module(
            *given, codebook(num_bits=8, ignore=["down"], min_coverage=0.9, max_quality_drop=1), ExportConfig()
        )


def test_a_graph_alone_is_not_enough_and_a_module_can_be_too_much(encoder) -> None:
    workload, checkpoint = encoder
    for config in (codebook(), QuantizeConfig(recovery=RECOVERY, smooth=0)):
        with pytest.raises(ConfigError, match="quantize_module"):
            quantize(checkpoint, workload, config)
    with pytest.raises(ConfigError, match=r"quantize\.recovery"):
        quantize_module(TinyEncoder(), checkpoint, workload, QuantizeConfig(), ExportConfig())


def test_it_is_deterministic() -> None:
    workload = ImageToy(Wrapped(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))).eval())
    config = codebook(num_bits=4, recovery=TrainConfig(epochs=2), max_quality_drop=0.05)
    given = workload.module, exported(workload), workload, config, ExportConfig()
    first, second = quantize_module(*given), quantize_module(*given)
    assert first[0].to_bytes() == second[0].to_bytes()
    assert first[1] == second[1]


def test_the_shift_of_a_folded_normalisation_is_trained() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)]
    workload = ImageToy(Wrapped(nn.Sequential(*layers)).eval())
    fold_norms_(workload.module, workload)
    before = workload.module.body[0].bias.detach().clone()
    cluster_(workload.module, workload, codebook(num_bits=4, recovery=TrainConfig(epochs=2, learning_rate=0.01)))
    assert not torch.equal(workload.module.body[0].bias, before)
