"""Data as inputs of MLflow runs: by name, split, digest and number of samples; never a sample."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT
from mlflow.utils.validation import MAX_DATASET_NAME_SIZE

from modelpress.config import WorkloadConfig
from modelpress.settings import without_logins

CONTEXTS = {"train": "training", "calibration": "calibration", "evaluation": "evaluation"}
"""MLflow's word for what each split is used for."""
DIGEST_DIGITS = 32
"""MLflow takes 36; the whole sha256 is a tag."""


def log(client: MlflowClient, run_id: str, config: WorkloadConfig, splits: Mapping[str, tuple[int, str]]) -> None:
    """Log the splits of a workload as inputs of a run.

    Args:
        client: MLflow.
        run_id: the run.
        config: names the data.
        splits: by split the number of different samples, and their sha256 (hex).
    """
    name = without_logins(config.data or config.factory)[-MAX_DATASET_NAME_SIZE:]
    source = {"workload": config.kind, "data": name}
    client.log_inputs(
        run_id,
        [
            DatasetInput(
                Dataset(
                    name=name,
                    digest=sha256[:DIGEST_DIGITS],
                    source_type="code",  # of MLflow's kinds the one that has no address to fetch it from
                    source=json.dumps({"tags": source | {"split": split}}),
                    profile=json.dumps({"num_rows": samples}),
                ),
                [
                    InputTag(MLFLOW_DATASET_CONTEXT, CONTEXTS[split]),
                    InputTag("split", split),
                    InputTag("samples", str(samples)),
                    InputTag("sha256", sha256),
                ],
            )
            for split, (samples, sha256) in splits.items()
        ],
    )


def of_run(client: MlflowClient, run_id: str, splits: Collection[str]) -> list[DatasetInput]:
    """The inputs of a run that are one of these splits."""
    inputs = client.get_run(run_id).inputs
    found = inputs.dataset_inputs if inputs else []
    return [one for one in found if any(tag.key == "split" and tag.value in splits for tag in one.tags)]
