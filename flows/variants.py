"""Variants of a recipe, mapped over processes of this machine: each a flow run of its own, tried until it is known.

Prefect's threads hand them out, in the order of what they share, and try them again; the processes are
`modelpress.workers`', and each runs the line as a flow. Nothing is published, unless the best shall be in the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal
from uuid import UUID, uuid4

import httpx
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from prefect import Flow, State, Task, allow_failure, flow, runtime, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas import TaskRunResult
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.futures import as_completed
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Pending
from prefect.task_runners import ThreadPoolTaskRunner

from flows.line import Line, flow_run_tags, tracked_as
from flows.optimize import optimize
from flows.result import table
from flows.stages import run_stages
from flows.variants_shown import say, show
from flows.watch import watched
from modelpress.config import OptimizeConfig, VariantsConfig
from modelpress.config import Part as StageName
from modelpress.errors import (
    BudgetExceededError,
    ConfigError,
    ModelpressError,
    StageError,
    WorkerError,
    WorkloadError,
)
from modelpress.reduce import Ledger, Part, Variants, deal
from modelpress.reports import ArtifactRef, LatencyReport, TriedVariant, VariantsReport
from modelpress.settings import read_settings
from modelpress.variants import choose
from modelpress.variants.expand import Variant, expand, trial
from modelpress.variants.schedule import Step, schedule
from modelpress.workers.pool import Kind, Pool
from modelpress.workers.protocol import Asked
from registry import leftovers, runs, sources
from tasks.latency import time_graph
from tasks.packs import compress, pin_bases
from tasks.progress import StageProgress
from tasks.reaping import mark_ended
from tasks.restarts import on_crashed
from tasks.runner import RunContext
from tasks.slices import died, error_of

PROCESS = "flows.variant_process"
TAGS = ["modelpress", "variant"]


class VariantJob(Asked):
    """A flow run that a worker is to run."""

    kind: Literal["variant", "shared stages"]
    """A variant, or stages that several share."""
    flow_run: str
    """Its id; its parameters are on Prefect's server."""


class Trial(Line):
    """The line of a variant: what it came to, and no word in the name of what is published."""

    is_trial = True

    def __init__(self, config: OptimizeConfig, *given: Any) -> None:
        super().__init__(config, *given)
        self.key = f"{self.key}-variant"

    def show(self) -> None:
        """The stages without latencies: others computed beside."""
        if self.rows:
            rows = [row.model_copy(update={"latency": []}) for row in self.rows]
            create_table_artifact(table(rows), key=f"{self.key}-stages", description="Stages of a variant")

    def came_to(self, artifact: ArtifactRef) -> dict[str, Any]:
        """Fields of a `TriedVariant`, which MLflow hears, too."""
        quality = self.evaluations[self.served].quality
        numbers = {f"quality.{name}": value for name, value in quality.metrics().items()}
        self.run.metrics({"size_bytes": artifact.size_bytes, **numbers})
        return {
            "quality": quality,
            "size_bytes": artifact.size_bytes,
            "artifact": artifact,
            "graph": self.outputs[self.served],
            "source_graph": self.outputs["source (onnx)"],
        }


@flow(name="optimize-variant", flow_run_name="{label}")
def optimize_variant(
    config: OptimizeConfig,
    label: str,
    mlflow_run: str,
    number: int = 0,
    settings: dict[str, Any] | None = None,
    last: StageName | None = None,
) -> TriedVariant | None:
    """Run a variant's line up to the coded tensors, or stages that it shares with others; nothing is published.

    `optimize-variants` starts it, in processes of its own.

    Args:
        config: The variant's recipe.
        label: How it is shown.
        mlflow_run: Id of the run in MLflow that it belongs to.
        number: Of the variant.
        settings: What the variant sets.
        last: The stage to end with; null runs them all.

    Raises:
        BudgetExceededError: a stage's quality is over the recipe's budget.
    """
    began = time.perf_counter()
    with tracked_as(Trial, config, {MLFLOW_PARENT_RUN_ID: mlflow_run, "variant": label}) as line:
        for stage, output in run_stages(line, config):
            graph = output
            if stage == last:
                return None
        coded = line.passed("compress", compress(line.context, graph, config.compress))
        return TriedVariant(
            number=number,
            label=label,
            settings=settings or {},
            seconds=time.perf_counter() - began,
            mlflow_run=line.run.id,
            flow_run=str(runtime.flow_run.id),
            **line.came_to(coded.output),
        )


def end_variants(flow: Flow[..., object], flow_run: FlowRun, state: State) -> None:  # noqa: ARG001
    """A flow's hook: where the whole is cancelled, its processes end, and so do the flow runs that they ran."""
    with get_client(sync_client=True) as client:
        children = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run.id]))
        for child in client.read_flow_runs(flow_run_filter=children):
            if child.state is not None and not child.state.is_final():
                why = "the run that started it was cancelled"
                client.set_flow_run_state(child.id, Cancelled(message=why), force=True)


@flow(
    name="optimize-variants",
    flow_run_name="variants-{config.name}",
    on_cancellation=[end_variants],
    on_crashed=[on_crashed],
)
def optimize_variants(config: OptimizeConfig, variants: VariantsConfig) -> VariantsReport:
    """Try variants of a recipe over processes of this machine; say which no other beats, and which is the best.

    Each is tried until it is known and counts once; a process that dies costs the variant that it ran. What several
    share is computed once. Started again, it repeats no stage that was finished.

    Args:
        config: The recipe that they differ from.
        variants: Which there are, how they are tried, and which is wanted.

    Raises:
        ConfigError: a variant that is not legal, or not a variant; before anything runs.
        WorkerError: nothing is known of a variant, however often it was tried; all others are shown.
        BudgetExceededError: the best is to be published, and none is within the budgets.
    """
    settings = read_settings()
    config = config.model_copy(update={"workload": sources.pin(settings, config.workload)})
    found = [_pinned(one) for one in expand(config, variants)]
    given = {"recipe": config.model_dump(mode="json"), "variants": variants.model_dump(mode="json")}
    with ExitStack() as stack:
        stack.enter_context(watched(config.name))
        run = stack.enter_context(runs.parent_run(settings, config.name, given, flow_run_tags()))
        if runtime.flow_run.run_count > 1:
            why = f"flow run {runtime.flow_run.name} was started again"
            leftovers.end_earlier(run.client, run.experiment_id, str(runtime.flow_run.id), run.id, why)
        tried, lost = _try_all(found, variants, run)
        report = VariantsReport(
            name=config.name,
            asked=choose.budgets(config, variants),
            variants=tried,
            lost=lost,
            by_bytes=choose.by_bytes(tried),
            mlflow_url=runs.run_url(settings, run.id, run.experiment_id),
        )
        stack.callback(lambda: show(report, found, run))
        report = _timed(report, config, run)
        report = report.model_copy(
            update={
                "by_latency": choose.by_latency(report.variants),
                "best": choose.best(report.variants, report.asked),
            }
        )
        say(report)
        _check_known(report, found)
    return report.model_copy(update={"pack": _published(report, found)}) if variants.publish else report


@dataclass(frozen=True)
class Work:
    """A step, as it is handed to a process."""

    name: str
    """How it is shown."""
    kind: Literal["variant", "shared stages"]
    """Which of the two."""
    slice: int
    """Number of the variant; of shared stages, that of the first that needs them."""
    parameters: Mapping[str, Any]
    """Of the flow `optimize-variant`, as JSON values."""


@dataclass(frozen=True)
class Desk:
    """Who does the work, and where it is told."""

    pool: Pool
    """The processes."""
    of: str
    """Digest of all variants."""
    seconds: float | None
    """How long one may take; None: as long as it takes."""
    run: runs.Run
    """The run in MLflow that all belong to."""


@task(name="variant", task_run_name="{work.name}", cache_policy=NO_CACHE, retry_condition_fn=died)
def run_step(work: Work, desk: Desk) -> Part:
    """Do one step in a process; each attempt is a flow run of its own."""
    attempt = int(runtime.task_run.run_count or 1)
    if attempt > 1:
        get_run_logger().warning("%s: attempt %d", work.name, attempt)
    flow_run = _begun(work)
    job = VariantJob(kind=work.kind, of=desk.of, slice=work.slice, attempt=attempt, flow_run=str(flow_run))
    try:
        reply = desk.pool.run(job, desk.seconds)
    except WorkerError as error:
        _bury(flow_run, error, desk.run)
        raise
    if reply.part is None:
        raise error_of(reply.failure)
    return reply.part


def _pinned(variant: Variant) -> Variant:
    """What its aliases point at now holds for all attempts."""
    return Variant(variant.number, variant.settings, pin_bases(variant.recipe))


def _try_all(
    found: Sequence[Variant], config: VariantsConfig, run: runs.Run
) -> tuple[list[TriedVariant], dict[int, str]]:
    """Every variant, tried; and why nothing is known of some."""
    digests = [one.recipe.fingerprint() for one in found]
    ledger = Ledger(deal(sha256(json.dumps(digests).encode()).hexdigest(), len(found), len(found)), Variants)
    steps = schedule([one.recipe for one in found])
    with get_client(sync_client=True) as client:
        # One that Prefect started for this run is in no settings: processes would each start one of their own.
        server = {"PREFECT_API_URL": str(client.api_url).rstrip("/")}
    kind = Kind(PROCESS, server, too_slow="raise `seconds`, or leave out variants that take so long")
    lost: dict[int, str] = {}
    mapped: Any = run_step.with_options(retries=config.attempts - 1)
    # A thread for each: those that wait for others, or for a process, keep nobody from work.
    runner: ThreadPoolTaskRunner[Part] = ThreadPoolTaskRunner(max_workers=len(steps))
    with (
        StageProgress("variants") as progress,
        runner,
        Pool(config.workers, config.threads, kind) as pool,  # ends first: an interrupt waits for no variant
    ):
        desk = Desk(pool, ledger.cut.of, config.seconds or None, run)
        futures: list[Any] = []
        for step in steps:
            before: list[Any] = [allow_failure(futures[step.after])] if step.after is not None else []
            parameters = {"work": _work(step, found, run), "desk": desk}
            futures.append(runner.submit(mapped, parameters, wait_for=before))
        places = {future.task_run_id: place for place, future in enumerate(futures)}
        for done, future in enumerate(as_completed(futures), start=1):
            step = steps[places[future.task_run_id]]
            progress(done, len(steps), f"{done} of {len(steps)} runs")
            if step.last is None:
                _note(found[step.variants[0]], future.result(raise_on_failure=False), ledger, lost)
    if len(lost) == len(found):
        return [], lost
    reduced = ledger.reduce(partial=True).value
    return [reduced.tried[number] for number in sorted(reduced.tried)], lost


def _work(step: Step, found: Sequence[Variant], run: runs.Run) -> Work:
    first = found[step.variants[0]]
    shared = f"{first.recipe.name}: up to {step.last}, for {len(step.variants)}"
    name = f"{first.recipe.name}: {first.label}" if step.last is None else shared
    parameters = {
        "config": trial(first.recipe).model_dump(mode="json"),
        "label": first.label if step.last is None else shared,
        "mlflow_run": run.id,
        "number": first.number,
        "settings": dict(first.settings),
        "last": step.last,
    }
    return Work(name, "variant" if step.last is None else "shared stages", first.number, parameters)


def _note(variant: Variant, outcome: object, ledger: Ledger[Variants], lost: dict[int, str]) -> None:
    """What became of a variant: its result, why it has none of its own doing, or that it was lost."""
    own = isinstance(outcome, StageError | WorkloadError | ConfigError) and not isinstance(outcome, WorkerError)
    if isinstance(outcome, Part):
        ledger.add(outcome)
    elif own and isinstance(outcome, ModelpressError):
        why = f"{type(outcome).__name__}: {outcome}"
        stopped = TriedVariant(number=variant.number, label=variant.label, settings=dict(variant.settings), stopped=why)
        value = Variants(tried={variant.number: stopped})
        ledger.add(Part(of=ledger.cut.of, slice=variant.number, attempt=1, value=value))
    else:
        lost[variant.number] = f"{type(outcome).__name__}: {outcome}"


def _begun(work: Work) -> UUID:
    """A flow run for an attempt, which Prefect shows below this task run; its id."""
    above: dict[str, list[Any]] = {"__parents__": [TaskRunResult(id=UUID(str(runtime.task_run.id)))]}
    name = str(work.parameters["label"])
    with get_client(sync_client=True) as client:
        place = client.create_task_run(
            Task(fn=optimize_variant.fn, name="optimize-variant"),
            flow_run_id=UUID(str(runtime.flow_run.id)),
            dynamic_key=str(uuid4()),
            name=name,
            state=Pending(),
            task_inputs=above,
        )
        made = client.create_flow_run(
            optimize_variant, name=name, parameters=dict(work.parameters), tags=TAGS, parent_task_run_id=place.id
        )
    return made.id


def _bury(flow_run: UUID, error: WorkerError, run: runs.Run) -> None:
    """Say of a flow run whose process died that it crashed, in Prefect and in MLflow."""
    why = f"its process is lost: {error.found}"
    try:
        with get_client(sync_client=True) as client:
            mark_ended(client, client.read_flow_run(flow_run), why, by="The run that started it")
    except httpx.HTTPError as failed:
        get_run_logger().warning("%s crashed, which Prefect's server could not be told: %s", flow_run, failed)
    leftovers.end_earlier(run.client, run.experiment_id, str(flow_run), "", why)


def _timed(report: VariantsReport, config: OptimizeConfig, run: runs.Run) -> VariantsReport:
    """The report with latencies, measured one after the other: the processes have ended."""
    told = read_settings().reports_to_mlflow(encrypted=config.upload.encrypt)
    context = RunContext(name=config.name, mlflow_run=run.id, workload=config.workload, gpu=config.gpu, reports=told)

    def timed(graph: ArtifactRef, label: str) -> list[LatencyReport]:
        return time_graph(context, graph, config.evaluate, label).report.latency

    ended = [one for one in report.variants if one.graph is not None]
    if not ended or ended[0].source_graph is None:
        return report
    source, rows = ended[0].source_graph, []
    source_latency = timed(source, "latency-source")
    for one in report.variants:
        latency = timed(one.graph, f"latency-{one.number}") if one.graph is not None else []
        if latency and one.mlflow_run is not None:
            numbers = {f"latency.b{row.batch_size}.p50_seconds": row.p50_seconds for row in latency}
            runs.Run(run.client, one.mlflow_run, run.experiment_id).metrics(numbers)
        rows.append(one.model_copy(update={"latency": latency}))
    return report.model_copy(
        update={"variants": rows, "source_latency": source_latency, "source_bytes": source.size_bytes}
    )


def _check_known(report: VariantsReport, found: Sequence[Variant]) -> None:
    if report.lost:
        first = min(report.lost)
        raise WorkerError(
            f"trying {len(found)} variants of {report.name!r}",
            found=f"nothing of {len(report.lost)} of them, the first of which is {found[first].label}: "
            f"{report.lost[first]}",
            expected="to know each",
            fix=f"mend that and start it again: finished stages are taken. The others stand in {report.mlflow_url}",
        )


def _published(report: VariantsReport, found: Sequence[Variant]) -> str:
    """The digest of the best's pack."""
    if report.best is None:
        raise BudgetExceededError(
            f"choosing the best of {len(found)} variants of {report.name!r}",
            found="none within the budgets",
            expected=f"one; asked was {report.asked.model_dump(exclude_none=True)}",
            fix=f"look at {report.mlflow_url}, then widen a budget or add variants; nothing was published",
        )
    return optimize(found[report.best].recipe).pack
