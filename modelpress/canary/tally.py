"""What each server saw of a canary: one small object per server, written again now and then with higher counts.

Counts only grow and an object says all that its server saw since it began, so a write that is repeated, late or lost
changes nothing that the next one does not mend. A server that died leaves what it wrote last; started again it has a
new id, and both count. Tallies are not signed: who may write them can end a canary, or keep one that should end, which
bucket policies leave to servers (`infra/s3/policies/server.json`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modelpress import keys
from modelpress.canary.log import Token
from modelpress.errors import FormatError, NotFoundError
from modelpress.housekeeping.turns import Stated, parse, who
from modelpress.sequential import Counts
from modelpress.store.base import Store, get_capped

MAX_TALLY_BYTES = 2**16
MAX_REQUESTS = 10**15
MAX_REASON = 500
MAX_SERVERS = 10_000
"""Tallies that are read of one canary."""
Condition = Literal["loading", "taking part", "stopped"]


class ArmTally(BaseModel):
    """What one model did with the requests that it was dealt."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    requests: int = Field(default=0, ge=0, le=MAX_REQUESTS)
    """Requests that it was to answer."""
    errors: int = Field(default=0, ge=0, le=MAX_REQUESTS)
    """Those that it failed to, for another reason than the request itself."""
    timed: int = Field(default=0, ge=0, le=MAX_REQUESTS)
    """Answers whose time was compared with what is slow."""
    slow: int = Field(default=0, ge=0, le=MAX_REQUESTS)
    """Those that took longer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.errors > self.requests or self.slow > self.timed or self.timed > self.requests:
            raise ValueError("more errors, or timed or slow answers, than there can be")
        return self

    def __add__(self, other: ArmTally) -> ArmTally:
        mine, theirs = self.model_dump(), other.model_dump()
        return ArmTally(**{key: min(MAX_REQUESTS, value + theirs[key]) for key, value in mine.items()})

    @property
    def error_counts(self) -> Counts:
        """Errors among the requests."""
        return Counts(self.requests, self.errors)

    @property
    def slow_counts(self) -> Counts:
        """Slow answers among those that were timed."""
        return Counts(self.timed, self.slow)


class StepTally(BaseModel):
    """What was seen in one step."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    step: int = Field(ge=0, lt=32)
    """Its index."""
    champion: ArmTally = ArmTally()
    """Of the model that stands."""
    candidate: ArmTally = ArmTally()
    """Of the one that is to take over."""
    mirrored: int = Field(default=0, ge=0, le=MAX_REQUESTS)
    """Answered requests that were run on the candidate as well."""
    disagreement: float = Field(default=0.0, ge=0, le=MAX_REQUESTS)
    """Sum, over those, of the share of samples on which the two disagree."""
    dropped: int = Field(default=0, ge=0, le=MAX_REQUESTS)
    """Requests that were to be mirrored and were not: the queue was full."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.disagreement > self.mirrored:
            raise ValueError("more disagreement than requests that were mirrored")
        return self

    def __add__(self, other: StepTally) -> StepTally:
        mirrored = min(MAX_REQUESTS, self.mirrored + other.mirrored)
        return StepTally(
            step=self.step,
            champion=self.champion + other.champion,
            candidate=self.candidate + other.candidate,
            mirrored=mirrored,
            disagreement=min(float(mirrored), self.disagreement + other.disagreement),
            dropped=min(MAX_REQUESTS, self.dropped + other.dropped),
        )

    @property
    def ran(self) -> int:
        """Requests that the candidate ran in this step."""
        return self.candidate.requests + self.mirrored

    @property
    def disagreement_counts(self) -> Counts:
        """Disagreement among the mirrored requests."""
        return Counts(self.mirrored, self.disagreement)


class Tally(Stated):
    """One server's."""

    canary: Token
    """The canary's id."""
    server: Token
    """The server's: a process that starts again is another one."""
    condition: Condition
    """`stopped`: it sends nothing to the candidate any more, for `reason`."""
    reason: str = Field(default="", max_length=MAX_REASON)
    """Why it stopped."""
    slow_seconds: float | None = Field(default=None, gt=0)
    """What it takes for slow; None: it does not know yet."""
    steps: list[StepTally] = Field(default=[], max_length=32)
    """Each step once."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({one.step for one in self.steps}) != len(self.steps):
            raise ValueError("a step stands there twice")
        return self


@dataclass(frozen=True)
class Tallies:
    """What all servers saw."""

    steps: dict[int, StepTally] = field(default_factory=dict)
    """By step, added up."""
    servers: int = 0
    """How many there are."""
    stopped: list[str] = field(default_factory=list)
    """Why some stopped by themselves."""
    damaged: list[str] = field(default_factory=list)
    """Tallies that can't be read, and why."""

    def of(self, step: int) -> StepTally:
        """What was seen in one step."""
        return self.steps.get(step, StepTally(step=step))


def write(store: Store, name: str, tally: Tally) -> None:
    """Write a server's tally over its last one.

    Raises:
        AccessDeniedError: the server may not; see `infra/s3/policies/server.json`.
        StoreError: see `modelpress.store.Store`.
    """
    store.put(keys.tally(name, tally.canary, tally.server), tally.to_bytes())


def new(canary: str, server: str, condition: Condition, steps: list[StepTally], **more: str | float | None) -> Tally:
    """A tally as of now."""
    document = {"canary": canary, "server": server, "condition": condition, "steps": steps, **more}
    return Tally.model_validate({"who": who(), "created": datetime.now(UTC), **document})


def read(store: Store, name: str, canary: str) -> Tallies:
    """All tallies of a canary, added up. One that can't be read is told, and its counts are missing.

    Raises:
        StoreError: the store could not be asked.
    """
    found: list[Tally] = []
    damaged: list[str] = []
    for info in store.list(keys.tallies(name, canary)):
        server = keys.tally_server(info.key)
        if server is None:
            continue
        if len(found) == MAX_SERVERS:
            damaged.append(f"more than {MAX_SERVERS} tallies")
            break
        doing = f"reading tally {store.uri}/{info.key}"
        try:
            tally = parse(Tally, get_capped(store, info.key, MAX_TALLY_BYTES, doing), doing)
        except NotFoundError:  # swept away since it was listed
            continue
        except FormatError as error:
            damaged.append(f"tally {server[:12]}: {error.found}")
            continue
        if (tally.canary, tally.server) != (canary, server):
            damaged.append(f"tally {server[:12]}: it is of server {tally.server[:12]} of canary {tally.canary[:12]}")
            continue
        found.append(tally)
    return add_up(found, damaged)


def add_up(found: list[Tally], damaged: list[str] | None = None) -> Tallies:
    """The tallies of several servers as one."""
    steps: dict[int, StepTally] = {}
    for tally in found:
        for one in tally.steps:
            steps[one.step] = steps[one.step] + one if one.step in steps else one
    stopped = [f"{one.who} stopped: {one.reason or 'no reason given'}" for one in found if one.condition == "stopped"]
    return Tallies(steps, len(found), stopped, damaged or [])


def sweep(store: Store, name: str, keep: Collection[str]) -> None:
    """Delete the tallies of a name's canaries, but those whose ids are to keep.

    Raises:
        StoreError: see `modelpress.store.Store`.
    """
    kept = tuple(keys.tallies(name, one) for one in keep)
    for info in list(store.list(keys.tallies(name))):
        if keys.tally_server(info.key) is not None and not info.key.startswith(kept):
            store.delete(info.key)
