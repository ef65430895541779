"""The scheduled reading of everything in the store: what is damaged is found before it is needed."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.watch import watched
from modelpress.reports.scrub import ScrubReport
from tasks import scrub as tasks


@flow(name="scrub", flow_run_name="scrub")
def scrub(bytes_per_second: Annotated[int, Field(ge=0)] = 50_000_000, afresh: bool = False) -> ScrubReport:
    """Read every manifest, signature, pointer and blob of the store again, and fail where one is not in order.

    A run that was cut off is continued by the next: it reads the blobs that are left. Damage is told in the run's error
    and in its table; nothing is changed.

    Args:
        bytes_per_second: How much of the store's line it may take, on average; 0 takes what it gets.
        afresh: Begin with the first blob, also where an earlier run was cut off.

    Raises:
        CorruptionError: something is damaged, foreign or not vouched for; pack, blob and key are named.
        NotFoundError: something is missing.
    """
    with watched():
        report = tasks.scrub(bytes_per_second, afresh)
        tasks.show(report)
        tasks.judge(report)
        return report
