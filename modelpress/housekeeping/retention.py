"""Retention: which versions of a pack stay, and why. What goes is the manifest; a later collection takes its blobs."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection
from datetime import UTC, datetime, timedelta

from modelpress import keys, pointer
from modelpress.canary.log import of_canaries
from modelpress.config import RetentionConfig
from modelpress.errors import NotFoundError
from modelpress.housekeeping.collect import MAX_FRUITLESS, delete_all, no_time
from modelpress.housekeeping.survey import PackEntry, PackId, Survey
from modelpress.housekeeping.turns import Lease
from modelpress.progress import Progress, silent
from modelpress.reports import RetainedPack, RetainReport
from modelpress.store.base import Store

IN_A_ROUND = 64
"""Manifests that are removed before aliases and uploads are read again."""


def retain(
    store: Store,
    config: RetentionConfig | None = None,
    names: Collection[str] = (),
    *,
    delete: bool = False,
    progress: Progress = silent,
) -> RetainReport:
    """Say which versions stay and why, and remove the others' manifests if asked.

    A version stays while an alias points at it or can be rolled back to it, while it is young or among the newest,
    while another that stays is stored as a difference to it, and while an upload or a promotion needs it. Signatures
    and runs go with their manifest.

    Args:
        store: the publication store.
        config: the rules.
        names: pack names; empty: all.
        delete: remove; else only say what would go.
        progress: called with manifests that went, and manifests to go.

    Raises:
        NotFoundError: a name has no version.
        CorruptionError: a manifest, an intent or an alias's log is damaged. Nothing was removed.
        UnsupportedFormatError: one was written by a newer modelpress. Nothing was removed.
        ConflictError: a collection, or another retention, is at work.
        StoreError: see `modelpress.store.Store`.
    """
    rules = config or RetentionConfig()
    if not delete:
        return _report(store, _judge(store, rules, names, datetime.now(UTC)), dry_run=True, removed=0)
    store.ensure_fit()
    with Lease(store, "applying retention in") as lease:
        first = judged = _judge(store, rules, names, lease.now())
        total, removed, fruitless = sum(not one.keep for one in first), 0, 0
        while going := [one for one in judged if not one.keep][:IN_A_ROUND]:
            done = delete_all(lease, [functools.partial(_remove, store, lease, one) for one in going])
            removed += sum(done)
            fruitless = 0 if any(done) else fruitless + 1
            if fruitless == MAX_FRUITLESS:
                raise no_time(store, "applying retention in")
            progress(removed, total, "retention")
            lease.next_round()
            judged = _judge(store, rules, (), lease.now(), only=names)
        return _report(store, first, dry_run=False, removed=removed)


def _remove(store: Store, lease: Lease, one: RetainedPack) -> None:
    """Delete a manifest, and then its signatures and runs while the round lasts; a collection takes what is left."""
    store.delete(keys.manifest(one.name, one.pack))
    beside = (keys.signatures(one.name, one.pack), keys.runs(one.name, one.pack))
    for info in [info for prefix in beside for info in store.list(prefix)]:
        if lease.holds():
            store.delete(info.key)


def _judge(
    store: Store, rules: RetentionConfig, names: Collection[str], now: datetime, only: Collection[str] = ()
) -> list[RetainedPack]:
    """Every version of the names, with what keeps it. Intents are read first, then logs and manifests: a promotion that
    withdrew its intent has written its entry before."""
    survey = Survey()
    survey.look(store, now)
    by_name: dict[str, list[PackEntry]] = defaultdict(list)
    for entry in survey.packs.values():
        by_name[entry.pack.name].append(entry)
    missing = sorted(set(names) - set(by_name))
    if missing:
        known = ", ".join(sorted(by_name)) or "none"
        raise NotFoundError("applying retention", found=f"no pack {missing[0]} in {store.uri}; there are: {known}")
    keep: dict[PackId, list[str]] = {pack: [] for pack in survey.packs}
    chosen = set(names) or set(only) or set(by_name)
    for name in sorted(chosen & set(by_name)):
        entries = by_name[name] = sorted(by_name[name], key=lambda one: (one.modified, one.pack), reverse=True)
        _by_age(keep, entries, rules, now)
        _by_aliases(keep, store, name, rules, now)
    for pack in survey.wanted(now):
        if pack in keep:
            keep[pack].append("an upload or a promotion under way needs it")
    _by_bases(keep, survey)
    return [
        RetainedPack(
            name=one.pack.name,
            pack=one.pack.digest,
            modified=one.modified,
            size_bytes=one.size_bytes,
            keep=keep[one.pack],
        )
        for name in sorted(chosen & set(by_name))
        for one in by_name[name]
    ]


def _by_age(keep: dict[PackId, list[str]], entries: list[PackEntry], rules: RetentionConfig, now: datetime) -> None:
    for position, one in enumerate(entries):
        if position < rules.keep_versions:
            keep[one.pack].append(f"among the newest {rules.keep_versions}")
        if now - one.modified < timedelta(days=rules.keep_days):
            keep[one.pack].append(f"younger than {rules.keep_days:g} days")


def _by_aliases(keep: dict[PackId, list[str]], store: Store, name: str, rules: RetentionConfig, now: datetime) -> None:
    for alias in store.folders(f"{keys.manifests(name)}refs/"):
        log = pointer.history(store, name, alias)
        if not log:
            continue
        back = [] if of_canaries(log) else pointer.standing(log)[:-1]  # nothing goes back to a candidate
        back = back if rules.rollbacks is None else back[len(back) - min(len(back), rules.rollbacks) :]
        reasons = [
            (log[-1].pack, f"{alias} points at it"),
            *((pack, f"{alias} can be rolled back to it") for pack in back),
        ]
        ends = [entry.created for entry in log[1:]]
        for entry, end in zip(log, ends, strict=False):
            if now - end < timedelta(days=rules.keep_days):
                reasons.append((entry.pack, f"{alias} pointed at it until {end:%Y-%m-%d}"))
        for digest, reason in dict.fromkeys(reasons):
            if (pack := PackId(name, digest)) in keep:
                keep[pack].append(reason)


def _by_bases(keep: dict[PackId, list[str]], survey: Survey) -> None:
    """What a version that stays is a difference to stays, and so on."""
    waiting = [pack for pack, reasons in keep.items() if reasons]
    while waiting:
        pack = waiting.pop()
        base = survey.packs[pack].base
        if base is not None and (found := PackId(pack.name, base)) in keep:
            if not keep[found]:
                waiting.append(found)
            keep[found].append(f"{pack.digest[:12]} is a difference to it")


def _report(store: Store, judged: list[RetainedPack], *, dry_run: bool, removed: int) -> RetainReport:
    return RetainReport(store=store.uri, dry_run=dry_run, packs=judged, removed=removed)
