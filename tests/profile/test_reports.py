"""Figures: a number or a reason, told apart in JSON by their keys."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from modelpress.reports import Figure, Measured, NotMeasured
from modelpress.reports.measured import Part, reason_of, value_of


class Inner(Part):
    joules: Figure


class Outer(Part):
    seconds: Figure
    inner: Inner


def test_json_of_a_figure_is_read_back_as_what_it_was() -> None:
    found = Outer(seconds=Measured(value=0.0, by="a clock"), inner=Inner(joules=NotMeasured(not_measured="no meter")))
    document = json.loads(found.model_dump_json())
    assert document == {"seconds": {"value": 0.0, "by": "a clock"}, "inner": {"joules": {"not_measured": "no meter"}}}
    assert Outer.model_validate(document) == found
    assert found.metrics() == {"seconds": 0.0}
    assert found.unmeasured() == {"inner.joules": "no meter"}
    assert (value_of(found.seconds), reason_of(found.seconds)) == (0.0, None)
    assert (value_of(found.inner.joules), reason_of(found.inner.joules)) == (None, "no meter")


@pytest.mark.parametrize(
    "figure",
    [None, 0, {}, {"value": None}, {"not_measured": ""}, {"value": 1.0, "not_measured": "both"}, {"value": "NaN"}],
)
def test_nothing_else_stands_for_a_figure(figure: object) -> None:
    with pytest.raises(ValidationError):
        Inner.model_validate({"joules": figure})
