"""Find what died without a word, and end what it left open."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from tasks import reaping
from tasks.reaping import ReapReport


@flow(name="reap", flow_run_name="reap")
def reap(
    lease_seconds: Annotated[float, Field(gt=0)] = 300.0,
    watch_seconds: Annotated[float, Field(gt=30, le=3600)] = 60.0,
) -> ReapReport:
    """Mark flow runs that say Running and whose process is dead, end their MLflow runs, and restart those that ask.

    Args:
        lease_seconds: How long a run may give no sign of life; longer than a network or a server is away as a rule.
        watch_seconds: How long a silent run is watched before it counts as dead; longer than between two heartbeats.
    """
    return reaping.reap(lease_seconds, watch_seconds)
