"""How an alias moves: a promotion, a rollback. What people do in MLflow by hand is `registry.reconcile`'s.

The pointer in the store is what servers follow, and the truth; MLflow's alias is its image for people. A promotion
records the decision, appends to the pointer's log on the condition that nobody moved it since the judgement, then sets
MLflow's alias. A crash before the append leaves the old champion served, and the same promotion, started again, ends
the work; one after it leaves an alias that lags, which the next look mends. A rollback moves the pointer and does not
fail with MLflow: going back must not wait for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from modelpress import decisions, intervals, keys, load, pointer, scores
from modelpress.config import EvaluateConfig, GateConfig, parse_config
from modelpress.errors import ModelpressError, NotFoundError, SetupError
from modelpress.manifest import Manifest
from modelpress.pack_files import read_reports
from modelpress.progress import Progress, silent
from modelpress.reports import Override, VerifyReport
from modelpress.scores import UNMEASURED, Scored
from modelpress.store.base import Store
from registry import figures, runs, versions
from registry.gates import Approval, Decision, Evidence, Origin, Published, decide, with_approval, with_override
from registry.versions import Version

CHALLENGER = "challenger"
"""Alias of the version that was judged last."""
TAG_OVERRIDE = "gate.override"
"""Tag of a version: who overrode the gate at the last judgement, and why."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RolledBack:
    """Where a rollback led."""

    pack: str
    """Digest that the pointer names from now on."""
    lag: str | None
    """Why MLflow's alias does not say so yet, and what mends it; None where it does."""


def promote(
    store: Store,
    client: MlflowClient,
    name: str,
    pack: str,
    gate: GateConfig | None,
    progress: Progress = silent,
    *,
    approval: Approval | None = None,
    override: Override | None = None,
    move: bool = True,
) -> Decision:
    """Judge a published pack and, if it passes, make it champion in MLflow and in the store.

    Args:
        store: the publication store.
        client: MLflow.
        name: of the pack and of the registered model.
        pack: digest of the candidate.
        gate: the conditions; None takes those of the pack's own config.
        progress: told while the published bytes are read.
        approval: what a person answered, where the gate asks for it.
        override: a person's word for a candidate that does not pass; see `gates.BINDING` for what it is no match for.
        move: False judges alone: the decision is kept, and nothing moves but the alias `challenger`.

    Returns:
        The decision, as it is kept beside the pack and in MLflow. A refusal moves nothing but the alias `challenger`,
        and nor does one that waits for a person.

    Raises:
        NotFoundError: no such pack, or no model version carries it.
        CorruptionError: the published bytes are not what the manifest says.
        ConflictError: someone else moved the alias meanwhile.
        StoreError: the pointer could not be written; nothing moved but `challenger`.
        TrustError: the pack lacks a signature, or there is no key that may move the alias; nothing is moved.
        SetupError: MLflow does not answer.
    """
    judged = judge(store, client, name, pack, gate, progress, approval=approval, override=override)
    if judged.decision.promote and move:
        put_in_service(store, client, judged)
    return judged.decision


@dataclass(frozen=True)
class Judged:
    """A judgement, and what it rests on."""

    version: Version
    """The candidate."""
    gate: GateConfig
    """The conditions, and the alias that is at stake."""
    decision: Decision
    standing: pointer.Pointer | None
    """The entry that stood when it was made; None: an empty log."""
    record: decisions.Record
    """The decision as it is kept beside the pack."""

    @property
    def champion(self) -> str | None:
        """Digest of the pack that stood."""
        return self.standing.pack if self.standing else None

    @property
    def after(self) -> int:
        """Number of the entry that an append must come right after."""
        return self.standing.number if self.standing else 0


def judge(
    store: Store,
    client: MlflowClient,
    name: str,
    pack: str,
    gate: GateConfig | None,
    progress: Progress = silent,
    *,
    alias: str | None = None,
    approval: Approval | None = None,
    override: Override | None = None,
) -> Judged:
    """Judge a published pack and write down what was decided. Nothing moves but the alias `challenger`.

    Args:
        store, client, name, pack, gate, progress, approval, override: see `promote`.
        alias: what is at stake; None takes the gate's.
    """
    runs.check_server(client.tracking_uri)
    version = versions.carrying(client, name, pack)
    read = load.verify(store, name, pack, progress)  # the published bytes themselves, every one of them
    manifest = load.load_manifest(store, name, pack)
    gate = gate or parse_config(manifest.config, origin=f"the config of pack {pack}").gate
    gate = gate if alias is None else gate.model_copy(update={"alias": alias})
    pointer.check_may_append(store, name, gate.alias)
    standing = pointer.current(store, name, gate.alias)
    champion = standing.pack if standing else None
    evidence = _gather(store, manifest, version, champion if champion != pack else None, read)
    decision = with_override(decide(evidence, gate), override)
    if gate.approval and champion != pack:
        decision = with_approval(pack, decision, approval, gate)
    record = decisions.keep(
        store,
        name,
        pack,
        gate.alias,
        decision,
        champion=champion,
        after=standing.number if standing else 0,
        gate=gate.model_dump(mode="json"),
    )
    judged = Judged(version, gate, decision, standing, record)
    _record(client, judged)
    versions.set_alias(client, version, CHALLENGER)
    return judged


def put_in_service(store: Store, client: MlflowClient, judged: Judged) -> None:
    """Let the pointer name what was judged, if nobody moved it since, and then MLflow's alias.

    Raises:
        ConflictError: someone did.
        StoreError, TrustError: the pointer could not be written; nothing moved.
        MlflowException: the pointer moved, and MLflow's alias did not: it lags, until the next look or promotion.
    """
    if judged.champion != judged.version.pack:
        append(store, judged)
    versions.follow_pointer(store, client, judged.version.name, judged.gate.alias)


def append(store: Store, judged: Judged, reason: str = pointer.PROMOTE) -> pointer.Pointer:
    """Move the pointer to what was judged, if nobody moved it since; the entry names the kept decision."""
    version, reason = judged.version, pointer.OVERRIDE if judged.decision.override else reason
    decision = judged.decision.model_dump(mode="json") | {decisions.RECORD: judged.record.digest}
    return pointer.append(store, version.name, judged.gate.alias, version.pack, reason, decision, after=judged.after)


def rollback(
    store: Store, client: MlflowClient, name: str, alias: str, to: str | None = None, *, token: str | None = None
) -> RolledBack:
    """Point an alias back, in the store and then in MLflow.

    Once the pointer has moved, what MLflow does about it is no failure of the rollback.

    Args:
        store: the publication store.
        client: MLflow.
        name: of the pack and of the registered model.
        alias: what goes back.
        to: a pack's digest, or a prefix of it; None takes the pack that stood before the current one. The pack that
            stands now moves nothing in the store, and lets MLflow's alias follow.
        token: names the attempt: a retry that carries it goes no further back than the first attempt did.

    Raises:
        NotFoundError: there is nothing to go back to.
        ConflictError: someone else moved the alias meanwhile.
    """
    target = load.resolve(store, name, to) if to else None
    entry = pointer.current(store, name, alias)
    if entry is None or entry.pack != target:
        entry = pointer.rollback(store, name, alias, target, token=token)
    try:
        runs.check_server(client.tracking_uri)
        versions.follow_pointer(store, client, name, alias)
    except (MlflowException, SetupError, NotFoundError) as error:
        lag = (
            f"{name}@{alias} is moved to pack {entry.pack}; the MLflow alias lags ({first_line(error)}), run "
            f"`modelpress rollback {name} --alias {alias} --to {entry.pack}` to mend"
        )
        return RolledBack(entry.pack, lag)
    return RolledBack(entry.pack, None)


def first_line(error: Exception) -> str:
    """What went wrong, in short."""
    return (error.found or error.doing) if isinstance(error, ModelpressError) else str(error).partition("\n")[0][:300]


def _record(client: MlflowClient, judged: Judged) -> None:
    """Write the decision on the model version, and in full beside its run, before anything moves."""
    version, gate, decision = judged.version, judged.gate, judged.decision
    versions.annotate(
        client,
        version,
        {
            "gate.verdict": decision.verdict,
            "gate.promote": str(decision.promote).lower(),
            "gate.decision": judged.record.digest,
            versions.TAG_GATE_ALIAS: gate.alias,
            **({TAG_OVERRIDE: decision.override.line()[: versions.MAX_TAG]} if decision.override else {}),
        },
    )
    if decision.override is None and TAG_OVERRIDE in version.tags:
        client.delete_model_version_tag(version.name, version.number, TAG_OVERRIDE)
    document = {
        "pack": version.pack,
        "record": judged.record.digest,
        "champion": judged.champion,
        "gate": gate.model_dump(mode="json"),
        "decision": decision.model_dump(mode="json"),
    }
    client.log_dict(version.run_id, document, f"gate/version-{version.number}.json")


def _gather(store: Store, manifest: Manifest, version: Version, champion: str | None, read: VerifyReport) -> Evidence:
    """What is known of the candidate: from its pack, and the speed, which is no part of its identity, from MLflow."""
    fetch = load.fetcher(store, manifest)
    reports = read_reports(manifest, fetch)
    candidate = scores.of_pack(manifest, fetch)
    return Evidence(
        candidate=candidate.get("candidate", UNMEASURED),
        source=candidate.get("source", UNMEASURED),
        champion=_champion(store, manifest.name, champion) if champion else None,
        compression_ratio=_compression_ratio(manifest, reports),
        speedup=versions.measured_number(version, "speedup"),
        attribution=_attribution(version),
        attribution_confidence=_confidence(manifest),
        coverage=(reports.get("quantize") or reports.get("plan") or {}).get("coverage"),
        quantized=any(manifest.config.get(stage) is not None for stage in ("quantize", "plan")),
        pruning_coverage=(reports.get("prune") or {}).get("coverage"),
        pruned=manifest.config.get("prune") is not None,
        published=Published(read.read_bytes, manifest.published_bytes, read.signed_by),
        figures=figures.of_version(version),
        origin=_origin(manifest),
    )


def _origin(manifest: Manifest) -> Origin:
    """The licence, and what of the lineage is not there."""
    source = manifest.lineage.get("source")
    there = {
        "source": isinstance(source, str) and keys.is_digest(source),
        "config": bool(manifest.config),
        "versions": "modelpress" in manifest.versions,
    }
    return Origin(manifest.licence, tuple(what for what, found in there.items() if not found))


def _attribution(version: Version) -> intervals.Interval | None:
    value, low, high = (versions.measured_number(version, f"attribution_{end}") for end in ("agreement", "low", "high"))
    return None if value is None or low is None or high is None else intervals.Interval(value, low, high)


def _confidence(manifest: Manifest) -> float:
    """Of the intervals that the pack's run measured, two-sided."""
    found = (manifest.config.get("evaluate") or {}).get("confidence")
    return found if isinstance(found, float) and 0 < found < 1 else EvaluateConfig().confidence


def _champion(store: Store, name: str, pack: str) -> Scored:
    manifest = load.load_manifest(store, name, pack)
    return scores.of_pack(manifest, load.fetcher(store, manifest)).get("candidate", UNMEASURED)


def _compression_ratio(manifest: Manifest, reports: Mapping[str, Any]) -> float | None:
    source = reports.get("source", {}).get("size_bytes")
    return source / manifest.published_bytes if source else None
