"""Real worker processes: what they say is what one process says, and one that dies takes only its slice along."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from modelpress import graph, sliced
from modelpress.checkpoint import Checkpoint, from_module
from modelpress.config import CompressConfig, ExportConfig, PlanConfig, WorkloadConfig
from modelpress.cores import cores
from modelpress.errors import WorkerError
from modelpress.evaluate import running
from modelpress.export import export
from modelpress.plan import opened
from modelpress.plan.sliced import measure_units
from modelpress.quantize import calibration_batches, ranges
from modelpress.reduce import Answers, Ledger, deal
from modelpress.store.artifacts import save_artifact
from modelpress.store.base import open_store
from modelpress.workers.pool import Pool, Worker
from modelpress.workers.protocol import Job
from tests.toys import ImageToy

SAMPLES = 300
WORKLOAD = WorkloadConfig(kind="custom", factory="tests.toys:ImageToy", options={"samples": SAMPLES})


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2, threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def toy() -> ImageToy:
    return ImageToy(samples=SAMPLES)


@pytest.fixture
def job(tmp_path: Path, toy: ImageToy) -> Job:
    store = open_store(str(tmp_path))
    model = save_artifact(store, from_module(toy.module).to_bytes())
    return Job(
        kind="answers", of="work", slice=0, units=[0, 2], model=model, workload=WORKLOAD, store=store.uri, run="run"
    )


def answered(checkpoint: Checkpoint, toy: ImageToy) -> np.ndarray:
    """What one process says."""
    with running(checkpoint, toy, "CPUExecutionProvider", 1) as run:
        return np.concatenate(
            [toy.condense(run(batch.inputs), batch) for batch in toy.batches("evaluation", toy.evaluation_batch_size)]
        )


def test_slices_are_the_one_process_answers_also_where_a_worker_was_killed(pool: Pool, job: Job, toy: ImageToy) -> None:
    marks = sliced.marks(toy)
    assert [mark.samples for mark in marks] == [64, 64, 64, 64, 44]
    ledger = Ledger(deal("work", len(marks), 3, seed=0), Answers)
    for number, units in enumerate(ledger.cut.slices):
        one = job.model_copy(update={"slice": number, "units": units})
        if number == 1:
            with pytest.raises(WorkerError, match="signal 9"):
                pool.run(one, began=lambda pid: os.kill(pid, signal.SIGKILL))
            one = one.model_copy(update={"attempt": 2})
        reply = pool.run(one)
        assert reply.part is not None
        ledger.add(reply.part)
        ledger.add(reply.part)
    found = sliced.put_together(ledger.reduce().value, marks)
    expected = answered(from_module(toy.module), toy)
    assert found.outputs.dtype == expected.dtype
    assert found.outputs.tobytes() == expected.tobytes()


def test_a_slice_that_takes_too_long_costs_its_worker_and_no_more(pool: Pool, job: Job) -> None:
    pids: list[int] = []
    pool.run(job, began=pids.append)
    with pytest.raises(WorkerError, match="no result after 1 s"):
        pool.run(job, 1.0, began=lambda pid: os.kill(pid, signal.SIGSTOP))
    reply = pool.run(job, began=pids.append)
    assert reply.part is not None
    assert pids[0] != pids[1]
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_an_error_of_the_library_comes_back_and_the_worker_goes_on(pool: Pool, job: Job) -> None:
    pids: list[int] = []
    failure = pool.run(job.model_copy(update={"units": [0, 99]}), began=pids.append).failure
    assert failure is not None
    assert (failure.kind, failure.found) == ("WorkloadError", "no batch 99")
    assert pool.run(job, began=pids.append).part is not None
    failure = pool.run(
        job.model_copy(update={"kind": "sensitivities", "plan": PlanConfig()}), began=pids.append
    ).failure
    assert failure is not None
    assert failure.kind == "CorruptionError"
    assert len(set(pids)) == 1


def test_a_graph_is_observed_and_measured_as_in_one_process(pool: Pool, job: Job, toy: ImageToy) -> None:
    """Which here has all cores, and there one."""
    exported, _ = export(toy.module, toy, ExportConfig())
    given = job.model_copy(update={"model": save_artifact(open_store(job.store), exported.to_bytes())})
    model = graph.join(exported)
    values, some = [model.graph.node[-1].output[0], model.graph.node[0].output[0]], calibration_batches(toy)[1:3]

    def asked(**what: object) -> object:
        reply = pool.run(given.model_copy(update={"units": [1, 2], **what}))
        assert reply.part is not None, reply.failure
        return reply.part.value

    assert asked(kind="extremes", values=values) == ranges.extremes(model, values, some)
    edges = dict.fromkeys(values, (-1.0, 1.0))
    assert asked(kind="histograms", edges=edges) == ranges.histograms(model, edges, some)
    config = PlanConfig(num_bits=[8, 4], group_sizes=[], scales=["channel"])
    work = opened(exported, toy, config, CompressConfig())
    expected = measure_units(work, [1, 2])
    assert asked(kind="sensitivities", plan=config, compress=CompressConfig()) == expected


def test_a_worker_has_its_cores_and_ends_with_its_parent(job: Job) -> None:
    worker = Worker(cores()[:1])
    assert worker.ask(job).part is not None
    assert os.sched_getaffinity(worker.pid) == set(cores()[:1])
    assert worker._process.stdin is not None
    worker._process.stdin.close()  # as the kernel does for a parent that was killed
    assert worker._process.wait(60) == 0
    assert not worker.is_alive
    worker.stop()


def test_cores_are_shared_out() -> None:
    usable = cores()
    seats = [seat.cores for seat in Pool(2)._seats]
    assert all(len(seat) == max(1, len(usable) // 2) for seat in seats)
    if len(usable) >= 2:
        assert not set(seats[0]) & set(seats[1])
    assert [len(seat.cores) for seat in Pool(len(usable) + 1)._seats] == [1] * (len(usable) + 1)


def test_who_asks_a_pool_that_has_ended_starts_no_process(job: Job) -> None:
    ended = Pool(1, threads=1)
    ended.close()
    with pytest.raises(WorkerError, match="told to end"):
        ended.run(job, began=lambda pid: pytest.fail(f"process {pid} was started"))
