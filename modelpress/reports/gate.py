"""What the gate says of a candidate, and what a person said against it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from modelpress.reports.base import Report

Verdict = Literal["pass", "fail", "inconclusive"]


class Check(Report):
    """One condition and how it went."""

    name: str
    """What was looked at, such as `quality against the champion`."""
    verdict: Verdict
    """How it went."""
    reason: str
    """With the numbers that decided."""
    required_samples: int | None = None
    """For an inconclusive comparison: samples that would decide with 80 % power."""


class Override(Report):
    """A person's word that a candidate is to be served although the gate did not let it through."""

    by: str = Field(max_length=100, pattern=r"\S")
    """Who takes it upon themselves; kept in the decision, in the pointer's log and in MLflow."""
    reason: str = Field(max_length=1000, pattern=r"\S")
    """Why; kept as well."""

    def line(self) -> str:
        """For people."""
        return f"overridden by {self.by}: {self.reason}"


class Decision(Report):
    """What the gate says. It is stored, logged and shown as it stands; nobody rephrases it."""

    promote: bool
    """Whether the candidate becomes champion: every check passed, or a person overrode those that did not."""
    verdict: Verdict
    """`fail` where a check failed, else `inconclusive` where one was, else `pass`; no override changes it."""
    reasons: list[str]
    """One line per check."""
    required_samples: int | None = None
    """The largest of the checks'."""
    checks: list[Check]
    """The single conditions."""
    wait_hours: float | None = None
    """How long a person's answer is waited for, where one is asked for."""
    override: Override | None = None
    """What a person said against a decision that did not pass; None where nobody did, and where it passed."""

    def outcome(self) -> str:
        """The verdict, and the override where it moved the alias all the same."""
        return f"{self.verdict}, {self.override.line()}" if self.override and self.promote else self.verdict

    def line(self) -> str:
        """The decision in one line, for logs."""
        return f"{'promote' if self.promote else 'refuse'} ({self.outcome()}): {'; '.join(self.reasons)}"
