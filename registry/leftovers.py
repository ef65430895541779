"""MLflow runs that nobody will end any more: their flow run died, or was started again.

A run of the line carries its flow run's id as a tag, and those of its stages carry the line's. Runs of others, without
that tag, are never touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

FLOW_RUN_TAG = "prefect.flow_run_id"
REASON_TAG = "ended"
"""Why a run was ended by somebody else than its own process."""
PAGE = 100

Ended = Literal["KILLED", "FAILED"]


@dataclass(frozen=True)
class Open:
    """A run that says RUNNING."""

    run_id: str
    flow_run: str
    """Id of the flow run that it belongs to."""


def still_open(client: MlflowClient) -> Iterator[Open]:
    """Every run that says RUNNING and belongs to a flow run, in whichever experiment; parents before their stages."""
    experiments = [found.experiment_id for found in _experiments(client)]
    owners: dict[str, str | None] = {}
    found: list[MlflowRun] = []
    for start in range(0, len(experiments), PAGE):
        found += _search(client, experiments[start : start + PAGE], "attributes.status = 'RUNNING'")
    for run in sorted(found, key=lambda run: MLFLOW_PARENT_RUN_ID in run.data.tags):
        tags = run.data.tags
        parent = tags.get(MLFLOW_PARENT_RUN_ID)
        if parent is not None and parent not in owners:
            owners[parent] = _owner(client, parent)
        owner = tags.get(FLOW_RUN_TAG) or (owners[parent] if parent is not None else None)
        owners[run.info.run_id] = owner
        if owner is not None:
            yield Open(run.info.run_id, owner)


def end(client: MlflowClient, run_id: str, status: Ended, reason: str) -> None:
    """End a run from outside; the reason stands in its tags. What it logged stays."""
    client.set_tag(run_id, REASON_TAG, reason)
    client.set_terminated(run_id, status)


def end_earlier(client: MlflowClient, experiment: str, flow_run: str, present: str, reason: str) -> list[str]:
    """End what earlier attempts of a flow run left open in an experiment, beside its `present` run; their ids."""
    found = _search(client, [experiment], f"tags.`{FLOW_RUN_TAG}` = '{flow_run}'")
    ended = []
    for parent in [run.info.run_id for run in found if run.info.run_id != present]:
        own = f"attributes.status = 'RUNNING' AND tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}'"
        for run in [*_search(client, [experiment], own), client.get_run(parent)]:
            if run.info.status == "RUNNING":
                end(client, run.info.run_id, "KILLED", reason)
                ended.append(run.info.run_id)
    return ended


def _owner(client: MlflowClient, run_id: str) -> str | None:
    try:
        return client.get_run(run_id).data.tags.get(FLOW_RUN_TAG)
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return None  # the parent was deleted for good
        raise


def _experiments(client: MlflowClient) -> Iterator[Experiment]:
    token = None
    while True:
        page = client.search_experiments(max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _search(client: MlflowClient, experiments: list[str], condition: str) -> list[MlflowRun]:
    found: list[MlflowRun] = []
    token = None
    while True:
        page = client.search_runs(experiments, condition, max_results=PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found
