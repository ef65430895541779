"""What a structure is worth: by its weights, by the loss, and where neither can be had."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modelpress.config import PruneConfig
from modelpress.distill import count_parameters
from modelpress.errors import CoverageError, StageError
from modelpress.progress import silent
from modelpress.prune import prune_
from modelpress.prune.dependencies import find_groups
from modelpress.prune.importance import BATCH_SIZE, losses, magnitudes, taylor
from modelpress.workload import Batch
from tests.prune.models import Attention, settled, toy_of
from tests.prune.stacks import Llama
from tests.train.toy import Toy


class Gates(nn.Module):
    """A hidden layer that may be multiplied by a gate for each neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)
        self.gates: Tensor | float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu() * self.gates)


def test_taylor_is_the_squared_slope_of_a_gate() -> None:
    toy = Toy(Gates)
    module = toy.source()
    groups, _ = find_groups(module, toy.example(3))
    (found,) = taylor(module, groups, toy, silent)
    expected, batches = torch.zeros(6), 0
    for batch in toy.batches("calibration", BATCH_SIZE):
        module.body.gates = torch.ones(6, requires_grad=True)
        toy.loss(module(**batch.inputs), batch).backward()
        expected += module.body.gates.grad.square()
        batches += 1
    assert batches > 1
    assert torch.allclose(found.float(), expected, rtol=1e-4)
    module.body.gates = torch.full((6,), torch.nan)
    with pytest.raises(StageError, match=r"without neurons of body\.up(.|\n)*NaN"):
        taylor(module, groups, toy, silent)


@pytest.mark.parametrize("where", ["all", "one"])
def test_outputs_that_are_cut_off_from_the_weights_are_named(where: str) -> None:
    class Cut(Gates):
        def forward(self, x: Tensor) -> Tensor:
            if where == "all":
                return super().forward(x).detach()
            return self.down(self.up(x).relu()).detach() + self.down.bias

    toy = Toy(Cut)
    module = toy.source()
    groups, _ = find_groups(module, toy.example(3))
    with pytest.raises(StageError, match=r"does not depend on body\.down(.|\n)*detach"):
        taylor(module, groups, toy, silent)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_of_embeddings_it_is_how_far_they_move_in_the_mean_over_signs() -> None:
    """E[(rᵀJw)²] = |Jw|²: the sum over samples of the squared movement, here exact, as the layer is linear."""
    toy = Toy(Gates, outputs="embeddings", samples=4000)
    module = toy.source()
    groups, _ = find_groups(module, toy.example(3))
    (found,) = taylor(module, groups, toy, silent)
    x = toy.x[toy.rows["calibration"]]
    hidden = module.body.up(x).relu()
    moved = hidden.square().sum(dim=0) * module.body.down.weight.square().sum(dim=0)
    assert torch.allclose(found.float(), moved.detach(), rtol=0.3)


def test_magnitude_is_the_size_of_the_rows() -> None:
    toy = toy_of("attention")
    module = settled(toy)
    groups, _ = find_groups(module, toy.example(3))
    (found,) = magnitudes(module, groups)
    rows = [module.body.get_submodule(name).weight.view(4, -1) for name in ("q", "k", "v")]
    assert torch.allclose(found.float(), sum(row.square().sum(dim=1) for row in rows))
    module.body.q.weight.data[2:4] = module.body.k.weight.data[2:4] = module.body.v.weight.data[2:4] = 0
    report = prune_(module, toy, PruneConfig(structures=["heads"], sparsity=0.25, importance="magnitude"))
    assert report.tensors[0].kept == [0, 2, 3]


def test_flags_and_gradients_stay_as_they_were() -> None:
    toy = Toy(Gates)
    module = toy.source()
    module.body.up.weight.requires_grad_(False)
    prune_(module, toy, PruneConfig(structures=["neurons"], importance="taylor"))
    assert [parameter.requires_grad for parameter in module.parameters()] == [False, True, True, True]
    assert all(parameter.grad is None for parameter in module.parameters())


class Unlabelled(Toy):
    """Targets only where batches are made with a seed."""

    def batches(self, split, batch_size, seed=None):  # type: ignore[no-untyped-def]
        for batch in super().batches(split, batch_size, seed):
            yield batch if seed is not None else Batch(batch.inputs)


def test_targets_come_from_seeded_batches_where_others_have_none() -> None:
    toy = Unlabelled(Gates)
    assert all(torch.isfinite(loss) for loss in losses(toy.source(), toy, silent))


def test_no_loss_at_all_says_so() -> None:
    class Nothing(Toy):
        def batches(self, split, batch_size, seed=None):  # type: ignore[no-untyped-def]
            for batch in super().batches(split, batch_size, seed):
                yield Batch(batch.inputs)

    toy = Nothing(Gates)
    module = toy.source()
    before = count_parameters(module)
    with pytest.raises(StageError, match=r"taylor(.|\n)*without targets(.|\n)*'activation'"):
        prune_(module, toy, PruneConfig(structures=["neurons"], importance="taylor"))
    assert count_parameters(module) == before
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_heads_that_queries_share_are_refused_by_name() -> None:
    toy = Toy(lambda: Llama(layers=1), (12,))
    with pytest.raises(CoverageError, match=r"k_proj: (.|\n)*several queries share"):
        prune_(toy.source(), toy, PruneConfig(structures=["heads"]))


def test_fewer_heads_than_one_are_refused() -> None:
    toy = Toy(Attention, (5, 8))
    module = toy.source()
    with pytest.raises(CoverageError, match=r"body\.q(.|\n)*all 4 heads would go"):
        prune_(module, toy, PruneConfig(structures=["heads"], sparsity=0.9))
    assert module.body.q.out_features == 8


def test_layers_that_share_a_weight_are_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())[:, :3]

    toy = Toy(Tied)
    module = toy.source()
    report = prune_(module, toy, PruneConfig(structures=["neurons"], sparsity=0.5))
    assert {change.name for change in report.tensors} == {"body.c.weight", "body.c.bias", "body.d.weight"}
    assert module.body.a.weight is module.body.b.weight
