"""The benchmark of parted models compares with legal partitions, and with bytes that were counted by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.parallel._model_ranks import VOCABULARY
from benchmarks.parallel.model import _least_bytes, _optimum, greedy
from modelpress.parallel.mesh import MeshSizes
from modelpress.parallel.partition import balanced


@given(costs=st.lists(st.floats(0.1, 100), min_size=2, max_size=8), data=st.data())
def test_greedy_partitions_are_legal_and_none_beats_the_best(costs: list[float], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    found = greedy(costs, parts)
    assert list(found.bounds) == sorted(set(found.bounds))
    assert (found.bounds[0], found.bounds[-1], found.parts) == (0, len(costs), parts)
    assert balanced(costs, parts).imbalance == pytest.approx(_optimum(costs, parts))
    assert balanced(costs, parts).imbalance <= found.imbalance * (1 + 1e-9)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (MeshSizes(pipeline=4), 3 * 2),
        (MeshSizes(pipeline=2, tensor=2), 2 * 2 + (4 * 4 + 1) * 2 + VOCABULARY / 64),
        (MeshSizes(tensor=4), (4 * 4 + 1) * 6 + 3 * VOCABULARY / 64),
    ],
)
def test_the_least_bytes_of_a_step(sizes: MeshSizes, expected: float) -> None:
    """In hidden states of 16 · 32 tokens of width 64: borders, four sums a layer and one, and logits gathered."""
    assert _least_bytes(sizes, "1f1b", torch.float32, quick=True) == expected * 16 * 32 * 64 * 4
