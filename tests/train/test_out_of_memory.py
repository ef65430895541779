"""Memory that really runs out in a training: what is said of it, and what the config allows to be done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from modelpress.workload import Batch
from tests.conftest import ROOT


def limited(out_of_memory: str, mib: int, width: int = 400_000) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.limited", out_of_memory, str(mib), str(width)],
        cwd=ROOT,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.distributed
def test_by_default_it_is_an_error_that_says_what_was_asked_what_was_there_and_the_way_out() -> None:
    said = limited("fail", 200)["error"]
    assert "training (epoch 1, update 1) on 64 of a batch's 64 samples at once" in said
    assert "97.7 MiB asked for" in said  # an activation: 64 × 400,000 × 4 bytes
    assert "RLIMIT_AS" in said
    assert "train.out_of_memory: halve" in said
    assert "train.batch_size (now 64)" in said


@pytest.mark.distributed
def test_batches_are_cut_where_the_config_allows_and_an_update_stays_what_it_was() -> None:
    whole, cut = limited("halve", 0), limited("halve", 200)
    assert whole["report"]["batch_parts"] is None
    assert whole["report"]["memory_errors"] == []
    assert cut["report"]["batch_parts"] > 1
    assert cut["report"]["updates"] == whole["report"]["updates"]
    assert cut["report"]["memory_errors"][0].startswith("epoch 1, update 1: 97.7 MiB asked for; ")
    assert cut["weights"] == pytest.approx(whole["weights"], abs=1e-6)
    assert cut["report"]["losses"] == pytest.approx(whole["report"]["losses"], abs=1e-6)


@pytest.mark.distributed
def test_a_single_sample_that_does_not_fit_ends_it() -> None:
    said = limited("halve", 100, 16_000_000)["error"]
    assert "on 1 of a batch's 64 samples at once" in said
    assert "halve" not in said


@pytest.mark.distributed
def test_a_loss_that_compares_samples_is_never_cut() -> None:
    said = limited("apart", 200)["error"]
    assert "batches of Apart cannot be cut" in said


def test_the_parts_of_a_batch_are_all_of_it_in_order_and_none_is_empty() -> None:
    batch = Batch({"x": torch.arange(10).reshape(5, 2)}, torch.arange(5))
    for parts, sizes in ((1, [5]), (2, [3, 2]), (4, [2, 1, 1, 1]), (8, [1, 1, 1, 1, 1])):
        cut = batch.cut(parts)
        assert [len(part) for part in cut] == sizes
        assert torch.equal(torch.cat([part.inputs["x"] for part in cut]), batch.inputs["x"])
        assert [int(one) for part in cut if part.targets is not None for one in part.targets] == [0, 1, 2, 3, 4]
    assert [part.targets for part in Batch(batch.inputs).cut(2)] == [None, None]
