"""The state of a canary: entries in the log of an alias of its own, which servers follow like any other.

The alias `canary` belongs to `champion`, `canary-NAME` to the alias `NAME`. Each step is an entry that names the
candidate; the end is one that names what stands then, so an alias `canary` always says what the share of the requests
gets that a canary may have. Entries are signed, numbered, created only if absent and chained as `modelpress.pointer`
does it; the state lies in their `decision`. An entry without a state (a rollback by hand, say) runs no canary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from modelpress import pointer
from modelpress.config import CanaryConfig, CanaryStep
from modelpress.errors import ConfigError, CorruptionError, NotFoundError, UnsupportedFormatError
from modelpress.housekeeping.turns import who
from modelpress.manifest import Sha256
from modelpress.pointer import Pointer
from modelpress.store.base import Store

FORMAT_VERSION = 1
KEY = "canary"
"""Where the state lies in an entry's `decision`."""
CHAMPION = "champion"
Token = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Phase = Literal["running", "promoted", "rolled back", "aborted"]


class CanaryState(BaseModel):
    """One canary at one moment. Every entry says all of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format_version: int = FORMAT_VERSION
    """Version of this layout."""
    id: Token
    """Names the canary; servers count under it."""
    alias: str
    """The alias at stake."""
    candidate: Sha256
    """Digest of the pack that is to take over."""
    champion: Sha256
    """Digest of the pack that it is compared with."""
    after: int = Field(ge=1)
    """Number of the alias's entry that stood at the start: the promotion comes right after it, or not at all."""
    config: CanaryConfig
    """Steps and bounds."""
    gate: dict[str, Any]
    """The conditions that the candidate has passed, as JSON."""
    decision: dict[str, Any]
    """What the gate decided of it, as JSON."""
    approval: dict[str, Any] | None = None
    """What a person answered, as JSON, where the gate asks for it."""
    began: datetime
    """When, UTC, by the clock of who began it: for people alone."""
    phase: Phase = "running"
    """Whether it runs, or how it ended."""
    step: int = Field(default=0, ge=0)
    """Index of the step."""
    reasons: list[str] = []
    """Why this entry was written, for people."""

    @model_validator(mode="after")
    def _check(self) -> CanaryState:
        if self.step >= len(self.config.steps):
            raise ValueError(f"step {self.step} of {len(self.config.steps)}, counted from 0")
        if self.candidate == self.champion:
            raise ValueError("the candidate is the champion")
        return self

    @property
    def now(self) -> CanaryStep:
        """The step that it is in."""
        return self.config.steps[self.step]

    @property
    def is_last(self) -> bool:
        """Whether no step follows."""
        return self.step == len(self.config.steps) - 1


@dataclass(frozen=True)
class Standing:
    """The newest entry of a canary's log, with the state in it."""

    entry: Pointer
    state: CanaryState

    @property
    def running(self) -> bool:
        """Whether requests may go to the candidate."""
        return self.state.phase == "running"


def canary_alias(alias: str) -> str:
    """The alias whose log holds the canaries of `alias`."""
    return KEY if alias == CHAMPION else f"{KEY}-{alias}"


def at_stake(alias: str) -> str:
    """The alias that the canaries in the log of `alias`, a canary alias, are for."""
    return CHAMPION if alias == KEY else alias.removeprefix(f"{KEY}-")


def is_canary_alias(alias: str) -> bool:
    """Whether canaries may have their log under this alias; `of_canaries` says whether they have."""
    return alias == KEY or alias.startswith(f"{KEY}-")


def of_canaries(entries: Iterable[Pointer]) -> bool:
    """Whether these entries are of a log of canaries: somebody may have an alias `canary` of their own."""
    return any(is_canary_alias(entry.alias) and KEY in (entry.decision or {}) for entry in entries)


def current(store: Store, name: str, alias: str) -> Standing | None:
    """The newest canary of an alias, running or ended; None where there was none, or a hand moved the alias since.

    Raises:
        CorruptionError: the entry is not what its key says, or its state is none.
        UnsupportedFormatError: it was written by a newer modelpress.
        TrustError, LogCutError: see `pointer.current`.
    """
    entry = pointer.current(store, name, canary_alias(alias))
    state = read(entry, alias) if entry is not None else None
    return Standing(entry, state) if entry is not None and state is not None else None


def read(entry: Pointer, alias: str) -> CanaryState | None:
    """The state in an entry; None where it holds none.

    Raises:
        CorruptionError: what it holds is no state of a canary of `alias`.
        UnsupportedFormatError: it was written by a newer modelpress.
    """
    found = (entry.decision or {}).get(KEY)
    if found is None:
        return None
    doing = f"reading the canary in entry {entry.number} of {entry.name}@{entry.alias}"
    version = found.get("format_version") if isinstance(found, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        expected = f"at most {FORMAT_VERSION}"
        raise UnsupportedFormatError(
            doing, found=f"format version {version}", expected=expected, fix="update modelpress"
        )
    try:
        state = CanaryState.model_validate(found)
    except ValidationError as error:
        raise CorruptionError(
            doing,
            found=str(error.errors(include_url=False, include_input=False)[0]["msg"]),
            expected="a canary as modelpress writes it",
            fix=f"end it: modelpress rollback {entry.name} --alias {entry.alias} --pointer-only",
        ) from error
    if state.alias != alias or (state.phase == "running" and entry.pack != state.candidate):
        found_instead = f"a canary of {state.candidate[:12]} for {state.alias!r}, in an entry that names {entry.pack}"
        raise CorruptionError(doing, found=found_instead, expected=f"one for {alias!r}, in an entry of its candidate")
    return state


def write(store: Store, name: str, state: CanaryState, after: int, who_stands: str) -> Standing:
    """Append a state, if `after` is still the newest entry's number. A retry meets its own entry.

    Args:
        store: the publication store.
        name: of the pack.
        state: the new one.
        after: number of the newest entry, 0 for an empty log.
        who_stands: digest that the entry names where the canary has ended: what serves all requests from then on.

    Raises:
        ConflictError: another entry came since.
        NotFoundError, TrustError: see `pointer.append`.
        ConfigError: there is no such alias for this one.
    """
    alias = canary_alias(state.alias)
    pack = state.candidate if state.phase == "running" else who_stands
    number = f"step {state.step + 1}" if state.phase == "running" else state.phase
    token = f"canary-{state.id}-{state.phase.replace(' ', '-')}-{state.step}"
    document = {KEY: state.model_dump(mode="json")}
    entry = pointer.append(store, name, alias, pack, f"canary: {number}", document, after=after, token=token)
    written = read(entry, state.alias)
    assert written is not None
    return Standing(entry, written)


def abort(store: Store, name: str, standing: Standing, reason: str) -> Standing:
    """End a canary by a person's word.

    Raises:
        NotFoundError: the alias at stake names nothing.
        ConfigError, ConflictError: see `end`.
    """
    entry = pointer.current(store, name, standing.state.alias)
    if entry is None:
        raise NotFoundError(f"looking up {name}", found="an alias that was never set")
    return end(store, name, standing, "aborted", [f"by {who()}: {reason}"], entry.pack)


def end(store: Store, name: str, standing: Standing, phase: Phase, reasons: list[str], who_stands: str) -> Standing:
    """Append the end of a canary that runs.

    Raises:
        ConfigError: it does not run.
        ConflictError: somebody wrote an entry since.
    """
    if not standing.running:
        raise ConfigError(
            f"ending the canary of {name}@{standing.state.alias}",
            found=f"one that was {standing.state.phase} at {standing.entry.created:%Y-%m-%d %H:%M} UTC",
            expected="a running one",
        )
    state = standing.state.model_copy(update={"phase": phase, "reasons": reasons})
    return write(store, name, state, standing.entry.number, who_stands)
