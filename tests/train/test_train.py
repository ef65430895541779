"""The training loop: it learns, repeats itself, stops when it should and says where it broke."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modelpress.config import TrainConfig
from modelpress.errors import StageError
from modelpress.train import make_optimizer, schedule, train_
from modelpress.workload import Batch, Split
from tests.train.toy import Toy, mlp


def task_loss(workload: Toy):
    return lambda module, batch: workload.loss(module(**batch.inputs), batch)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("schedule_name", ["constant", "cosine", "linear"])
def test_every_update_rule_learns(optimizer: str, schedule_name: str) -> None:
    workload = Toy()
    module = workload.source()
    rate = 0.3 if optimizer == "sgd" else 0.02
    config = TrainConfig(epochs=15, batch_size=16, optimizer=optimizer, schedule=schedule_name, learning_rate=rate)
    report = train_(module, task_loss(workload), workload, config)
    assert report.final_loss < 0.4 * report.first_loss
    assert report.losses[-1] == report.final_loss
    assert len(report.losses) == report.epochs == 15
    assert report.updates == 15 * 3
    assert not any(child.training for child in module.modules())


def test_equal_seeds_give_equal_weights_and_others_do_not() -> None:
    workload = Toy(lambda: nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3)))
    first, second, other = (workload.source() for _ in range(3))
    torch.manual_seed(5)
    train_(first, task_loss(workload), workload, TrainConfig(epochs=2, seed=3))
    torch.manual_seed(6)
    train_(second, task_loss(workload), workload, TrainConfig(epochs=2, seed=3))
    train_(other, task_loss(workload), workload, TrainConfig(epochs=2, seed=4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_the_global_random_state_is_left_alone() -> None:
    workload = Toy()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    train_(workload.source(), task_loss(workload), workload, TrainConfig(epochs=1))
    assert torch.equal(torch.rand(1), expected)


def test_epochs_see_the_data_in_different_orders() -> None:
    workload = Toy()
    seen: list[list[float]] = []

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        seen.append(batch.inputs["x"][:, 0].tolist())
        return module(**batch.inputs).sum()

    train_(workload.source(), loss, workload, TrainConfig(epochs=2, batch_size=48))
    assert seen[0] != seen[1]
    assert sorted(seen[0]) == sorted(seen[1])


def test_early_stop_keeps_the_weights_of_the_best_epoch() -> None:
    """The calibration loss falls, then rises: training stops, and the weights of the least loss stay."""
    workload = Toy()
    module = workload.source()
    target = copy.deepcopy(module)
    states: list[dict[str, Tensor]] = []
    validation: list[float] = []

    def loss(student: nn.Module, batch: Batch) -> Tensor:
        if torch.is_grad_enabled():
            return student(**batch.inputs).square().mean()
        states.append({name: value.clone() for name, value in student.state_dict().items()})
        distance = sum(
            float((a - b).abs().sum()) for a, b in zip(student.parameters(), target.parameters(), strict=True)
        )
        validation.append(abs(distance - 3.0))
        return torch.tensor(validation[-1])

    config = TrainConfig(epochs=200, batch_size=48, learning_rate=0.01, early_stop_epochs=3, warmup_fraction=0)
    report = train_(module, loss, workload, config)
    best = min(range(len(validation)), key=validation.__getitem__)
    assert report.stopped_early
    assert report.epochs == best + 4 < 200
    assert report.best_validation_loss == pytest.approx(validation[best])
    assert all(torch.equal(value, states[best][name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_update(bad: float) -> None:
    workload = Toy()
    calls = iter(range(100))

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        value = module(**batch.inputs).square().mean()
        return value * bad if next(calls) == 4 else value

    with pytest.raises(StageError, match=r"epoch 2, update 5(.|\n)*learning_rate"):
        train_(workload.source(), loss, workload, TrainConfig(epochs=3, batch_size=16))


def test_nothing_to_train_is_an_error() -> None:
    workload = Toy()
    with pytest.raises(StageError, match="gradient"):
        train_(workload.source().requires_grad_(False), task_loss(workload), workload, TrainConfig(epochs=1))
    workload.rows["train"] = torch.arange(0)
    workload.batches = lambda *_: iter(())  # type: ignore[method-assign]
    with pytest.raises(StageError, match="empty"):
        train_(workload.source(), task_loss(workload), workload, TrainConfig(epochs=1))


def test_frozen_parameters_stay() -> None:
    workload = Toy()
    module = workload.source()
    module.body[0].requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    train_(module, task_loss(workload), workload, TrainConfig(epochs=1))
    assert torch.equal(module.body[0].weight, before["body.0.weight"])
    assert not torch.equal(module.body[2].weight, before["body.2.weight"])


def test_gradients_are_clipped_to_the_global_norm() -> None:
    workload = Toy()
    module = workload.source()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    config = TrainConfig(
        epochs=1, batch_size=48, optimizer="sgd", momentum=0, learning_rate=1.0, schedule="constant", warmup_fraction=0,
        max_grad_norm=0.5,
    )  # fmt: skip
    train_(module, lambda m, b: 1e4 * m(**b.inputs).square().mean(), workload, config)
    step = torch.cat([(a.detach() - b).flatten() for a, b in zip(module.parameters(), before, strict=True)])
    assert float(step.norm()) == pytest.approx(0.5, rel=1e-4)


def test_progress_reports_each_update_with_loss_and_rate() -> None:
    workload = Toy()
    notes: list[tuple[int, int, str]] = []
    train_(
        workload.source(), task_loss(workload), workload, TrainConfig(epochs=2, batch_size=24),
        lambda done, total, note="": notes.append((done, total, note)),
    )  # fmt: skip
    assert [note[:2] for note in notes] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert "epoch 2/2: loss" in notes[-1][2]
    assert "updates/s" in notes[-1][2]


@given(
    total=st.integers(1, 500),
    warmup=st.floats(0, 0.9),
    name=st.sampled_from(["constant", "cosine", "linear"]),
)
def test_schedules_rise_then_fall_and_stay_positive(total: int, warmup: float, name: str) -> None:
    config = TrainConfig(schedule=name, warmup_fraction=warmup)
    rates = [schedule(config, update, total) for update in range(total)]
    peak = round(warmup * total)
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if peak < total:
        assert rates[peak] == 1


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_decay_stays_at_its_end(name: str) -> None:
    config = TrainConfig(schedule=name)
    assert [schedule(config, update, 10) for update in (10, 12, 25)] == [0, 0, 0]


def test_updates_are_counted_on_the_batches_that_are_trained_on() -> None:
    """Seeded batches are of whole pairs here, and more than the unseeded ones."""

    class Paired(Toy):
        def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
            return super().batches(split, batch_size if seed is None else batch_size // 2 * 2, seed)

    workload = Paired()
    totals: list[tuple[int, int]] = []
    config = TrainConfig(epochs=2, batch_size=5)
    report = train_(
        workload.source(), task_loss(workload), workload, config, lambda done, total, _="": totals.append((done, total))
    )
    assert totals[-1] == (report.updates, report.updates) == (24, 24)


def test_momentum_is_the_first_beta_of_adam() -> None:
    parameters = list(mlp().parameters())
    adam = make_optimizer(parameters, TrainConfig(optimizer="adam", momentum=0.8, weight_decay=0.1))
    assert adam.defaults["betas"] == (0.8, 0.999)
    assert adam.defaults["weight_decay"] == 0.1
    sgd = make_optimizer(parameters, TrainConfig(optimizer="sgd", momentum=0.7))
    assert sgd.defaults["momentum"] == 0.7
