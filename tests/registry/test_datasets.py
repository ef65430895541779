"""Data in MLflow: what stands there of a split, and that it is the same for the same samples."""

from __future__ import annotations

import json
from pathlib import Path

from modelpress.config import WorkloadConfig
from modelpress.settings import Settings
from modelpress.workload import check_disjoint
from registry import datasets, runs
from tests.databases import Databases
from tests.integration.small_workloads import Small


def test_a_split_is_known_by_its_samples_in_whatever_order() -> None:
    one, other, third = Small(), Small(), Small()
    other.rows = {split: rows.flip(0) for split, rows in other.rows.items()}
    third.rows["train"] = third.rows["train"][1:]
    seen = check_disjoint(one)
    assert check_disjoint(other) == seen
    assert {split: found.samples for split, found in seen.items()} == {
        "train": 100,
        "calibration": 100,
        "evaluation": 400,
    }
    changed = check_disjoint(third)
    assert [split for split in seen if changed[split] != seen[split]] == ["train"]


def test_a_run_has_splits_as_inputs_without_a_login_and_without_data(tmp_path: Path, databases: Databases) -> None:
    client = runs.open_client(Settings(home=tmp_path, tracking_uri=databases.mlflow(tmp_path)))
    run = client.create_run(client.create_experiment("data")).info.run_id
    config = WorkloadConfig(kind="image-classification", model="digits-cnn", data="http://anna:a-password@host/set")
    datasets.log(client, run, config, {"train": (7, "ab" * 32), "evaluation": (3, "cd" * 32)})
    assert datasets.of_run(client, run, []) == []
    (found,) = datasets.of_run(client, run, ["evaluation", "calibration"])
    assert (found.dataset.name, found.dataset.digest) == ("http://host/set", "cd" * 16)
    assert json.loads(found.dataset.profile) == {"num_rows": 3}
    assert {tag.key: tag.value for tag in found.tags} == {
        "mlflow.data.context": "evaluation",
        "split": "evaluation",
        "samples": "3",
        "sha256": "cd" * 32,
    }
    assert "a-password" not in json.dumps([one.to_dictionary() for one in client.get_run(run).inputs.dataset_inputs])
