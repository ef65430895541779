"""Slices of a stage's work, mapped over worker processes: each a task run of Prefect's, with its attempts.

Prefect's threads hand the slices out and try them again; the processes are `modelpress.workers`'. What a slice said is
recorded in the work store, as a stage's output is: a run that is started again takes what is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, cast

from prefect import State, Task, runtime, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.futures import as_completed
from prefect.logging import get_run_logger
from prefect.task_runners import ThreadPoolTaskRunner

from modelpress import errors
from modelpress.config import WorkersConfig
from modelpress.errors import ModelpressError, StageError, WorkerError
from modelpress.progress import Progress
from modelpress.reports import ArtifactRef, Report
from modelpress.settings import read_settings
from modelpress.store.artifacts import save_artifact
from modelpress.store.base import open_store
from tasks.records import Record, find_record, read_report, save_record, stage_key
from tasks.runner import RunContext, find_source, open_workload

if TYPE_CHECKING:
    from onnx import ModelProto

    from modelpress.evaluate import Answered
    from modelpress.plan import Survey
    from modelpress.reduce import ByName, Part, Partial
    from modelpress.reduce.partials import PartialT
    from modelpress.workers.pool import Pool
    from modelpress.workers.protocol import Failure, Job

SLICES_PER_WORKER = 4


@dataclass(frozen=True)
class Crew:
    """The workers of a run."""

    config: WorkersConfig
    """How many, and how patient."""
    pool: Pool
    """Asks them."""


_crew: ContextVar[Crew | None] = ContextVar("crew", default=None)


class Recorded(Report):
    """A slice's result, as it is recorded."""

    part: dict[str, Any]
    """The `modelpress.reduce.Part`, as JSON."""


@contextmanager
def crewed(config: WorkersConfig | None) -> Iterator[None]:
    """Within, stages find their workers; they are started when the first slice comes, and end here."""
    if config is None:
        yield
        return
    from modelpress.workers.pool import Pool

    with Pool(config.count, config.threads) as pool:
        token = _crew.set(Crew(config, pool))
        try:
            yield
        finally:
            _crew.reset(token)


def crew() -> Crew | None:
    """The workers of this run; None: it has none."""
    return _crew.get()


def answers(on: Crew, context: RunContext, model: ArtifactRef, progress: Progress) -> Answered:
    """What a model says of the evaluation split, asked in slices.

    Raises:
        WorkerError: a slice's workers died, or took too long, as often as it was tried.
        And what the library raises for the model and the data.
    """
    from modelpress import sliced
    from modelpress.reduce import Answers

    marks = sliced.marks(open_workload(context.workload, context.mlflow_run))
    of = _digest("answers", model.sha256, [mark.inputs_sha256 for mark in marks])
    costs = [float(mark.elements) for mark in marks]
    found = _mapped(on, context, model, {"kind": "answers", "of": of}, costs, Answers, progress)
    return sliced.put_together(found, marks)


def sensitivities(on: Crew, context: RunContext, graph: ArtifactRef, work: Survey, progress: Progress) -> None:
    """Fill a plan's survey with what can be measured unit by unit; raises what `answers` does."""
    from modelpress.plan import sliced
    from modelpress.reduce import Sensitivities

    units, coding = sliced.units(work), work.compression.fingerprint() if work.compression else None
    of = _digest("sensitivities", graph.sha256, units, work.config.fingerprint(), coding)
    asked = {"kind": "sensitivities", "of": of, "plan": work.config, "compress": work.compression}
    sliced.take(work, _mapped(on, context, graph, asked, sliced.costs(work), Sensitivities, progress))


def front(
    on: Crew,
    context: RunContext,
    graph: ArtifactRef,
    work: Survey,
    progress: Progress,
    choices: Sequence[tuple[int, ...]],
) -> list[tuple[int, float]]:
    """Coded bytes and disagreement of points of a plan's front; raises what `answers` does."""
    from modelpress.reduce import Points

    if not choices:
        return []
    coding = work.compression.fingerprint() if work.compression else None
    asked = {"kind": "points", "choices": choices, "plan": work.config, "compress": work.compression}
    of = _digest("points", graph.sha256, choices, work.config.fingerprint(), coding)
    found = _mapped(on, context, graph, {**asked, "of": of}, [1.0] * len(choices), Points, progress).points
    return [found[number] for number in range(len(choices))]


class Observing:
    """A `modelpress.quantize.ranges.Observer` whose workers run a slice of the calibration batches each.

    Args:
        on: the workers.
        context: of the run.
        progress: told of each slice.
    """

    def __init__(self, on: Crew, context: RunContext, progress: Progress) -> None:
        from modelpress.quantize import calibration_batches

        self._on, self._context, self._progress = on, context, progress
        batches = calibration_batches(open_workload(context.workload, context.mlflow_run))
        self._costs = [float(sum(tensor.numel() for tensor in batch.values())) for batch in batches]

    def extremes(self, model: ModelProto, values: Sequence[str]) -> ByName:
        """See `Observer`; raises what `answers` does."""
        return self._ask(model, {"kind": "extremes", "values": list(values)})

    def histograms(self, model: ModelProto, edges: Mapping[str, tuple[float, float]]) -> ByName:
        """See `Observer`; raises what `answers` does."""
        return self._ask(model, {"kind": "histograms", "edges": dict(edges)})

    def _ask(self, model: ModelProto, asked: Mapping[str, Any]) -> ByName:
        from modelpress import graph
        from modelpress.reduce import ByName

        settings = read_settings()
        ref = save_artifact(open_store(settings.work_uri, settings), graph.split(model).to_bytes())
        job = {**asked, "of": _digest(ref.sha256, len(self._costs), asked)}
        return _mapped(self._on, self._context, ref, job, self._costs, ByName, self._progress)


def _digest(*parts: object) -> str:
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _mapped(
    on: Crew,
    context: RunContext,
    model: ArtifactRef,
    asked: Mapping[str, Any],
    costs: Sequence[float],
    kind: type[PartialT],
    progress: Progress,
) -> PartialT:
    """Cut units of these costs into slices, do all of them, and merge what they say."""
    from modelpress.reduce import Ledger, deal_by_cost
    from modelpress.workers.protocol import Job

    settings = read_settings()
    identity = open_workload(context.workload, context.mlflow_run).identity()
    found = find_source(context.workload)
    workload = context.workload.model_copy(update={"model": str(found.folder)}) if found else context.workload
    same = {**asked, "model": model, "workload": workload, "store": settings.work_uri, "run": context.mlflow_run}
    slices = on.config.slices or SLICES_PER_WORKER * on.config.count
    ledger: Ledger[PartialT] = Ledger(deal_by_cost(asked["of"], costs, slices, on.config.seed), kind)
    jobs = [Job.model_validate({**same, "slice": one, "units": of}) for one, of in enumerate(ledger.cut.slices)]
    mapped = run_slice.with_options(retries=on.config.attempts - 1)
    runner: ThreadPoolTaskRunner[Part] = ThreadPoolTaskRunner(max_workers=on.config.count)
    with runner:
        futures = runner.map(mapped, {"job": jobs, "identity": unmapped(identity), "on": unmapped(on)})
        for done, future in enumerate(as_completed(futures), start=1):
            ledger.add(cast("Part", future.result()))
            progress(done, len(jobs), f"{asked['kind']}: {done} of {len(jobs)} slices")
    return ledger.reduce().value


def died(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Only what another process may do better is tried again."""
    return isinstance(state.data, WorkerError) or isinstance(getattr(state.data, "result", None), WorkerError)


@task(name="slice", task_run_name="{job.kind}-{job.slice}", cache_policy=NO_CACHE, retry_condition_fn=died)
def run_slice(job: Job, identity: str, on: Crew) -> Part:
    """Do one slice in a worker, or take what an earlier attempt or run recorded of it."""
    from modelpress.reduce import Part

    settings = read_settings()
    store = open_store(settings.work_uri, settings)
    stage = f"slice-{job.kind}"
    extra = {"of": job.of, "units": job.units, "threads": on.pool.threads}
    key = stage_key(stage, inputs=[job.model], config="", identity=identity, extra=extra)
    earlier = find_record(store, stage, key) if settings.reuse else None
    if earlier is not None:
        recorded = Part.model_validate(read_report(store, earlier, Recorded).part)
        return recorded.model_copy(update={"slice": job.slice})
    attempt = int(runtime.task_run.run_count or 1)
    if attempt > 1:
        get_run_logger().warning("slice %d of %s: attempt %d", job.slice, job.kind, attempt)
    reply = on.pool.run(job.model_copy(update={"attempt": attempt}), on.config.slice_seconds or None)
    if reply.part is None:
        raise error_of(reply.failure)
    outputs = {f"output-{number}": ref for number, ref in enumerate(_files(reply.part.value))}
    report = {"part": reply.part.model_dump(mode="json")}
    save_record(
        store,
        Record(stage=stage, key=key, outputs=outputs, report=report, seconds=reply.seconds),
        replace=not settings.reuse,
    )
    return reply.part


def _files(value: Partial) -> Sequence[ArtifactRef]:
    """What a result names in the work store: a record without them is none."""
    from modelpress.reduce import Answers

    if not isinstance(value, Answers):
        return []
    return list({piece.file.sha256: piece.file for piece in value.pieces.values()}.values())


def error_of(failure: Failure | None) -> ModelpressError:
    """The worker's error, as it would have been raised here."""
    if failure is None:
        return StageError("reading a worker's reply", found="neither a result nor an error", expected="one of the two")
    kind = getattr(errors, failure.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, ModelpressError)):
        kind = StageError
    return kind(failure.doing, found=failure.found, expected=failure.expected, fix=failure.fix)
