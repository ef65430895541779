"""A slice as a task: done once, recorded, and failed as the library fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from modelpress import errors
from modelpress.checkpoint import from_module
from modelpress.config import WorkersConfig, WorkloadConfig
from modelpress.errors import ModelpressError, StageError, WorkloadError
from modelpress.reduce import Answers
from modelpress.settings import Settings
from modelpress.store.artifacts import save_artifact
from modelpress.store.base import Store, open_store
from modelpress.workers.pool import Pool
from modelpress.workers.protocol import Failure, Job
from tasks.slices import Crew, crew, crewed, error_of, run_slice
from tests.toys import ImageToy

ONE = WorkersConfig(count=1, threads=1)


@pytest.fixture(scope="module")
def workers() -> Iterator[Crew]:
    with Pool(1, threads=1) as pool:
        yield Crew(ONE, pool)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("MODELPRESS_HOME", str(tmp_path))
    monkeypatch.delenv("MODELPRESS_WORK", raising=False)
    return open_store(Settings().work_uri)


@pytest.fixture
def job(store: Store) -> Job:
    toy = ImageToy(samples=150)
    return Job(
        kind="answers",
        of="work",
        slice=1,
        units=[0, 2],
        model=save_artifact(store, from_module(toy.module).to_bytes()),
        workload=WorkloadConfig(kind="custom", factory="tests.toys:ImageToy", options={"samples": 150}),
        store=store.uri,
        run="run",
    )


def test_a_recorded_slice_is_not_done_again(workers: Crew, job: Job, store: Store) -> None:
    done = run_slice.fn(job, "identity", workers)
    assert (done.slice, done.attempt) == (1, 1)

    class Nobody(Pool):
        def run(self, *_: object, **__: object) -> None:  # type: ignore[override]
            raise AssertionError("a worker was asked")

    nobody = Crew(ONE, Nobody(1, threads=1))
    assert run_slice.fn(job, "identity", nobody) == done
    for other in ({"units": [0, 1]}, {"of": "other"}):
        with pytest.raises(AssertionError, match="asked"):
            run_slice.fn(job.model_copy(update=other), "identity", nobody)
    with pytest.raises(AssertionError, match="asked"):
        run_slice.fn(job, "other data", nobody)
    (blob,) = [info.key for info in store.list("blobs/") if info.key not in job.model.uri]
    store.delete(blob)  # a record whose answers are gone is none
    with pytest.raises(AssertionError, match="asked"):
        run_slice.fn(job, "identity", nobody)
    again = run_slice.fn(job, "identity", workers).value
    assert isinstance(again, Answers)
    assert isinstance(done.value, Answers)
    assert again.pieces == done.value.pieces


def test_an_error_of_a_slice_is_the_librarys_and_is_not_recorded(workers: Crew, job: Job, store: Store) -> None:
    with pytest.raises(WorkloadError, match="no batch 7") as caught:
        run_slice.fn(job.model_copy(update={"units": [7]}), "identity", workers)
    assert caught.value.fix == "the data must not change while a run reads it"
    assert not list(store.list("stages/"))


def test_every_error_of_the_library_comes_back_as_itself() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ModelpressError)]
    assert len(kinds) > 20
    for kind in kinds:
        made = error_of(Failure(kind=kind.__name__, doing="a", found="b", expected="c", fix="d"))
        assert type(made) is kind
        assert (made.doing, made.found, made.expected, made.fix) == ("a", "b", "c", "d")
    for name in ("Exception", "annotations", "nothing", "ClassVar"):
        assert type(error_of(Failure(kind=name, doing="a"))) is StageError
    assert type(error_of(None)) is StageError


def test_only_a_run_with_workers_has_a_crew() -> None:
    assert crew() is None
    with crewed(None):
        assert crew() is None
    with crewed(ONE):
        found = crew()
        assert found is not None
        assert found.config == ONE
    assert crew() is None
