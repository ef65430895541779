"""Recovery and gradual pruning: zeros stay, masks only grow, blocks come back to what they held."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from modelpress.config import PruneConfig, TrainConfig
from modelpress.distill import without_dropout
from modelpress.errors import CoverageError
from modelpress.prune import PRUNERS, prune_, sparsities
from modelpress.prune.masks import Masks
from modelpress.prune.outcome import Outcome
from modelpress.prune.zeros import prunable_weights
from tests.prune.models import Bert
from tests.train.toy import Toy

TRAINING = TrainConfig(epochs=2, batch_size=16, learning_rate=3e-3, weight_decay=0.1)


def encoder() -> Toy:
    return Toy(Bert, (12,), samples=128)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_zeros_stay_zeros_and_the_others_learn(method: str, pattern: str) -> None:
    toy = encoder()
    plain, module = toy.source(), toy.source()
    config = PruneConfig(method=method, pattern=pattern)
    prune_(plain, toy, config)
    report = prune_(module, toy, config.model_copy(update={"recovery": TRAINING}))
    assert report.matched_states == 2
    assert report.recovery is not None
    assert report.recovery.final_loss < report.recovery.first_loss
    for name, weight in prunable_weights(module).items():
        expected = plain.get_submodule(name).weight
        assert torch.equal(weight == 0, expected == 0), name
        assert not torch.equal(weight, expected), name


def test_hidden_states_come_back_when_they_are_matched() -> None:
    toy = encoder()
    dense = toy.source()
    ids = (toy.x[toy.rows["evaluation"]].abs() * 10).long().clamp(max=29)
    distance = {}
    for weight in (0.0, 1.0):
        module = copy.deepcopy(dense)
        training = TRAINING.model_copy(update={"epochs": 4})
        config = PruneConfig(method="sparsegpt", recovery=training, recovery_hidden_weight=weight)
        report = prune_(module, toy, config)
        assert report.matched_states == (2 if weight else 0)
        states = [m.body.bert(ids)[0].detach() for m in (module, dense)]
        distance[weight] = float((states[0] - states[1]).square().mean())
    assert distance[1.0] < 0.8 * distance[0.0]


def test_states_whose_shape_was_pruned_are_not_matched() -> None:
    class Stack(nn.Module):
        """Blocks of which the first feeds the second alone, so that it may lose neurons."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 8)])
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x).relu()
            return self.head(x)

    toy = Toy(Stack, (6,))
    config = PruneConfig(structures=["neurons"], sparsity=0.5, recovery=TRAINING, ignore=["body.blocks.1"])
    assert prune_(toy.source(), toy, config).matched_states == 1
    cnn = Toy(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    assert prune_(cnn.source(), cnn, PruneConfig(recovery=TRAINING)).matched_states == 0


def test_recovery_runs_without_dropout_and_gives_it_back() -> None:
    """With everything dropped nothing could be learned."""
    toy = Toy(lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(1.0), nn.Linear(16, 3)))
    module = toy.source()
    report = prune_(module, toy, PruneConfig(method="magnitude", recovery=TRAINING.model_copy(update={"epochs": 20})))
    assert report.recovery is not None
    assert report.recovery.final_loss < 0.5 * report.recovery.first_loss
    assert module.body[2].p == 1.0


@pytest.mark.parametrize(
    ("method", "scope"), [("magnitude", "layer"), ("magnitude", "global"), ("wanda", "layer"), ("sparsegpt", "layer")]
)
def test_masks_only_grow_over_the_steps(method: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the recovery has made a small weight large in the meantime."""
    toy = encoder()
    module = toy.source()
    seen: list[Masks] = []
    original = PRUNERS[method]

    def spy(*arguments: object) -> Outcome:
        outcome = original(*arguments)  # type: ignore[arg-type]
        assert all(torch.equal(weight == 0, ~outcome.masks[name]) for name, weight in prunable_weights(module).items())
        seen.append(outcome.masks)
        return outcome

    monkeypatch.setitem(PRUNERS, method, spy)
    training = TRAINING.model_copy(update={"epochs": 5, "learning_rate": 0.02})
    config = PruneConfig(method=method, scope=scope, sparsity=0.7, steps=3, recovery=training)
    report = prune_(module, toy, config)
    assert [row.sparsity for row in report.steps] == pytest.approx(
        [0.7 * (1 - (2 / 3) ** 3), 0.7 * (1 - (1 / 3) ** 3), 0.7]
    )
    assert [row.recovery.epochs for row in report.steps if row.recovery] == [1, 2, 2]
    assert report.recovery == report.steps[-1].recovery
    for before, after in itertools.pairwise(seen):
        assert all(not (after[name] & ~before[name]).any() for name in before)
    total = sum(weight.numel() for weight in prunable_weights(module).values())
    zeros = sum(int((weight == 0).sum()) for weight in prunable_weights(module).values())
    assert zeros == report.zeros_after == report.steps[-1].zeros
    assert zeros == pytest.approx(0.7 * total, rel=0.02)


def test_the_schedule_is_cubic_and_ends_exactly() -> None:
    assert sparsities(0.8, 1) == [0.8]
    assert sparsities(0.8, 4) == pytest.approx([0.8 * 37 / 64, 0.8 * 7 / 8, 0.8 * 63 / 64, 0.8])
    assert sparsities(0.3, 7)[-1] == 0.3


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Dropout1d(0.5), (4, 8)), (nn.Dropout2d(0.5), (2, 3, 3)), (nn.AlphaDropout(0.5), (8,))]
)
def test_no_kind_of_dropout_is_left_on(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer.train()
    inputs = torch.ones(4, *shape)
    with without_dropout(layer):
        assert torch.equal(layer(inputs), inputs)
    assert not torch.equal(layer(inputs), inputs)


def test_attentions_own_dropout_is_off_too() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.5, batch_first=True).train()
    inputs = torch.randn(2, 4, 8)
    with without_dropout(layer):
        assert torch.equal(layer(inputs), layer(inputs))
    assert not torch.equal(layer(inputs), layer(inputs))


def test_blocks_are_matched_by_their_place_whatever_pruning_leaves() -> None:
    class Convolutions(nn.Module):
        """The list of convolutions is the largest, until it has lost half of its channels."""

        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(1, 12, 3), nn.Conv2d(12, 12, 3), nn.Conv2d(12, 12, 3)])
            self.heads = nn.ModuleList([nn.Linear(12, 80), nn.Linear(80, 10)])

        def forward(self, x: Tensor) -> Tensor:
            for conv in self.convs:
                x = conv(x).relu()
            x = x.mean((2, 3))
            return self.heads[1](self.heads[0](x).relu())

    toy = Toy(Convolutions, (1, 8, 8))
    config = PruneConfig(structures=["channels"], sparsity=0.5, recovery=TRAINING)
    assert prune_(toy.source(), toy, config).matched_states == 1  # the last one lost none


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_what_is_ignored_is_not_looked_at_and_something_must_be_left(method: str) -> None:
    toy = Toy(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    with pytest.raises(CoverageError, match=r"none of 2(.|\n)*narrow prune.ignore"):
        prune_(toy.source(), toy, PruneConfig(method=method, ignore=["body"]))
    module = toy.source()
    module.body[2].weight.data[0, 0] = torch.inf
    assert prune_(module, toy, PruneConfig(method="magnitude", ignore=["body.2"])).zeros_after == 16
