"""What reacts when a scheduled run fails; an automation of its deployment starts it."""

from __future__ import annotations

from uuid import UUID

from prefect import flow

from tasks import alarm as tasks
from tasks.alarm import Failure


@flow(name="report-failure", flow_run_name="report-failure")
def report_failure(flow_run_id: UUID, block: str = "") -> Failure:
    """Record a failed run on a page of its deployment, and tell somebody, once for each doubling of a row of failures.

    It starts nothing again and changes no state: the next time of the schedule is the retry.

    Args:
        flow_run_id: The run that failed.
        block: Notification block of Prefect's, such as `slack-webhook/ops`; left empty, the page and the log are all.

    Raises:
        ConfigError: there is no such block.
    """
    found = tasks.record(flow_run_id)
    if block and found.told:
        tasks.notify(block, found)
    return found
