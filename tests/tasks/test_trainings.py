"""States of trainings in the work store: where they lie, who may use them, and when they go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from prefect.logging import disable_run_logger

from modelpress.config import TrainConfig, WorkloadConfig
from modelpress.errors import StoreFullError
from modelpress.progress import Progress
from modelpress.reports import SourceReport
from modelpress.settings import Settings
from modelpress.store.base import Store, open_store
from modelpress.train import train_
from registry import runs
from tasks.records import Record, save_record
from tasks.runner import RunContext, run_stage
from tasks.trainings import StageShelf, clear_finished
from tests.databases import Databases
from tests.train.toy import Toy

KEY = "a" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "work"))


@pytest.fixture(autouse=True)
def no_flow() -> Iterator[None]:
    with disable_run_logger():
        yield


def shelf(store: Store, told: dict[str, str] | None = None, **settings: object) -> StageShelf:
    return StageShelf(store, "distill", KEY, Settings(**settings), ({} if told is None else told).__setitem__)  # type: ignore[arg-type]


def test_states_lie_under_the_stages_key_until_it_is_recorded(store: Store) -> None:
    first = shelf(store)
    assert first.load(0) is None
    for number in (0, 1):
        first.save(number, b"state")
    assert [info.key for info in store.list("training/")] == [f"training/distill/{KEY}/{number}" for number in (0, 1)]
    second = shelf(store)
    assert second.load(1) == b"state"
    second.clear()
    assert not list(store.list("training/"))


def test_whoever_wants_nothing_reused_gets_no_state(store: Store) -> None:
    shelf(store).save(0, b"state")
    assert shelf(store, reuse=False).load(0) is None


def test_a_store_that_is_full_costs_the_state_and_not_the_training(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> bool:
        raise StoreFullError("writing")

    monkeypatch.setattr(store, "put", full)
    shelf(store).save(0, b"state")
    monkeypatch.undo()
    assert shelf(store).load(0) is None


def test_what_a_run_left_that_died_behind_the_record_is_swept_and_nothing_else(store: Store) -> None:
    for stage in ("distill", "prune"):
        StageShelf(store, stage, KEY, Settings(), lambda *_: None).save(0, b"state")
    store.put("training/stray", b"not ours")
    save_record(store, Record(stage="prune", key=KEY, outputs={}, report={}, seconds=0.0), replace=False)
    assert list(clear_finished(store)) == [f"training/prune/{KEY}/0"]
    assert [info.key for info in store.list("training/")] == [f"training/distill/{KEY}/0", "training/stray"]


class Killed(BaseException):
    """What a signal raises."""


def test_a_stage_that_was_cut_off_trains_on_and_its_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, databases: Databases
) -> None:
    databases.mlflow(tmp_path)
    monkeypatch.setenv("MODELPRESS_HOME", str(tmp_path))
    monkeypatch.setenv("MODELPRESS_TRAINING_SECONDS", "0")
    for name in ("MODELPRESS_WORK", "MODELPRESS_STORE", "MODELPRESS_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    client = runs.open_client(Settings())
    experiment = client.create_experiment("stages", artifact_location=(tmp_path / "artifacts").as_uri())
    workload = WorkloadConfig(kind="custom", factory="tests.train.toy:Toy", options={})
    updates: list[int] = []

    def run(until: int) -> tuple[str, dict[str, str]]:
        def loss(module: torch.nn.Module, batch: object) -> torch.Tensor:
            updates.append(1)
            if len(updates) > until:
                raise Killed
            return module(**batch.inputs).square().mean()  # type: ignore[attr-defined]

        def work(progress: Progress) -> tuple[Mapping[str, bytes], SourceReport]:
            toy = Toy()
            module = toy.source()
            train_(module, loss, toy, TrainConfig(epochs=3, batch_size=16), progress)
            data = module.body[0].weight.detach().numpy().tobytes()
            return {"output": data}, SourceReport(
                parameters=1, size_bytes=1, trained=True, origin=None, origin_sha256=None
            )

        context = RunContext(name="stages", mlflow_run=client.create_run(experiment).info.run_id, workload=workload)
        try:
            return run_stage(context, "source", SourceReport, work).output.sha256, {}
        finally:
            (child,) = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{context.mlflow_run}'")
            tags.append(child.data.tags)

    tags: list[dict[str, str]] = []
    with pytest.raises(Killed):
        run(5)
    assert [info.key.split("/")[:2] for info in open_store(str(tmp_path / "work")).list("training/")] == [
        ["training", "source"]
    ]
    resumed, _ = run(99)
    assert len(updates) == 6 + 4, "nine updates, of which the sixth began twice"
    assert "resumed" not in tags[0]
    assert tags[1]["resumed"] == "the training goes on behind update 5 of 9"
    assert not list(open_store(str(tmp_path / "work")).list("training/"))
    monkeypatch.setenv("MODELPRESS_REUSE", "false")
    updates.clear()
    assert run(99)[0] == resumed
    assert len(updates) == 9
