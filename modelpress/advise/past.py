"""How far off earlier advice was: what the next advice's intervals are made of.

One line of JSON per check, appended. Before there are checks of a technique on a machine, an advice states errors that
nobody has measured there yet, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from modelpress.errors import ConfigError
from modelpress.reports import AdviceCheck
from modelpress.reports.advice import Metric
from modelpress.store.local import local_errors

UNCHECKED: dict[str, float] = {
    "published_bytes": 0.05,
    "latency_seconds": 0.2,
    "batch_seconds": 0.2,
    "cold_start_seconds": 0.25,
}
"""Errors, as shares, that are stated before anything was checked."""
FURTHER = 0.2
"""Of everything else."""
LEAST_CHECKS = 3
"""Fewer do not make an error smaller than `UNCHECKED`; they may make it larger."""


@dataclass(frozen=True)
class Past:
    """Checks of earlier advice."""

    checks: Sequence[AdviceCheck]
    """The oldest first."""

    @classmethod
    def read(cls, path: Path | None) -> Past:
        """Of a file; none where there is no file.

        Raises:
            ConfigError: a line is no check.
        """
        if path is None or not path.exists():
            return cls(())
        found = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                found.append(AdviceCheck.model_validate_json(line))
            except ValidationError as error:
                raise ConfigError(
                    f"reading line {number} of earlier checks, {path}",
                    found=str(error.errors(include_url=False)[0]["msg"]),
                    expected="an AdviceCheck as JSON",
                    fix="remove the line",
                ) from error
        return cls(found)

    def error(self, metric: Metric, technique: str, machine: str) -> float:
        """How far off a number is to be expected, as a share of it: the largest of the checks on this machine, of the
        technique where there are some, else of all."""
        alike = self._ratios(metric, machine, technique) or self._ratios(metric, machine, None)
        stated = UNCHECKED.get(metric, FURTHER)
        if not alike:
            return stated
        seen = max(abs(one - 1) for one in alike)
        return seen if len(alike) >= LEAST_CHECKS else max(seen, stated)

    def said(self, machine: str) -> list[str]:
        """One line per metric that was checked on this machine."""
        lines = []
        for metric in dict.fromkeys(row.metric for check in self.checks for row in check.rows):
            ratios = self._ratios(metric, machine, None)
            if ratios:
                middle = math.exp(sum(math.log(one) for one in ratios) / len(ratios))
                lines.append(
                    f"{metric}: measured ÷ foretold {middle:.2f} in the mean of {len(ratios)} checks, "
                    f"{min(ratios):.2f} to {max(ratios):.2f}"
                )
        return lines or ["nothing was checked on this machine: errors are those stated beforehand"]

    def _ratios(self, metric: str, machine: str, technique: str | None) -> list[float]:
        return [
            row.ratio
            for check in self.checks
            if check.machine == machine and technique in (None, check.technique)
            for row in check.rows
            if row.metric == metric and row.ratio is not None and row.ratio > 0
        ]


def keep(check: AdviceCheck, path: Path) -> None:
    """Append a check."""
    with local_errors(f"keeping a check of an advice in {path}", writing=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(check.model_dump_json() + "\n")
