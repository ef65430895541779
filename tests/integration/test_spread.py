"""The line with its trainings spread over two ranks, under a real Prefect and a real MLflow server."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.optimize import optimize
from modelpress.config import OptimizeConfig, ParallelConfig, PruneConfig, TrainConfig
from tests.integration.test_line import QUICK, children

SPREAD = ParallelConfig(processes=2)


def with_ways(ways: ParallelConfig) -> OptimizeConfig:
    assert QUICK.distill is not None
    train = QUICK.distill.train.model_copy(update={"parallel": ways})
    recovery = TrainConfig(epochs=1, parallel=ways)
    change = {
        "name": "spread",
        "distill": QUICK.distill.model_copy(update={"train": train}),
        "prune": PruneConfig(sparsity=0.25, recovery=recovery),
    }
    return QUICK.model_copy(update=change)


@pytest.mark.e2e
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_run_trains_over_ranks_and_another_number_of_them_repeats_nothing(
    tmp_path: Path, prefect_server: str, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELPRESS_HOME", str(tmp_path))
    monkeypatch.setenv("MODELPRESS_TRACKING_URI", mlflow_server)
    for name in ("MODELPRESS_STORE", "MODELPRESS_WORK"):
        monkeypatch.delenv(name, raising=False)
    first = optimize(with_ways(SPREAD))
    client = MlflowClient(mlflow_server, mlflow_server)
    runs = children(client, client.get_run(first.mlflow_run))
    for stage, training in (("distill", "train"), ("prune", "recovery")):
        metrics = runs[stage].data.metrics
        assert metrics[f"{training}.parallel.processes"] == 2
        assert metrics[f"{training}.parallel.traffic_ratio"] <= 1.1
        assert metrics[f"{training}.parallel.traffic.control_bytes"] > 0
    assert not list((tmp_path / "work").glob("training/*/*/*")), "states and jobs go with the record"
    again = optimize(with_ways(ParallelConfig()))
    assert not {"source", "distill", "prune"} & set(again.recomputed)
