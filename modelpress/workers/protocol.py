"""What a worker is asked, and what it answers: one JSON object a line, nothing pickled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from modelpress.config import CompressConfig, PlanConfig, WorkloadConfig
from modelpress.reduce import Part
from modelpress.reports import ArtifactRef, Report


class Asked(Report):
    """What every job says, whoever does it."""

    kind: str
    """What is to be done."""
    of: str
    """Digest of the whole work."""
    slice: int = Field(ge=0)
    """Number of the slice."""
    attempt: int = Field(default=1, ge=1)
    """From 1 on."""


class Job(Asked):
    """One slice of a stage's work; see `modelpress.workers.jobs`."""

    kind: Literal["answers", "sensitivities", "points", "extremes", "histograms"]
    """What is to be done."""
    units: list[int] = Field(min_length=1)
    """Numbers of the batches, or of a plan's measurements, that are in the slice."""
    model: ArtifactRef
    """What is run."""
    workload: WorkloadConfig
    """Where the data come from; a model of MLflow's as the folder that it was fetched to."""
    store: str
    """URI of the work store, where tensors go."""
    run: str
    """A worker reads the data anew for another run."""
    plan: PlanConfig | None = None
    """For `sensitivities` and `points`: what may be chosen."""
    compress: CompressConfig | None = None
    """For `sensitivities` and `points`: how bytes are counted; None: every tensor raw."""
    choices: list[list[int]] = Field(default_factory=list)
    """For `points`: all of the front, each an option for every weight."""
    values: list[str] = Field(default_factory=list)
    """For `extremes`: names of the graph's values."""
    edges: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """For `histograms`: by value, the ends of its histogram."""


class Failure(Report):
    """An error that a slice would meet in any process; see `modelpress.errors`."""

    kind: str
    """Name of the error's class."""
    doing: str
    """What was being done."""
    found: str | None = None
    """What was there."""
    expected: str | None = None
    """What should have been there."""
    fix: str | None = None
    """The way out."""


class Reply(Report):
    """What a worker says to a job: one of the two."""

    part: Part | None = None
    """The slice's result."""
    failure: Failure | None = None
    """Why there is none."""
    seconds: float = 0.0
    """Time that the work took."""
