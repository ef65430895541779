"""A stage as a job for ranks: what they are told, what they leave, and the work itself.

A job lies in a folder of a store that all ranks reach: on one machine a folder of its disk, on several the work store.

    job.json             what is to be done
    progress.json        how far it is, by the first rank, every second
    errors/<rank>.json   what a rank refused, in the parts of a `ModelpressError`
    output, result.json  the checkpoint, and the report; the result is written last
    waiting, gone        of a run that waits for ranks elsewhere: see `lease`
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from modelpress import errors
from modelpress.config import DistillConfig, ParallelConfig, PruneConfig, WorkloadConfig
from modelpress.errors import CorruptionError, ModelpressError, StageError, StoreError
from modelpress.parallel.states import States
from modelpress.progress import Progress
from modelpress.reports import ArtifactRef, DistillReport, PruneReport
from modelpress.store.base import Store, open_store

JOB, PROGRESS, ERRORS, OUTPUT, RESULT = "job.json", "progress.json", "errors/", "output", "result.json"
PROGRESS_SECONDS = 1.0
WATCHED = "MODELPRESS_RANK_WATCHED"
"""Variable of a launcher that holds the other end of the standard input: when that closes, the launcher is gone."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Job(_Document):
    """A stage, for all of its ranks."""

    workload: WorkloadConfig
    model: ArtifactRef
    """The checkpoint that the stage begins with."""
    config: DistillConfig | PruneConfig
    stage: Literal["distill", "prune"]
    states: States | None = None
    """None: nothing is kept."""

    @model_validator(mode="before")
    @classmethod
    def _typed(cls, data: Any) -> Any:
        """The config as the stage's own: the fields of two configs alone do not say which it is."""
        if isinstance(data, dict) and isinstance(data.get("config"), dict):
            kinds: dict[str, type[DistillConfig | PruneConfig]] = {"distill": DistillConfig, "prune": PruneConfig}
            kind = kinds.get(data.get("stage", ""))
            if kind is not None:
                return {**data, "config": kind.model_validate(data["config"])}
        return data

    @property
    def parallel(self) -> ParallelConfig:
        """How its training is spread."""
        training = self.config.train if isinstance(self.config, DistillConfig) else self.config.recovery
        assert training is not None
        return training.parallel


class Result(_Document):
    """What a job made, beside its output."""

    report: dict[str, Any]
    """The stage's, as JSON."""
    told: list[str]
    """What its trainings found of earlier ones' states."""


class Refusal(_Document):
    """A `ModelpressError` of a rank."""

    rank: int
    error: str
    """Its class."""
    doing: str
    found: str | None = None
    expected: str | None = None
    fix: str | None = None

    def raised(self, ranks: int) -> ModelpressError:
        """The error again, of its own class."""
        kind = getattr(errors, self.error, StageError)
        assert issubclass(kind, ModelpressError)
        doing = f"{self.doing} (rank {self.rank} of {ranks})"
        return kind(doing, found=self.found, expected=self.expected, fix=self.fix)


def refusal(error: ModelpressError, rank: int) -> Refusal:
    """An error as it is written down."""
    parts = {name: getattr(error, name) for name in ("doing", "found", "expected", "fix")}
    return Refusal(rank=rank, error=type(error).__name__, **parts)


Document = TypeVar("Document", bound=_Document)


def read(store: Store, key: str, kind: type[Document]) -> Document:
    """A document of a job's folder.

    Raises:
        CorruptionError: it is none.
        NotFoundError: it is not there.
    """
    data = store.get(key)
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise CorruptionError(
            f"reading {store.uri}/{key}",
            found=str(error),
            expected=f"a {kind.__name__} as this version of modelpress writes it",
            fix="run the ranks with the version that started the job",
        ) from error


class JobShelf:
    """A `modelpress.resume.Shelf` for the first rank."""

    def __init__(self, states: States, restarted: bool) -> None:
        self.seconds, self.told = states.seconds, list[str]()
        self._store, self._prefix = open_store(states.store), states.prefix
        self._take_up = states.reuse or restarted

    def load(self, number: int) -> bytes | None:
        """The newest state, of an earlier run where those may be used, or of this one before it was restarted."""
        key = f"{self._prefix}{number}"
        return self._store.get(key) if self._take_up and self._store.info(key) is not None else None

    def save(self, number: int, data: bytes) -> None:
        """Keep a state. A store that refuses it costs what it would have saved, and not the training."""
        try:
            self._store.put(f"{self._prefix}{number}", data)
        except StoreError as error:
            print(f"the training's state was not kept: {error}", file=sys.stderr, flush=True)

    def tell(self, text: str) -> None:
        """In the log, and in the result."""
        print(text, file=sys.stderr, flush=True)
        self.told.append(text)


class JobProgress:
    """A `modelpress.progress.Progress` that leaves its latest word in the job's folder."""

    def __init__(self, store: Store) -> None:
        self._store, self._told = store, 0.0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Write it, where the last one is a second old."""
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS:
            self._told = now
            try:
                self._store.put(PROGRESS, json.dumps([done, total, note]).encode())
            except StoreError as error:
                print(f"progress was not told: {error}", file=sys.stderr, flush=True)


def work(job: Job, progress: Progress) -> tuple[bytes, DistillReport | PruneReport]:
    """The stage, by each of its ranks alike: the output's bytes and the report.

    Raises:
        ModelpressError: as the stage does.
    """
    from modelpress.checkpoint import Checkpoint, from_module, to_module
    from modelpress.store.artifacts import load_artifact
    from modelpress.workload import load_workload

    workload = load_workload(job.workload)
    checkpoint = Checkpoint.from_bytes(load_artifact(job.model))
    module = to_module(checkpoint, workload)
    if isinstance(job.config, DistillConfig):
        from modelpress.distill import distill

        student, distilled = distill(module, workload, job.config, progress)
        return from_module(student, distilled.architecture).to_bytes(), distilled
    from modelpress.prune import prune_

    pruned = prune_(module, workload, job.config, progress)
    return from_module(module, checkpoint.metadata["architecture"]).to_bytes(), pruned
