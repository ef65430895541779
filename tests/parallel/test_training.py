"""A training over ranks is the training of one process: gradients, losses and weights; also resumed by other numbers.

In double precision the difference is that of sums in another order, 1e-12: it is the same training. In single precision
it stays within 1e-5. What is the same bit by bit: a rank alone in a group, a repetition, a resume with as many ranks.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelpress.config import TrainConfig
from tests.parallel.cases import Case, spread, train
from tests.parallel.forks import results, together

BATCH = TrainConfig(epochs=2, batch_size=15, learning_rate=0.02, early_stop_epochs=2)


def config(processes: int, train: TrainConfig = BATCH, **ways: Any) -> TrainConfig:
    return train.model_copy(update={"parallel": spread(processes, **ways)})


def distance(found: dict[str, Any], expected: dict[str, Any], what: str) -> float:
    assert found[what].keys() == expected[what].keys()
    scale = max(float(np.abs(value).max()) for value in expected[what].values() if value.dtype.kind == "f")
    return max(
        float(np.abs(found[what][name] - value).max()) / scale
        for name, value in expected[what].items()
        if value.dtype.kind == "f"
    )


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(np.array_equal(found["weights"][name], value) for name, value in expected["weights"].items())


def assert_close(found: dict[str, Any], expected: dict[str, Any], bound: float) -> None:
    assert distance(found, expected, "weights") <= bound
    if found["gradients"]:
        assert distance(found, expected, "gradients") <= bound
    assert found["report"]["losses"] == pytest.approx(expected["report"]["losses"], rel=bound)
    best = [one["report"]["best_validation_loss"] for one in (found, expected)]
    assert best[0] == pytest.approx(best[1], rel=bound)
    assert found["kinds"] == expected["kinds"]


SPREAD = {
    "streamed, accumulated": (2, Case("blocks", loss="teacher"), {"data": "stream", "gradient_accumulation": 3}),
    "fsdp, accumulated": (2, Case("blocks", loss="teacher"), {"strategy": "fsdp", "gradient_accumulation": 2}),
    "fsdp, hidden states": (2, Case("blocks", loss="hidden"), {"strategy": "fsdp"}),
    "masked": (3, Case("blocks", loss="masked"), {}),
    "batch normalisation, fewer samples than ranks": (
        3,
        Case("norms", train=BATCH.model_copy(update={"batch_size": 47})),
        {},
    ),
    "more pieces than samples": (
        2,
        Case("mlp", train=BATCH.model_copy(update={"batch_size": 4})),
        {"gradient_accumulation": 4},
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", SPREAD)
def test_ranks_train_as_one_process_does(name: str) -> None:
    ranks, case, ways = SPREAD[name]
    case = dataclasses.replace(case, double=True)
    expected = train(None, case)
    found = results(together(ranks, train, dataclasses.replace(case, train=config(ranks, case.train, **ways))))
    for one in found:
        assert_close(one, expected, 1e-12)
        assert same(one, found[0]), "ranks that ended with other weights"
    report = found[0]["report"]["parallel"]
    assert (report["processes"], report["weights_agree"], report["updates"]) == (
        ranks,
        True,
        expected["report"]["updates"],
    )
    assert (report["traffic"]["data_bytes"] > 0) == (ways.get("data") == "stream")


@pytest.mark.distributed
def test_in_single_precision_they_stay_within_a_hundred_thousandth() -> None:
    once = BATCH.model_copy(update={"epochs": 1, "batch_size": 24, "optimizer": "sgd"})
    case = Case("blocks", loss="teacher", train=once)
    expected = train(None, case)
    accumulated = train(None, dataclasses.replace(case, train=config(1, once, gradient_accumulation=4)))
    assert_close(accumulated, expected, 1e-5)
    assert not same(accumulated, expected), "rounding differs, or nothing was accumulated"
    ways = {"gradient_accumulation": 2}
    (first, _) = results(together(2, train, dataclasses.replace(case, train=config(2, once, **ways))))
    assert_close(first, expected, 1e-5)


@pytest.mark.distributed
def test_what_is_equal_bit_by_bit() -> None:
    case = Case("noisy", train=config(2))
    (single,) = results(together(1, train, case))
    assert same(single, train(None, dataclasses.replace(case, train=BATCH))), "a rank alone is a process alone"
    first, second = (results(together(2, train, case))[0] for _ in range(2))
    assert same(first, second)
    assert first["report"] == second["report"] | {"parallel": first["report"]["parallel"]}


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_rank_goes_on_to_the_same_weights_with_any_number_of_ranks(tmp_path: Path, strategy: str) -> None:
    """Eight updates; after the fifth state the first rank is gone, in the second epoch."""
    case = Case("blocks", double=True, loss="teacher", train=config(2, strategy=strategy))
    expected = results(together(2, train, case))[0]
    cut = together(2, train, dataclasses.replace(case, folder=str(tmp_path), cut=5))
    assert [value for value, _ in cut] == [None, None]
    state = (tmp_path / "0").read_bytes()
    for ranks in (2, 3, 1) if strategy == "ddp" else (2, 1):
        (tmp_path / "0").write_bytes(state)
        again = dataclasses.replace(case, folder=str(tmp_path))
        if ranks == 1:
            found = train(None, dataclasses.replace(again, train=BATCH))
        else:
            again = dataclasses.replace(again, train=config(ranks, strategy=strategy))
            found = results(together(ranks, train, again))[0]
        assert (tmp_path / "told").read_text().endswith("the training goes on behind update 5 of 8\n")
        if ranks == 2:
            assert same(found, expected)
        assert_close(found | {"gradients": {}}, expected, 1e-12)
        assert found["report"]["updates"] == expected["report"]["updates"]


@pytest.mark.distributed
def test_an_update_sends_no_tenth_more_than_a_ring_must() -> None:
    case = Case("large", train=config(2, BATCH.model_copy(update={"early_stop_epochs": 0})))
    report = results(together(2, train, case))[0]["report"]["parallel"]
    weights = 4 * (4 * 256 + 256 + 256 * 512 + 512 + 512 * 3 + 3)
    assert report["least_update_bytes"] == weights
    assert report["needed_update_bytes"] == weights
    assert 0.9 <= report["wire_update_bytes"] / weights <= 1.1
    fsdp = dataclasses.replace(case, train=config(2, case.train, strategy="fsdp"))
    report = results(together(2, train, fsdp))[0]["report"]["parallel"]
    assert report["needed_update_bytes"] / weights < 1.7, "weights twice and gradients once, half of each"
