"""What becomes of a variant: known once, stopped for a reason of its own, or lost; and what then comes of the whole."""

from __future__ import annotations

import pytest

from flows.variants import _check_known, _note, _published
from modelpress.config import OptimizeConfig, VariantsConfig
from modelpress.errors import (
    BudgetExceededError,
    CoverageError,
    ModelpressError,
    SetupError,
    StoreUnavailableError,
    WorkerError,
    WorkloadError,
)
from modelpress.reduce import Ledger, Part, Variants, deal
from modelpress.reports import TriedVariant, VariantsReport
from modelpress.variants import choose
from modelpress.variants.expand import expand

RECIPE = OptimizeConfig.model_validate({"name": "small", "workload": {"kind": "custom", "factory": "a:B"}})
CONFIG = VariantsConfig(grid={"prune.sparsity": [0.3, 0.5]})
FOUND = expand(RECIPE, CONFIG)


def noted(outcome: object) -> tuple[Ledger[Variants], dict[int, str]]:
    ledger, lost = Ledger(deal("grid", 2, 2), Variants), dict[int, str]()
    _note(FOUND[1], outcome, ledger, lost)
    return ledger, lost


@pytest.mark.parametrize("kind", [BudgetExceededError, CoverageError, WorkloadError])
def test_what_a_stage_refuses_is_a_result(kind: type[ModelpressError]) -> None:
    ledger, lost = noted(kind("judging", found="a drop", fix="ask less"))
    assert (ledger.missing, lost) == ([0], {})
    one = ledger.reduce(partial=True).value.tried[1]
    assert (one.label, one.quality) == ("prune.sparsity=0.5", None)
    assert one.stopped is not None
    assert one.stopped.startswith(f"{kind.__name__}: judging")
    assert "a drop" in one.stopped


@pytest.mark.parametrize("error", [WorkerError("a"), SetupError("a"), StoreUnavailableError("a"), OSError("a"), None])
def test_what_came_from_outside_says_nothing_of_the_variant(error: object) -> None:
    ledger, lost = noted(error)
    assert ledger.missing == [0, 1]
    assert list(lost) == [1]


def test_a_result_is_taken_as_it_is() -> None:
    tried = Variants(tried={1: TriedVariant(number=1, label="b")})
    ledger, lost = noted(Part(of="grid", slice=1, attempt=2, value=tried))
    assert (ledger.reduce(partial=True).value, lost) == (tried, {})


def test_one_that_is_lost_is_an_error_in_the_end_and_nothing_is_published_without_a_best() -> None:
    report = VariantsReport(name="small", asked=choose.budgets(RECIPE, CONFIG), variants=[], mlflow_url="http://here")
    _check_known(report, FOUND)
    with pytest.raises(WorkerError, match=r"prune\.sparsity=0\.5: it died") as caught:
        _check_known(report.model_copy(update={"lost": {1: "it died"}}), FOUND)
    assert "http://here" in str(caught.value.fix)
    with pytest.raises(BudgetExceededError, match="none within the budgets"):
        _published(report, FOUND)
