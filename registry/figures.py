"""What was measured of a served graph on a class of machines, as tags of its model version.

A time says something of one kind of machine. What MODELPRESS_HARDWARE calls the machine that measured is in the tags'
names, `figures.CLASS.p99_seconds` and so on, so that the gate takes those of the class that it is asked about.
"""

from __future__ import annotations

from collections.abc import Mapping

from modelpress.reports import EvaluationReport
from registry.gates import Figures
from registry.versions import Version, measured_number

PREFIX = "figures."
_PROVIDER, _P99, _THROUGHPUT = ".provider", ".p99_seconds", ".throughput_per_second"


def tags(report: EvaluationReport) -> dict[str, str]:
    """Text by tag; nothing of a machine that has no class."""
    if report.hardware is None or not report.latency:
        return {}
    of_one = min(report.latency, key=lambda row: row.batch_size)
    of_many = max(report.latency, key=lambda row: row.batch_size)
    here = PREFIX + report.hardware
    return {
        here + _PROVIDER: report.provider or "none",
        here + _P99: f"{of_one.p99_seconds:.6g}",
        here + _THROUGHPUT: f"{of_many.throughput_per_second:.6g}",
    }


def of_version(version: Version) -> Mapping[str, Figures]:
    """By class of machines.

    Raises:
        CorruptionError: a number is none.
    """
    found = (key for key in version.tags if key.startswith(PREFIX) and key.endswith(_PROVIDER))
    classes = [key.removeprefix(PREFIX).removesuffix(_PROVIDER) for key in found]
    return {
        one: Figures(
            provider=version.tags[PREFIX + one + _PROVIDER],
            p99_seconds=measured_number(version, PREFIX + one + _P99),
            throughput_per_second=measured_number(version, PREFIX + one + _THROUGHPUT),
        )
        for one in classes
    }
