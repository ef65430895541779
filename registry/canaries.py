"""Canaries, begun, looked at and ended: what the log in the store says is done, and MLflow shows it.

A candidate that passed the gate begins one; each look reads what the servers counted and does the next thing
(`modelpress.canary.decide`). A look that was cut off, repeated or made twice at once does nothing twice: entries are
appended on the condition that nobody wrote since. The champion's pointer moves once, at the end, by
`registry.promotion`, which judges the candidate again on its own bytes, and only if the alias stands where it stood at
the start. What MLflow does about it stops nothing: a candidate that does harm must go while MLflow is down.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from modelpress import keys, pointer
from modelpress.canary import decide, log, tally
from modelpress.canary.decide import Action, Finding
from modelpress.canary.log import CanaryState, Phase, Standing
from modelpress.canary.tally import Tallies
from modelpress.config import CanaryConfig, GateConfig
from modelpress.errors import (
    ConfigError,
    ConflictError,
    FormatError,
    ModelpressError,
    NotFoundError,
    SetupError,
    TrustError,
)
from modelpress.housekeeping.turns import store_time
from modelpress.progress import Progress, silent
from modelpress.reports import Report
from modelpress.store.base import Store
from registry import runs, versions
from registry.gates import Approval, Decision

CANARY = "canary"
"""Reason of a pointer's entry that a canary wrote at its end."""
TAGS = "canary."
"""Beginning of a version's tags: `canary.phase`, `canary.step`, `canary.why`."""
logger = logging.getLogger(__name__)


class Looked(Report):
    """One look at one canary."""

    name: str
    """Of the pack."""
    alias: str
    """The alias at stake."""
    candidate: str
    """Digest of the pack that is to take over."""
    champion: str
    """Digest of the pack that it is compared with."""
    phase: Phase
    """After this look."""
    step: int
    """Index of the step after this look."""
    steps: int
    """How many there are."""
    action: str
    """What was done: `wait`, `step`, `promote`, `rollback` or `abort`."""
    reasons: list[str]
    """Why."""
    findings: list[Finding]
    """How the tests stand."""
    servers: int
    """Servers that counted."""
    requests: int
    """Requests that the candidate ran in the step that was looked at."""


def start(
    store: Store,
    client: MlflowClient,
    name: str,
    pack: str,
    config: CanaryConfig,
    gate: GateConfig | None,
    progress: Progress = silent,
    *,
    approval: Approval | None = None,
) -> tuple[Decision, Standing | None]:
    """Judge a published pack and, if it passes, let servers send it the requests of the first step.

    Args:
        store, client, name, pack, gate, progress, approval: see `promotion.promote`.
        config: steps and bounds.

    Returns:
        The decision, and the canary; None where the gate refused, or waits for a person. A start that is repeated meets
        the canary that it began.

    Raises:
        ConfigError: there is no champion to compare with, or it is this pack.
        ConflictError: another canary of this alias runs.
        NotFoundError, CorruptionError, TrustError, SetupError: see `promotion.promote`.
    """
    from registry import promotion  # reads weights, and so brings torch; a look does without

    judged = promotion.judge(store, client, name, pack, gate, progress, approval=approval)
    alias, standing = judged.gate.alias, judged.standing
    doing = f"beginning a canary of {name}@{alias} with pack {pack}"
    if not judged.decision.promote:
        return judged.decision, None
    if standing is None or standing.pack == pack:
        found = "an alias that was never set" if standing is None else "the champion itself"
        raise ConfigError(doing, found=found, fix=f"without a canary: modelpress promote {name} {pack[:12]}")
    before = log.current(store, name, alias)
    if before is not None and before.running:
        if (before.state.candidate, before.state.config) == (pack, config):
            return judged.decision, before
        raise ConflictError(
            doing,
            found=f"a canary of pack {before.state.candidate} that runs",
            fix=f"wait for its end, or end it: modelpress canary abort {name} --alias {alias}",
        )
    state = CanaryState(
        id=uuid.uuid4().hex,
        alias=alias,
        candidate=pack,
        champion=standing.pack,
        after=standing.number,
        config=config,
        gate=judged.gate.model_dump(mode="json"),
        decision=judged.decision.model_dump(mode="json"),
        approval=approval.model_dump(mode="json") if approval else None,
        began=datetime.now(UTC),
        reasons=["it passed the gate"],
    )
    begun = log.write(store, name, state, _free(store, name, log.canary_alias(alias), doing), standing.pack)
    tally.sweep(store, name, keep=_kept(store, name, state.id))
    _show(store, client, name, begun)
    return judged.decision, begun


def running(store: Store, name: str | None = None) -> Iterator[tuple[str, str]]:
    """Pack name and alias of each canary that runs, or whose log can't be read; of one name, or of all.

    Raises:
        StoreError: the store could not be asked.
    """
    for found in [name] if name is not None else store.folders(keys.PACKS):
        if not keys.is_name(found):
            continue
        for alias in store.folders(f"{keys.manifests(found)}refs/"):
            if not log.is_canary_alias(alias):
                continue
            at_stake = log.at_stake(alias)
            try:
                standing = log.current(store, found, at_stake)
            except ModelpressError:  # `look` says what is wrong with it
                yield found, at_stake
                continue
            if standing is not None and standing.running:
                yield found, at_stake


def look(store: Store, client: MlflowClient, name: str, alias: str, progress: Progress = silent) -> Looked | None:
    """Do the next thing with a canary; None where none runs.

    Args:
        store: the publication store.
        client: MLflow.
        name: of the pack and of the registered model.
        alias: at stake.
        progress: told while published bytes are read, at the end.

    Raises:
        ConflictError: somebody else wrote to the canary's log, or moved the alias, just now; the next look sees it.
        StoreError, TrustError: the store could not be asked, or refuses the entry; nothing changed.
        CorruptionError: the log holds no canary that can be read.
        SetupError, MlflowException: it is to take over, and MLflow does not answer; the next look tries again.
    """
    standing = log.current(store, name, alias)
    if standing is None or not standing.running:
        return None
    seen = tally.read(store, name, standing.state.id)
    moved = _moved(store, name, standing)
    if moved is not None:
        phase, why = moved
        found = decide.findings(standing.state.config, seen, decide.levels(standing.state.config)[0])
        action = Action("wait", [why], found)
        after = log.end(store, name, standing, phase, [why], _stands(store, name, alias))
        what = "promote" if phase == "promoted" else "abort"
    else:
        action = decide.advance(standing.state, seen, _elapsed(store, standing))
        after, action = _act(store, client, name, standing, action, progress)
        what = action.kind
    _show(store, client, name, after)
    _measure(client, name, after.state, action.findings)
    return _looked(name, standing, after, what, action, seen)


def _act(
    store: Store, client: MlflowClient, name: str, standing: Standing, action: Action, progress: Progress
) -> tuple[Standing, Action]:
    """Write what was decided; the canary after it, and what was done in the end."""
    state = standing.state
    if action.kind == "step":
        next_step = state.model_copy(update={"step": state.step + 1, "reasons": action.reasons})
        return log.write(store, name, next_step, standing.entry.number, state.champion), action
    if action.kind == "rollback":
        return log.end(store, name, standing, "rolled back", action.reasons, state.champion), action
    if action.kind == "promote":
        refusal = _promote(store, client, name, state, progress)
        if refusal is not None:
            action = Action("rollback", [refusal], action.findings)
            return log.end(store, name, standing, "rolled back", action.reasons, state.champion), action
        return log.end(store, name, standing, "promoted", action.reasons, state.candidate), action
    return standing, action


def _promote(store: Store, client: MlflowClient, name: str, state: CanaryState, progress: Progress) -> str | None:
    """Judge the candidate again and let the alias name it; why not, where the gate refuses now.

    Raises:
        ConflictError: the alias was moved since the start.
    """
    from registry import promotion

    gate = GateConfig.model_validate(state.gate)
    approval = Approval.model_validate(state.approval) if state.approval else None
    pointer.check_may_append(store, name, state.alias)  # a refusal here is not the candidate's
    try:
        judged = promotion.judge(store, client, name, state.candidate, gate, progress, approval=approval)
    except (NotFoundError, FormatError, TrustError) as error:
        return f"its pack can't be served any more: {error.doing}: {error.found}"
    if not judged.decision.promote:
        return f"the gate refuses it now: {'; '.join(judged.decision.reasons)}"
    if judged.after != state.after:
        raise ConflictError(
            f"promoting pack {state.candidate} of {name} at the end of its canary",
            found=f"entry {judged.after} of {state.alias}",
            expected=f"entry {state.after}, as at the start",
        )
    entry = promotion.append(store, judged, CANARY)
    logger.info("%s@%s is pack %s from entry %d on", name, state.alias, entry.pack, entry.number)
    return None


def _moved(store: Store, name: str, standing: Standing) -> tuple[Phase, str] | None:
    """How the canary is over though nobody ended it; None: the alias stands as it stood."""
    state, entry = standing.state, pointer.current(store, name, standing.state.alias)
    if entry is not None and entry.number == state.after:
        return None
    if entry is not None and entry.pack == state.candidate and entry.number == state.after + 1:
        # This look, cut off after the pointer had moved; or a person who promoted it without waiting.
        return "promoted", f"{state.alias} names it since entry {entry.number}, a {entry.reason} by {entry.who}"
    what = f"to {entry.pack[:12]} by {entry.who}" if entry is not None else "out of its log"
    return "aborted", f"{state.alias} was moved {what}: the candidate was not compared with that"


def _elapsed(store: Store, standing: Standing) -> float:
    """Seconds since the step began, by the store's clock: those of machines may differ."""
    entry = standing.entry
    info = store.info(keys.pointer(entry.name, entry.alias, entry.number))
    return (store_time(store) - info.modified).total_seconds() if info is not None else 0.0


def _stands(store: Store, name: str, alias: str) -> str:
    """Digest that an alias names.

    Raises:
        NotFoundError: none.
    """
    entry = pointer.current(store, name, alias)
    if entry is None:
        raise NotFoundError(f"looking up {name}@{alias}", found="an alias that was never set")
    return entry.pack


def _free(store: Store, name: str, alias: str, doing: str) -> int:
    """Number of the newest entry of a log of canaries, 0 for an empty one.

    Raises:
        ConfigError: somebody uses the alias for something else.
    """
    entries = pointer.history(store, name, alias)
    if entries and not log.of_canaries(entries):
        raise ConfigError(
            doing,
            found=f"an alias {alias!r} that {entries[-1].who} uses for something else",
            expected="it to be free: the log of canaries lies there",
        )
    return len(entries)


def _kept(store: Store, name: str, canary: str) -> list[str]:
    """Ids of the canaries of a name whose tallies are needed: those that run."""
    found = [canary]
    for _, alias in running(store, name):
        standing = log.current(store, name, alias)
        found += [standing.state.id] if standing is not None else []
    return found


def _show(store: Store, client: MlflowClient, name: str, standing: Standing) -> None:
    """Tell MLflow how the canary stands: an alias and tags. A lag is logged, and mended by the next look."""
    state = standing.state
    tags = {"phase": state.phase, "step": f"{state.step + 1} of {len(state.config.steps)}"}
    why = "; ".join(state.reasons)[: versions.MAX_TAG]
    aliases = [log.canary_alias(state.alias), *([state.alias] if state.phase == "promoted" else [])]
    try:
        runs.check_server(client.tracking_uri)
        version = versions.carrying(client, name, state.candidate)
        versions.annotate(client, version, {TAGS + key: value for key, value in {**tags, "why": why}.items()})
        for alias in aliases:
            versions.follow_pointer(store, client, name, alias)
    except (MlflowException, SetupError, NotFoundError) as error:
        logger.warning("MLflow does not show the canary of %s@%s: %s", name, state.alias, error)


def _measure(client: MlflowClient, name: str, state: CanaryState, found: list[Finding]) -> None:
    """Log how the tests stand as metrics of the candidate's run, by seconds since the start."""
    now, step = int(time.time() * 1000), max(0, int((datetime.now(UTC) - state.began).total_seconds()))
    values = {}
    for one in found:
        values[f"{TAGS}{one.test}.evidence"] = one.evidence
        values[f"{TAGS}{one.test}.evidence_kept"] = one.evidence_kept
        if one.rate is not None:
            values[f"{TAGS}{one.test}.rate"] = one.rate
    try:
        runs.check_server(client.tracking_uri)
        version = versions.carrying(client, name, state.candidate)
        client.log_batch(version.run_id, metrics=[Metric(key, value, now, step) for key, value in values.items()])
    except (MlflowException, SetupError, NotFoundError) as error:
        logger.warning("MLflow does not show how the canary of %s@%s stands: %s", name, state.alias, error)


def _looked(name: str, before: Standing, after: Standing, what: str, action: Action, seen: Tallies) -> Looked:
    state = after.state
    return Looked(
        name=name,
        alias=state.alias,
        candidate=state.candidate,
        champion=state.champion,
        phase=state.phase,
        step=state.step,
        steps=len(state.config.steps),
        action=what,
        reasons=action.reasons,
        findings=action.findings,
        servers=seen.servers,
        requests=seen.of(before.state.step).ran,
    )
