"""Slices over worker processes: what a second worker gains, what a slice costs, and what is lost with a worker.

Each worker has one core and one thread. Times are of workers that are up and hold the model; what they take to get
there stands beside. With one worker all of the run has one core, the parent's own steps included: else what no worker
does, as a search's measurements of whole plans, would have two cores in both runs, and the gain would be that of the
slices alone. `no workers` is one process with a thread for each core. Answers and plans must be those of one process,
bit by bit, or the benchmark fails.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks._encoder import encoder_config
from benchmarks._report import Row, main
from benchmarks._servers import QUIET, prefect_server
from modelpress import sliced
from modelpress.checkpoint import Checkpoint
from modelpress.config import CompressConfig, ExportConfig, PlanConfig, WorkloadConfig
from modelpress.errors import WorkerError
from modelpress.evaluate import running
from modelpress.export import export
from modelpress.plan import measured, opened, plan, settle
from modelpress.plan import sliced as plan_slices
from modelpress.reduce import Answers, Cut, Ledger, Part, Points, Sensitivities, deal_by_cost
from modelpress.reduce.partials import PartialT
from modelpress.store.artifacts import save_artifact
from modelpress.store.base import open_store
from modelpress.workers.pool import Pool
from modelpress.workers.protocol import Job
from modelpress.workload import Workload, load_workload

SLICES = 8
"""As a run has them with two workers."""
COUNTS = (1, 2)
CODING = CompressConfig()

CHILD = """
import json, sys, time
from pathlib import Path
from prefect import flow
from modelpress.checkpoint import from_module
from modelpress.config import WorkersConfig, WorkloadConfig
from modelpress.progress import silent
from modelpress.settings import read_settings
from modelpress.store.artifacts import save_artifact
from modelpress.store.base import open_store
from modelpress.workload import load_workload
from tasks import slices
from tasks.runner import RunContext

SLICES = int(sys.argv[1])
workload = WorkloadConfig(kind="custom", factory="benchmarks.parallel._tiny:Tiny", options={"samples": SLICES})

@flow
def overhead():
    settings = read_settings()
    context = RunContext(name="overhead", mlflow_run="overhead", workload=workload)
    module = load_workload(workload).source()
    model = save_artifact(open_store(settings.work_uri, settings), from_module(module).to_bytes())
    times = []
    with slices.crewed(WorkersConfig(count=2, threads=1, slices=SLICES)):
        for _ in range(2):
            before = time.perf_counter()
            slices.answers(slices.crew(), context, model, silent)
            times.append(time.perf_counter() - before)
    print("TIMES", json.dumps(times))

overhead()
"""


@dataclass(frozen=True)
class _Case:
    """What is sliced."""

    job: Job
    workload: Workload
    graph: Checkpoint
    folder: Path


def measure(quick: bool) -> Iterable[Row]:
    """Rows of an evaluation, of a plan's search, of the overhead, and of killed workers."""
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        case = _case(encoder_config(calibration=64, evaluation=64 if quick else 1024), Path(folder))
        yield from _evaluation(case)
        yield from _search(case, quick)
        yield from _killed(case)
    yield from _given_up()
    yield from _overhead(8 if quick else 64)


def _case(config: WorkloadConfig, folder: Path) -> _Case:
    workload = load_workload(config)
    graph, _ = export(workload.source(), workload, ExportConfig())
    store = open_store(str(folder))
    model = save_artifact(store, graph.to_bytes())
    job = Job(kind="answers", of="", slice=0, units=[0], model=model, workload=config, store=store.uri, run="benchmark")
    return _Case(job, workload, graph, folder)


def _mapped(pool: Pool, job: Job, cut: Cut, one: Callable[[Pool, Job], Part]) -> tuple[list[Part], float]:
    """All slices of a cut over the pool's workers, and the seconds that it took."""
    jobs = [
        job.model_copy(update={"of": cut.of, "slice": number, "units": units})
        for number, units in enumerate(cut.slices)
    ]
    started = time.perf_counter()
    with ThreadPoolExecutor(pool.count) as threads:
        parts = list(threads.map(lambda each: one(pool, each), jobs))
    return parts, time.perf_counter() - started


def _run(pool: Pool, job: Job) -> Part:
    reply = pool.run(job)
    if reply.part is None:
        raise RuntimeError(f"slice {job.slice} failed: {reply.failure}")
    return reply.part


def _warm(pool: Pool, job: Job) -> float:
    """Let each worker load what it needs; seconds."""
    started = time.perf_counter()
    barrier = threading.Barrier(pool.count)

    def load(_: int) -> None:
        pool.run(job, began=lambda _: barrier.wait())  # each thread has a worker before one begins

    with ThreadPoolExecutor(pool.count) as threads:
        list(threads.map(load, range(pool.count)))
    return time.perf_counter() - started


@contextmanager
def _on_cores(count: int) -> Iterator[None]:
    """Give all threads of this process, and what it starts, so many of its cores."""
    before = os.sched_getaffinity(0)
    _move(set(sorted(before)[:count]))
    try:
        yield
    finally:
        _move(before)


def _move(cores: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)


def _evaluation(case: _Case) -> Iterator[Row]:
    marks = sliced.marks(case.workload)
    cut = deal_by_cost("evaluation", [mark.elements for mark in marks], SLICES)
    with running(case.graph, case.workload, "CPUExecutionProvider", 0) as run:
        sliced.answer_batches(run, case.workload, [0])
        started = time.perf_counter()
        expected = sliced.answer_batches(run, case.workload, range(len(marks)))
        yield Row("evaluation of MiniLM", "no workers", "slices", "s", time.perf_counter() - started)
    whole = np.concatenate([expected[number].outputs for number in range(len(marks))])
    seconds: dict[int, float] = {}
    for count in COUNTS:
        with _on_cores(count), Pool(count, threads=1) as pool:
            start = _warm(pool, case.job)
            parts, seconds[count] = _mapped(pool, case.job, cut, _run)
        if sliced.put_together(_merged(cut, parts, Answers), marks).outputs.tobytes() != whole.tobytes():
            raise RuntimeError("slices gave other answers than one process")
        yield Row("evaluation of MiniLM", f"{count} workers", "start", "s", start)
        yield Row("evaluation of MiniLM", f"{count} workers", "slices", "s", seconds[count])
    yield Row("evaluation of MiniLM", "2 workers", "speed-up", "×", seconds[1] / seconds[2])


def _search(case: _Case, quick: bool) -> Iterator[Row]:
    bits = [8, 4] if quick else [8, 6, 4]
    config = PlanConfig(num_bits=bits, sparsity=[0.0], points=2 if quick else 4)
    job = case.job.model_copy(update={"kind": "sensitivities", "plan": config, "compress": CODING})
    seconds: dict[int, float] = {}
    whole: dict[int, float] = {}
    plans = set()
    started = time.perf_counter()
    alone, _ = plan(case.graph, case.workload, config, CODING)
    yield Row("plan of MiniLM", "no workers", "whole search", "s", time.perf_counter() - started)
    plans.add(alone.to_bytes())
    for count in COUNTS:
        with _on_cores(count), Pool(count, threads=1) as pool:
            start = _warm(pool, job)
            made, seconds[count], whole[count] = _searched(case, pool, job, config)
        plans.add(made.to_bytes())
        for metric, value in (("start", start), ("slices", seconds[count]), ("whole search", whole[count])):
            yield Row("plan of MiniLM", f"{count} workers", metric, "s", value)
    if len(plans) != 1:
        raise RuntimeError("workers found another plan than one process")
    yield Row("plan of MiniLM", "2 workers", "speed-up of the slices", "×", seconds[1] / seconds[2])
    yield Row("plan of MiniLM", "2 workers", "speed-up of the whole search", "×", whole[1] / whole[2])


def _searched(case: _Case, pool: Pool, job: Job, config: PlanConfig) -> tuple[Checkpoint, float, float]:
    """The plan, the seconds of its slices, and of the whole search."""
    started, sliced_seconds = time.perf_counter(), 0.0

    def front(choices: Sequence[tuple[int, ...]]) -> list[tuple[int, float]]:
        nonlocal sliced_seconds
        asked = job.model_copy(update={"kind": "points", "choices": [list(choice) for choice in choices]})
        cut = deal_by_cost("front", [1.0] * len(choices), SLICES)
        parts, spent = _mapped(pool, asked, cut, _run)
        sliced_seconds += spent
        points = _merged(cut, parts, Points).points
        return [points[number] for number in range(len(choices))]

    work = opened(case.graph, case.workload, config, CODING)
    cut = deal_by_cost("search", plan_slices.costs(work), SLICES)
    parts, spent = _mapped(pool, job, cut, _run)
    sliced_seconds += spent
    plan_slices.take(work, _merged(cut, parts, Sensitivities))
    made, _ = settle(measured(work), config.max_disagreement, measure_front=front)
    return made, sliced_seconds, time.perf_counter() - started


def _merged(cut: Cut, parts: Iterable[Part], kind: type[PartialT]) -> PartialT:
    ledger = Ledger(cut, kind)
    for part in parts:
        ledger.add(part)
    return ledger.reduce().value


def _killed(case: _Case) -> Iterator[Row]:
    """An evaluation of which one worker is killed in the middle of a slice."""
    marks = sliced.marks(case.workload)
    cut = deal_by_cost("killed", [mark.elements for mark in marks], SLICES)
    with Pool(2, threads=1) as pool:
        _warm(pool, case.job)
        _, undisturbed = _mapped(pool, case.job, cut, _run)
        slice_seconds = undisturbed * 2 / len(cut.slices)
        victim = cut.slices[len(cut.slices) // 2]
        attempts: list[int] = []

        def one(pool: Pool, job: Job) -> Part:
            def began(pid: int) -> None:
                if job.units == victim and not attempts:
                    attempts.append(pid)
                    threading.Timer(slice_seconds / 2, os.kill, (pid, signal.SIGKILL)).start()

            try:
                reply = pool.run(job, began=began)
            except WorkerError:
                return _run(pool, job.model_copy(update={"attempt": 2}))
            if reply.part is None:
                raise RuntimeError(f"slice {job.slice} failed: {reply.failure}")
            return reply.part

        again, disturbed = _mapped(pool, case.job, cut, one)
    lost = sum(part.attempt > 1 for part in again)
    for metric, unit, value in (
        ("undisturbed", "s", undisturbed),
        ("with a killed worker", "s", disturbed),
        ("lost", "s", disturbed - undisturbed),
        ("slices done twice", "1", lost),
    ):
        yield Row("a worker is killed", "modelpress", metric, unit, float(value))


def _nap(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def _given_up() -> Iterator[Row]:
    """What a pool of concurrent.futures, which Prefect's ProcessPoolTaskRunner is, gives up with one of two workers."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        first = pool.submit(_nap, 0.1).result()
        futures: list[Future[int]] = [pool.submit(_nap, 1.0) for _ in range(SLICES)]
        time.sleep(0.3)
        os.kill(first, signal.SIGKILL)
        given_up = sum(isinstance(future.exception(), BrokenProcessPool) for future in futures)
    yield Row("a worker is killed", "concurrent.futures", "slices done twice", "1", float(given_up))


def _overhead(slices: int) -> Iterator[Row]:
    """A flow of slices with nearly nothing to do."""
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder, prefect_server(Path(folder)) as url:
        environment = {**os.environ, **QUIET, "PREFECT_HOME": folder, "MODELPRESS_HOME": folder, "PREFECT_API_URL": url}
        environment["MODELPRESS_REUSE"] = "false"  # else the second time nothing is done
        command = [sys.executable, "-c", CHILD, str(slices)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("TIMES ")), None)
    if line is None:
        raise RuntimeError(f"the flow of slices failed:\n{done.stderr[-3000:]}")
    first, warm = json.loads(line.removeprefix("TIMES "))
    case = f"{slices} slices with nothing to do, by Prefect over 2 workers"
    yield Row(case, "modelpress", "first, with the workers' start", "s", first)
    yield Row(case, "modelpress", "a slice", "ms", 1000 * warm / slices)


if __name__ == "__main__":
    main("parallel.tasks", measure)
