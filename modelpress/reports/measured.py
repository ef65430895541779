"""A number that was measured, or the reason why it was not: what a profile is made of.

In JSON a figure is ``{"value": 1.5, "by": "..."}`` or ``{"not_measured": "..."}``; which of the two it is shows in its
only required key. Nothing stands for "not measured" but its reason: never 0, never null.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from modelpress.reports.base import Report

Reason = Annotated[str, StringConstraints(min_length=1)]


class Measured(Report):
    """A number in the unit that its field's name ends in."""

    value: float = Field(allow_inf_nan=False)
    """The number."""
    by: str = ""
    """How it was found, where the field's name leaves it open."""


class NotMeasured(Report):
    """Why there is no number."""

    not_measured: Reason
    """The reason, and what would change it."""


Figure = Measured | NotMeasured


def value_of(figure: Figure) -> float | None:
    """The number of a figure; None where there is none."""
    return figure.value if isinstance(figure, Measured) else None


def reason_of(figure: Figure) -> str | None:
    """Why a figure has no number; None where it has one."""
    return figure.not_measured if isinstance(figure, NotMeasured) else None


class Part(Report):
    """Base of the reports that hold figures."""

    def metrics(self) -> dict[str, float]:
        """A measured figure is flat, under its field's name; one that was not measured is left out."""
        flat = super().metrics()
        for name in type(self).model_fields:
            if isinstance(figure := getattr(self, name), Measured):
                flat.pop(f"{name}.value", None)
                flat[name] = figure.value
        return flat

    def unmeasured(self) -> dict[str, str]:
        """Why each figure that has no number has none, by ``path.to.field``; of parts inside as well, not of lists."""
        reasons: dict[str, str] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, NotMeasured):
                reasons[name] = value.not_measured
            elif isinstance(value, Part):
                reasons |= {f"{name}.{key}": reason for key, reason in value.unmeasured().items()}
        return reasons
