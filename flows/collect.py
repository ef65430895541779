"""Keep the publication store in order: retention, then collection."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.watch import watched
from modelpress.config import RetentionConfig
from modelpress.reports import CollectReport
from tasks import housekeeping


@flow(name="collect", flow_run_name="collect-delete-{delete}")
def collect(
    delete: bool = False,
    grace_hours: Annotated[float, Field(ge=0)] = 24.0,
    retention: RetentionConfig | None = None,
) -> CollectReport:
    """Remove versions that no rule keeps, and then what no pack and no upload under way needs.

    Args:
        delete: Remove; left off, the run only says what would go.
        grace_hours: What is younger stays, whoever needs it.
        retention: Which versions stay; left out, all of them.
    """
    with watched():
        if retention is not None:
            housekeeping.retain(retention, delete)
        return housekeeping.collect(grace_hours, delete)
