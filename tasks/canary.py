"""The tasks of canaries: begin one, look at those that run, show how they stand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from modelpress.config import CanaryConfig, GateConfig
from modelpress.settings import read_settings
from modelpress.store.base import open_store
from registry import runs
from registry.gates import Approval, Decision
from tasks.progress import StageProgress

if TYPE_CHECKING:
    from registry.canaries import Looked

LEVELS = {"rollback": "warning", "abort": "warning"}


@task(name="start-canary", task_run_name="start-canary-{name}", cache_policy=NO_CACHE)
def start(
    name: str, pack: str, config: CanaryConfig, gate: GateConfig | None, approval: Approval | None = None
) -> Decision:
    """Judge a published pack on its own bytes and, if it passes, let servers send it the first requests."""
    from registry import canaries

    settings = read_settings()
    store = open_store(settings.store_uri, settings)
    with StageProgress("gate") as progress, runs.named_errors(settings.mlflow_uri, runs.right_to_edit(name)):
        client = runs.open_client(settings)
        decision, begun = canaries.start(store, client, name, pack, config, gate, progress, approval=approval)
    log = get_run_logger()
    log.info("gate: %s", decision.line(), extra={"stage": "gate"})
    if begun is not None:
        log.info("canary: %s begins with pack %s", name, pack, extra={"stage": "canary"})
    return decision


@task(name="find-canaries", task_run_name="find-canaries", cache_policy=NO_CACHE)
def find(name: str | None) -> list[tuple[str, str]]:
    """Pack name and alias of each canary that runs."""
    from registry import canaries

    settings = read_settings()
    return list(canaries.running(open_store(settings.store_uri, settings), name))


@task(name="look-at-canary", task_run_name="look-at-canary-{name}-{alias}", cache_policy=NO_CACHE)
def look(name: str, alias: str) -> Looked | None:
    """Do the next thing with one canary; None where it ended since."""
    from registry import canaries

    settings = read_settings()
    store = open_store(settings.store_uri, settings)
    with StageProgress("gate") as progress, runs.named_errors(settings.mlflow_uri, runs.right_to_edit(name)):
        found = canaries.look(store, runs.open_client(settings), name, alias, progress)
    if found is not None:
        getattr(get_run_logger(), LEVELS.get(found.action, "info"))(
            "canary: %s@%s, step %d of %d: %s, %s",
            *(name, alias, found.step + 1, found.steps, found.action, "; ".join(found.reasons)),
            extra={"stage": "canary"},
        )
    return found


@task(name="show-canaries", task_run_name="show-canaries", cache_policy=NO_CACHE)
def show(found: Sequence[Looked]) -> None:
    """How each canary stands: a table of its tests, and a plot in MLflow once it has ended."""
    from registry import canary_figure

    settings = read_settings()
    for one in found:
        rows = [
            {
                "test": finding.test,
                "verdict": finding.verdict,
                "rate": "" if finding.rate is None else f"{finding.rate:.4f}",
                "between": f"{finding.low:.4f} and {finding.high:.4f}",
                "champion": "" if finding.champion_rate is None else f"{finding.champion_rate:.4f}",
                "outcomes": f"{finding.requests:g}",
                "evidence": f"{finding.evidence:.2f} (alarm at {finding.alarm_at:.2f})",
                "evidence that it is kept": f"{finding.evidence_kept:.2f} (clear at {finding.clear_at:.2f})",
            }
            for finding in one.findings
        ]
        key = re.sub(r"[^a-z0-9]+", "-", f"{one.name}-{one.alias}-canary")
        text = f"Step {one.step + 1} of {one.steps}, {one.phase}; {one.action}: {'; '.join(one.reasons)}"
        create_table_artifact(rows, key=key, description=f"Canary of `{one.name}@{one.alias}`. {text}")
        if one.phase != "running":
            canary_figure.log(runs.open_client(settings), one)
