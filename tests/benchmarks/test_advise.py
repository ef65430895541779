from __future__ import annotations

import pytest

from benchmarks.advise.__main__ import _cases, _errors
from benchmarks.advise.cases import CASES, CONFIGS, QUICK, Kept, of_case, recipe_of
from benchmarks.advise.search import Ran
from modelpress.advise import rank
from modelpress.reports import AdviceReport, Advised, NotPredicted, Outlook, Predicted


def near(value: float) -> Predicted:
    return Predicted(value=value, low=0.9 * value, high=1.1 * value)


def outlook(size: float) -> Outlook:
    none = NotPredicted(not_predicted="not asked")
    names = {name: near(1.0) for name in Outlook.model_fields}
    return Outlook(**{**names, "published_bytes": near(size), "memory_bytes": none})


def advised(label: str, size: float) -> Advised:
    return Advised(
        technique="static", label=label, in_recipe=True, outlook=outlook(size), gain=near(1.0), fits=True,
    )  # fmt: skip


def report(chosen: str) -> AdviceReport:
    return AdviceReport(
        name="lenet", machine="here", objective="bytes", binding="asked", batch_size=32,
        budget={"max_quality_drop": 0.01}, hardware={"bandwidth_bits_per_second": 8.0}, now=outlook(100.0),
        ranked=[advised("a", 50), advised("b", 60)], chosen=chosen, config={}, kernels=[], checks=[], seconds=1.0,
    )  # fmt: skip


def test_behind_the_best_counts_what_keeps_the_budget_as_measured() -> None:
    """`c` is smallest and loses too much; of the others `a` is best, and `b` is a fifth behind it."""
    rows = [
        Ran(label="a", published_bytes=50, quality_drop=0.01),
        Ran(label="b", published_bytes=60, quality_drop=0.0),
        Ran(label="c", published_bytes=10, quality_drop=0.2),
        Ran(label="d", failed="no such kernel"),
    ]
    now = Ran(label="float", published_bytes=100)
    kept = Kept(reports=[report("b")] * len(CASES["lenet"]), advice_seconds=1, search_seconds=2, now=now, rows=rows)
    found = list(_cases("lenet", kept))
    behind = [row.value for row in found if row.metric == "behind the best"]
    assert behind == pytest.approx([20.0] * len(CASES["lenet"]))
    assert any(row.system == "best: a" for row in found)
    errors = {(row.system, row.metric): row.value for row in _errors("lenet", kept)}
    assert errors["bytes", "largest error"] == pytest.approx(0.0)
    assert errors["bytes", "recipes"] == 2


def test_there_are_enough_cases_and_each_is_legal() -> None:
    assert sum(map(len, CASES.values())) >= 6
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(CASES)
    for model, cases in CASES.items():
        for _, changes in cases:
            asked = of_case(recipe_of(model, quick=False), changes).advise
            assert asked.objective in rank.MEASURES
    assert all(recipe_of(model, quick=True) != recipe_of(model, quick=False) for model in QUICK)
