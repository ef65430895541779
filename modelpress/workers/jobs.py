"""What a worker can do, and what it keeps from one job to the next: the data, and the model as it was last run."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import safetensors.numpy

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import PlanConfig
from modelpress.errors import ConfigError, WorkloadError
from modelpress.evaluate import PeakMemory, Runner, running
from modelpress.plan.sliced import measure_points, measure_units
from modelpress.plan.smallest import opened
from modelpress.plan.survey import Survey
from modelpress.quantize import calibration_batches, ranges
from modelpress.reduce import Answers, AnyPartial, ByName, Part, Piece, Points, Sensitivities
from modelpress.reports import ArtifactRef
from modelpress.settings import read_settings
from modelpress.sliced import answer_batches
from modelpress.store.artifacts import load_artifact, save_artifact
from modelpress.store.base import open_store
from modelpress.workers.protocol import Job
from modelpress.workload import Workload, load_workload


class Bench:
    """Does jobs one after the other."""

    def __init__(self) -> None:
        self._workload: tuple[tuple[str, str], Workload] | None = None
        self._runner: tuple[tuple[str, ...], Runner] | None = None
        self._open = ExitStack()
        self._survey: tuple[tuple[str, ...], Survey] | None = None

    def do(self, job: Job) -> Part:
        """A job's result.

        Raises:
            ModelpressError: what the library raises for its model, data or config.
        """
        if job.kind == "answers":
            value: AnyPartial = self._answers(job)
        elif job.kind in ("sensitivities", "points"):
            value = self._planned(job)
        else:
            value = self._observed(job)
        return Part(of=job.of, slice=job.slice, attempt=job.attempt, value=value)

    def _answers(self, job: Job) -> Answers:
        with PeakMemory() as memory:
            workload = self._data(job)
            found = answer_batches(self._running(job, workload), workload, job.units)
        tensors = {str(number): np.ascontiguousarray(answered.outputs) for number, answered in found.items()}
        store = open_store(job.store, read_settings())
        file = save_artifact(store, safetensors.numpy.save(tensors))
        pieces = {
            number: Piece(samples=answered.samples, inputs_sha256=answered.inputs_sha256, file=file)
            for number, answered in found.items()
        }
        return Answers(pieces=pieces, peak_memory_bytes=memory.peak_bytes)

    def _planned(self, job: Job) -> Sensitivities | Points:
        if job.plan is None:
            raise ConfigError("measuring a slice of a plan", found="no plan's config", expected="one in the job")
        work = self._surveyed(job, job.plan)
        if job.kind == "points":
            return measure_points(work, job.choices, job.units)
        return measure_units(work, job.units)

    def _observed(self, job: Job) -> ByName:
        workload = self._data(job)
        model, batches = graph.join(_checkpoint(job.model)), calibration_batches(workload)
        beyond = [number for number in job.units if number >= len(batches)]
        if beyond:
            raise WorkloadError(
                "calibrating on a slice of the calibration split",
                found=f"no batch {beyond[0]} of {len(batches)}",
                expected="the batches that there were when the work was cut",
                fix="the data must not change while a run reads it",
            )
        some = [batches[number] for number in job.units]
        if job.kind == "extremes":
            return ranges.extremes(model, job.values, some)
        return ranges.histograms(model, job.edges, some)

    def _data(self, job: Job) -> Workload:
        key = (job.run, job.workload.model_dump_json())
        if self._workload is None or self._workload[0] != key:
            self._forget()
            self._workload = key, load_workload(job.workload)
        return self._workload[1]

    def _running(self, job: Job, workload: Workload) -> Runner:
        key = (job.run, job.workload.model_dump_json(), job.model.sha256)
        if self._runner is None or self._runner[0] != key:
            self._forget()
            run = self._open.enter_context(running(_checkpoint(job.model), workload, "CPUExecutionProvider", 0))
            self._runner = key, run
        return self._runner[1]

    def _surveyed(self, job: Job, config: PlanConfig) -> Survey:
        coding = job.compress.fingerprint() if job.compress else ""
        key = (job.run, job.workload.model_dump_json(), job.model.sha256, config.fingerprint(), coding)
        if self._survey is None or self._survey[0] != key:
            workload = self._data(job)
            self._forget()
            self._survey = key, opened(_checkpoint(job.model), workload, config, job.compress)
        return self._survey[1]

    def _forget(self) -> None:
        """Leave the model of the jobs before, so that two are never in memory."""
        self._open.close()
        self._runner = self._survey = None


def _checkpoint(ref: ArtifactRef) -> Checkpoint:
    return Checkpoint.from_bytes(load_artifact(ref, read_settings()))
