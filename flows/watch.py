"""What one sees of a flow run outside of Prefect and MLflow: its log, its trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.runtime import flow_run

from flows.logs import run_log
from tasks.telemetry import traced


@contextmanager
def watched(pack: str = "") -> Iterator[None]:
    """Watch the flow run that has begun; `pack` is the name of what it works on, where that is one."""
    attributes = {
        "prefect.flow_run.id": str(flow_run.id),
        "prefect.flow_run.name": str(flow_run.name),
        **({"modelpress.pack.name": pack} if pack else {}),
    }
    with run_log(pack), traced(f"flow {flow_run.flow_name}", {**attributes}):
        yield
