"""A plan whose measurements were made in slices is the plan of one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import pytest

from modelpress.checkpoint import Checkpoint
from modelpress.config import CompressConfig, ExportConfig, PlanConfig
from modelpress.errors import StageError
from modelpress.export import export
from modelpress.plan import measured, opened, plan, settle, sliced
from modelpress.reduce import Ledger, Part, Sensitivities, deal
from tests.toys import TextToy

CONFIG = PlanConfig(max_disagreement=1e-3, num_bits=[8, 4], group_sizes=[16], points=2)
CODING = CompressConfig()


@pytest.fixture(scope="module")
def encoder() -> tuple[TextToy, Checkpoint]:
    workload = TextToy()
    return workload, export(workload.module, workload, ExportConfig())[0]


def test_slices_in_any_order_make_the_same_plan(encoder: tuple[TextToy, Checkpoint]) -> None:
    workload, checkpoint = encoder
    work = opened(checkpoint, workload, CONFIG, CODING)
    units = sliced.units(work)
    assert len(units) == 3 + 6  # three weights; two widths, each with three ways to share a scale
    ledger = Ledger(deal("plan", len(units), 4, seed=3), Sensitivities)
    for number, one in reversed(list(enumerate(ledger.cut.slices))):
        value = sliced.measure_units(opened(checkpoint, workload, CONFIG, CODING), one)
        part = Part(of="plan", slice=number, attempt=1, value=value)
        ledger.add(Part.model_validate_json(part.model_dump_json()))
    sliced.take(work, ledger.reduce().value)
    other = opened(checkpoint, workload, CONFIG, CODING)

    def front(choices: Sequence[tuple[int, ...]]) -> list[tuple[int, float]]:
        parts = [sliced.measure_points(other, choices, [number]) for number in range(len(choices))]
        return [reduce(lambda one, two: two.merge(one), parts).points[number] for number in range(len(choices))]

    made, report = settle(measured(work), CONFIG.max_disagreement, measure_front=front)
    assert len(report.front) > 1
    whole, expected = plan(checkpoint, workload, CONFIG, CODING)
    assert report == expected
    assert made.to_bytes() == whole.to_bytes()


def test_what_was_taken_is_not_measured_again(encoder: tuple[TextToy, Checkpoint]) -> None:
    workload, checkpoint = encoder
    work = opened(checkpoint, workload, CONFIG, CODING)
    found = sliced.measure_units(work, range(len(sliced.units(work))))
    alike = dict.fromkeys(found.alike, 7.0)
    sliced.take(work, found.model_copy(update={"alike": alike}))
    assert {one.disagreement for one in measured(work).uniform if "zeros" not in one.label} == {7.0}
    assert "few" not in vars(work)


def test_slices_of_another_plan_are_refused(encoder: tuple[TextToy, Checkpoint]) -> None:
    workload, checkpoint = encoder
    work = opened(checkpoint, workload, CONFIG, CODING)
    other = opened(checkpoint, workload, CONFIG.model_copy(update={"num_bits": [8, 3]}), CODING)
    with pytest.raises(StageError, match="the 12 that this graph"):
        sliced.take(work, sliced.measure_units(other, [0]))
    with pytest.raises(StageError, match="unit 99"):
        sliced.measure_units(work, [99])
    with pytest.raises(StageError, match="point 0 of 1"):
        sliced.measure_points(work, [(0,)], [0])
