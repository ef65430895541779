"""Each sample is taken once, whoever takes it; what is not the same everywhere is refused by all."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelpress.parallel.data import cut
from modelpress.workload import Batch
from tests.parallel.cases import Case, Data, read_hands, spread, train
from tests.parallel.forks import results, together
from tests.parallel.test_training import config


@given(samples=st.integers(1, 40), ranks=st.integers(1, 9), parts=st.integers(1, 5))
def test_every_sample_is_taken_once_and_counts_as_much_as_any_other(samples: int, ranks: int, parts: int) -> None:
    batch = Batch({"x": torch.arange(samples)}, torch.arange(samples))
    dealt = cut(batch, ranks, parts)
    assert [len(hand.pieces) for hand in dealt] == [parts] * ranks
    assert {hand.samples for hand in dealt} == {samples}
    pieces = [piece for hand in dealt for piece in hand.pieces]
    counted = [piece for piece in pieces if piece.share]
    assert sorted(int(x) for piece in counted for x in piece.batch.inputs["x"]) == list(range(samples))
    assert all(piece.share == pytest.approx(len(piece.batch) / samples) for piece in counted)
    assert all(len(piece.batch) == 1 for piece in pieces if not piece.share), "a stand-in is one sample"
    assert max(len(piece.batch) for piece in counted) - min(len(piece.batch) for piece in counted) <= 1
    assert all(torch.equal(piece.batch.inputs["x"], piece.batch.targets) for piece in pieces)


@pytest.mark.distributed
def test_the_three_ways_in_which_samples_come_to_ranks() -> None:
    batches = Data("mlp", double=False, samples=46).batches("train", 7, 3)
    whole = [x for batch in batches for x in batch.inputs["x"].tolist()]
    sliced, streamed, copied = (results(together(2, read_hands, how)) for how in ("slice", "stream", "replicate"))
    assert sliced == streamed
    taken = sorted(x for hands in sliced for samples, share, _ in hands if share for x in samples)
    assert taken == sorted(whole)
    assert sliced[0] != sliced[1]
    for hands in copied:
        assert sorted(x for samples, _, _ in hands for x in samples) == sorted(whole)


@pytest.mark.distributed
@pytest.mark.parametrize("spoilt", ["spoilt_rank", "short_rank"])
def test_ranks_with_other_data_all_refuse_and_none_waits(spoilt: str) -> None:
    case = dataclasses.replace(Case("mlp", train=config(3)), **{spoilt: 1})
    for value, error in together(3, train, case):
        assert value is None
        assert error is not None
        assert error.startswith("StageError")
        assert "at rank 1" in error
        assert "the same at each rank" in error
        assert "parallel.data to stream" in error


@pytest.mark.distributed
def test_streamed_data_may_differ_where_nobody_reads_them() -> None:
    case = Case("mlp", train=config(2, data="stream"))
    expected = results(together(2, train, case))
    found = results(together(2, train, dataclasses.replace(case, spoilt_rank=1)))
    assert found[0]["report"]["losses"] == expected[0]["report"]["losses"]
    assert spread(2).data == "slice"
