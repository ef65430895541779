"""The partition against every possible one, and what it says of a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelpress.errors import ConfigError
from modelpress.parallel.costs import costs_of, split
from modelpress.parallel.outline import outline
from modelpress.parallel.partition import Partition, balanced, bubble, equal_counts
from tests.parallel.models import batch, make

COSTS = st.lists(st.floats(0, 1e6) | st.integers(0, 9).map(float), min_size=1, max_size=9)


def every(costs: Sequence[float], parts: int) -> Iterator[Partition]:
    for cuts in itertools.combinations(range(1, len(costs)), parts - 1):
        yield Partition(tuple(costs), (0, *cuts, len(costs)))


@given(costs=COSTS, data=st.data())
def test_no_partition_has_a_cheaper_dearest_part(costs: list[float], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    found = balanced(costs, parts)
    assert found.bounds[0] == 0
    assert found.bounds[-1] == len(costs)
    assert all(len(found.blocks(part)) for part in range(parts))
    least = min(one.largest for one in every(costs, parts))
    assert found.largest == pytest.approx(least, rel=1e-9)
    squares = min(
        sum(part**2 for part in one.sums) for one in every(costs, parts) if one.largest <= least * (1 + 1e-12)
    )
    assert sum(part**2 for part in found.sums) == pytest.approx(squares, rel=1e-9)
    assert math.fsum(found.sums) == pytest.approx(math.fsum(costs))
    assert found.imbalance <= equal_counts(costs, parts).imbalance * (1 + 1e-9)


def test_the_other_parts_are_even_as_well() -> None:
    assert balanced([9, 1, 1, 1, 1, 1, 1], 3).bounds == (0, 1, 4, 7)


def test_hundreds_of_blocks_are_split_at_once() -> None:
    found = balanced([1 + number % 7 for number in range(300)], 16)
    assert found.imbalance < 1.03


@pytest.mark.parametrize("parts", [0, -1, 5])
def test_more_parts_than_blocks_are_refused(parts: int) -> None:
    with pytest.raises(ConfigError, match=rf"{parts} parts for 4 blocks"):
        balanced([1, 1, 1, 1], parts)


@pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
def test_costs_that_are_none_are_refused(cost: float) -> None:
    with pytest.raises(ConfigError, match="block 1 costs"):
        balanced([1.0, cost], 2)


def test_parts_of_nothing_are_even() -> None:
    assert balanced([0, 0, 0], 3).imbalance == 1


def test_a_bubble_is_what_fills_and_drains() -> None:
    assert [bubble(1, 4), bubble(4, 1), bubble(4, 12)] == [0, 0.75, 0.2]
    with pytest.raises(ConfigError, match="0 microbatches"):
        bubble(2, 0)


def test_bytes_and_flops_are_those_of_the_shapes() -> None:
    module, (inputs, _) = make("residual"), batch("residual", samples=4)
    outlined = outline(module, inputs)
    inner = [8, 16, 24, 32, 40]
    ends = [(6 * 12 + 12) * 8, 0, 0, 0, (12 * 3 + 3) * 8]
    expected = [(2 * 12 * size + size + 12) * 8 + end for size, end in zip(inner, ends, strict=True)]
    assert costs_of(module, outlined, inputs, "bytes") == expected
    ends = [6 * 12, 0, 0, 0, 12 * 3]
    expected = [2 * 4 * (2 * 12 * size + end) for size, end in zip(inner, ends, strict=True)]
    assert costs_of(module, outlined, inputs, "flops") == expected


def test_a_split_says_what_each_part_costs() -> None:
    module, (inputs, _) = make("residual"), batch("residual", samples=4)
    chosen, report = split(module, inputs, 2, "flops")
    assert list(chosen.bounds) == report.bounds == [0, 3, 5]
    assert sum(part.blocks for part in report.parts) == 5
    total = sum(tensor.numel() * 8 for tensor in module.state_dict().values())
    assert sum(part.size_bytes for part in report.parts) == sum(report.block_bytes) == total
    assert report.imbalance == pytest.approx(
        max(part.flops for part in report.parts) * 2 / sum(part.flops for part in report.parts)
    )
    assert report.imbalance <= report.equal_counts_imbalance
    assert all(part.forward_seconds > 0 for part in report.parts)
    assert report.parts[0].first_block == "blocks.0"
    assert torch.is_grad_enabled()
