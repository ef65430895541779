"""The gate's benchmark counts verdicts of pairs whose true difference is the one that it says."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.gate import MARGIN, _joined, _one, _pair


@pytest.mark.parametrize("loss", [0.0, MARGIN])
def test_pairs_have_the_difference_that_is_asked_for(loss: float) -> None:
    candidate, source = _pair(np.random.default_rng(0), loss, 400_000)
    assert float((candidate - source).mean()) == pytest.approx(-loss, abs=2e-3)
    assert float((candidate != source).mean()) == pytest.approx(0.06, abs=2e-3)


def test_shares_are_those_of_decisions_that_know_something() -> None:
    rows = {(row.system, row.metric): row.value for row in [*_one(1_000, 60), *_joined(300, 20)]}
    assert all(value is not None and 0 <= value <= 100 for value in rows.values())
    threshold = rows["threshold on the mean", "at the margin: wrongly pass"]
    ours = rows["modelpress", "at the margin: wrongly pass"]
    assert ours is not None
    assert threshold is not None
    assert ours < 20 < threshold
    assert rows["modelpress", "all equal: fail"] == 0
