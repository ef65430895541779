"""A training that was cut off goes on to the same weights, and trusts nothing that is not its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modelpress.config import TrainConfig
from modelpress.errors import StageError
from modelpress.progress import silent
from modelpress.reports import TrainReport
from modelpress.resume import kept_on, next_place
from modelpress.train import train_
from modelpress.training_state import About, Position
from modelpress.workload import Batch
from tests.train.toy import Toy

UPDATES_PER_EPOCH, EPOCHS = 3, 4


class Cut(BaseException):
    """Ends a training as a signal does."""


class Memory:
    """A shelf in memory; it ends the training after its `cut`-th state."""

    def __init__(self, cut: float = math.inf, seconds: float = 0.0) -> None:
        self.seconds, self.cut = seconds, cut
        self.states: dict[int, bytes] = {}
        self.saved, self.told = 0, list[str]()

    def load(self, number: int) -> bytes | None:
        return self.states.get(number)

    def save(self, number: int, data: bytes) -> None:
        self.states[number] = data
        self.saved += 1
        if self.saved >= self.cut:
            raise Cut

    def tell(self, text: str) -> None:
        self.told.append(text)


def net(width: int = 8) -> nn.Module:
    """What has every kind of state: dropout's random numbers, running means, a tied weight, a frozen one."""
    body = nn.Sequential(
        nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, width), nn.Linear(width, width),
        nn.Linear(width, 3),
    )  # fmt: skip
    body[4].weight = body[3].weight
    body[5].bias.requires_grad_(False)
    body.register_buffer("hidden", torch.zeros(1), persistent=False)
    return body


def trained(
    shelf: Memory | None, config: TrainConfig, module: nn.Module, after: Callable[[], None] | None = None
) -> Any:
    workload = Toy(net)
    if shelf is None:
        return module, train_(module, lambda m, b: workload.loss(m(**b.inputs), b), workload, config, silent, after)
    with kept_on(shelf):
        return module, train_(module, lambda m, b: workload.loss(m(**b.inputs), b), workload, config, silent, after)


def until_done(config: TrainConfig, cuts: list[int]) -> tuple[nn.Module, TrainReport, Memory]:
    """Train, cut off after so many states each time, on one shelf."""
    shelf = Memory()
    for cut in cuts:
        shelf.saved, shelf.cut = 0, cut
        with pytest.raises(Cut):
            trained(shelf, config, Toy(net).source())
    shelf.cut = math.inf
    return (*trained(shelf, config, Toy(net).source()), shelf)


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, others = first.state_dict(), second.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in ours.items())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("early_stop", [0, EPOCHS])
@settings(max_examples=4, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=3).filter(lambda cuts: sum(cuts) <= 10),
    seed=st.integers(0, 99),
)
def test_a_training_that_was_cut_off_ends_bit_by_bit_as_an_uninterrupted_one(
    optimizer: str, early_stop: int, cuts: list[int], seed: int
) -> None:
    config = TrainConfig(
        epochs=EPOCHS, batch_size=16, optimizer=optimizer, learning_rate=0.05, early_stop_epochs=early_stop, seed=seed
    )
    expected, report = trained(None, config, Toy(net).source())
    found, other, shelf = until_done(config, cuts)
    assert same(found, expected)
    assert other == report
    assert shelf.told == [f"the training goes on behind update {sum(cuts[: n + 1])} of 12" for n in range(len(cuts))]


def test_each_update_can_be_the_last() -> None:
    config = TrainConfig(epochs=EPOCHS, batch_size=16, momentum=0.5)
    expected, report = trained(None, config, Toy(net).source())
    for cut in range(1, EPOCHS * UPDATES_PER_EPOCH + 1):
        found, other, _ = until_done(config, [cut])
        assert same(found, expected), cut
        assert other == report, cut


def test_early_stop_goes_on_with_the_best_weights_and_the_patience_that_was_left() -> None:
    workload = Toy(net)
    validation = iter(())

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        value = workload.loss(module(**batch.inputs), batch)
        return value if torch.is_grad_enabled() else torch.tensor(next(validation))

    config = TrainConfig(epochs=20, batch_size=24, early_stop_epochs=2)
    losses = [3.0, 1.0, 2.0, 2.0, 0.1]
    shelf = Memory(cut=2 * 2 + 1)  # in the epoch of the first 2.0
    expected, found = workload.source(), workload.source()
    validation = iter(losses)
    report = train_(expected, loss, workload, config)
    validation = iter(losses)
    with kept_on(shelf), pytest.raises(Cut):
        train_(copy.deepcopy(found), loss, workload, config)
    shelf.cut = math.inf
    with kept_on(shelf):
        again = train_(found, loss, workload, config)
    assert again == report
    assert (report.epochs, report.stopped_early, report.best_validation_loss) == (4, True, 1.0)
    assert same(found, expected)


def test_a_training_that_was_done_is_not_repeated() -> None:
    config, updates = TrainConfig(epochs=2, batch_size=16, early_stop_epochs=2), []
    shelf = Memory()
    expected, report = trained(shelf, config, Toy(net).source(), lambda: updates.append(1))
    found, other = trained(shelf, config, Toy(net).source(), lambda: updates.append(1))
    assert len(updates) == 6
    assert same(found, expected)
    assert other == report
    assert shelf.told == ["the training was done before"]


def test_the_second_training_of_a_stage_has_a_place_of_its_own() -> None:
    config, shelf = TrainConfig(epochs=1, batch_size=16), Memory()
    workload = Toy(net)
    first, second = workload.source(), workload.source()
    with kept_on(shelf):
        for module in (first, second):
            train_(module, lambda m, b: workload.loss(m(**b.inputs), b), workload, config)
    assert set(shelf.states) == {0, 1}
    assert next_place() is None, "nothing is kept outside"


def damaged(data: bytes) -> list[bytes]:
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    return [b"", data[:20], data[:-1], flipped, data + b"x", b"\0" * 32 + data[32:]]


def test_damaged_states_are_named_and_not_used() -> None:
    config, shelf = TrainConfig(epochs=2, batch_size=16), Memory(cut=4)
    with pytest.raises(Cut):
        trained(shelf, config, Toy(net).source())
    expected, report = trained(None, config, Toy(net).source())
    for data in damaged(shelf.states[0]):
        other = Memory()
        other.states[0] = data
        found, again = trained(other, config, Toy(net).source())
        assert len(other.told) == 1
        assert "begins anew" in other.told[0]
        assert "sha256" in other.told[0]
        assert same(found, expected)
        assert again == report


@pytest.mark.parametrize("what", ["config", "weights", "trained", "data", "version"])
def test_the_state_of_another_training_is_named_and_not_used(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shelf = TrainConfig(epochs=2, batch_size=16), Memory(cut=4)
    with pytest.raises(Cut):
        trained(shelf, config, Toy(net).source())
    shelf.cut, module, named = math.inf, Toy(net).source(), "start"
    if what == "config":
        config, named = config.model_copy(update={"learning_rate": 0.5}), "config"
    elif what == "weights":
        with torch.no_grad():
            module.body[0].bias += 1e-7
    elif what == "trained":
        module.body[5].bias.requires_grad_(True)
    elif what == "data":
        config, named = config.model_copy(update={"batch_size": 8}), "updates_per_epoch"
    else:
        monkeypatch.setattr("modelpress.training_state.__version__", "0.0.1")
        named = "modelpress"
    _, report = trained(shelf, config, module)
    (told,) = shelf.told
    assert "begins anew" in told
    assert named in told
    assert report.updates == 2 * math.ceil(48 / config.batch_size)


def test_a_state_with_a_good_digest_and_bad_content_is_not_used() -> None:
    import hashlib

    import safetensors.torch

    config = TrainConfig(epochs=1, batch_size=16)
    about = About(modelpress="1", torch="2", device="cpu", config="c", updates_per_epoch=3, start="s")
    header = {"about": about.model_dump(), "position": Position().model_dump(), "numbers": {}}
    import json

    for text in ("", "[]", "{", json.dumps(header | {"further": 1}), json.dumps(header | {"position": {"epoch": -1}})):
        body = safetensors.torch.save({"parameter.x": torch.zeros(1)}, {"training": text})
        shelf = Memory()
        shelf.states[0] = hashlib.sha256(body).digest() + body
        trained(shelf, config, Toy(net).source())
        assert "begins anew" in shelf.told[0]


def test_a_model_with_a_state_of_its_own_kind_trains_without_and_says_so() -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    workload, shelf = Toy(lambda: Odd(4, 3)), Memory()
    with kept_on(shelf):
        train_(workload.source(), lambda m, b: workload.loss(m(**b.inputs), b), workload, TrainConfig(epochs=1))
    assert not shelf.states
    assert shelf.told == ["the training keeps no state: body of the model has one that is no tensor"]


def test_data_that_are_no_longer_there_are_an_error_and_not_a_shorter_epoch() -> None:
    config, shelf = TrainConfig(epochs=2, batch_size=16), Memory(cut=3)
    with pytest.raises(Cut):
        trained(shelf, config, Toy(net).source())
    workload, calls = Toy(net), iter(range(9))
    whole = workload.batches
    workload.batches = lambda *given: whole(*given) if next(calls) == 0 else iter(())  # type: ignore[method-assign]
    shelf.cut = math.inf
    with kept_on(shelf), pytest.raises(StageError, match=r"going on with epoch 1(.|\n)*0 batches"):
        train_(workload.source(), lambda m, b: workload.loss(m(**b.inputs), b), workload, config)


def test_a_short_training_leaves_nothing_and_the_random_state_is_nobodys() -> None:
    shelf = Memory(seconds=1000.0)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    trained(shelf, TrainConfig(epochs=2, batch_size=16), Toy(net).source())
    assert not shelf.states
    assert torch.equal(torch.rand(1), expected)


def test_batches_that_were_cut_for_memory_stay_cut_behind_a_resume() -> None:
    """What the first start learnt of the memory, at the cost of an error, the second one knows."""
    config = TrainConfig(epochs=EPOCHS, batch_size=16, optimizer="sgd", out_of_memory="halve")
    workload, tried = Toy(net), list[int]()

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        tried.append(len(batch))
        if len(batch) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes")
        return workload.loss(module(**batch.inputs), batch)

    def start(shelf: Memory) -> tuple[nn.Module, TrainReport]:
        module = workload.source()
        with kept_on(shelf):
            return module, train_(module, loss, workload, config)

    whole, report = start(Memory())
    shelf = Memory(cut=5)
    with pytest.raises(Cut):
        start(shelf)
    assert set(tried) == {16, 8, 4}
    tried.clear()
    shelf.cut = math.inf
    found, resumed = start(shelf)
    assert set(tried) == {4}
    assert resumed.losses == report.losses
    assert len(resumed.memory_errors) == len(report.memory_errors) == 2
    assert resumed.batch_parts == 4
    assert same(found, whole)
