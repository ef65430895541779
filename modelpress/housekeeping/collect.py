"""Garbage collection: what no manifest and no upload under way needs goes, and nothing else.

The order of the steps is what makes it safe; docs/decisions/0026-collection.md argues it.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from modelpress import keys
from modelpress.errors import ConfigError, StoreUnavailableError
from modelpress.housekeeping.survey import PackId, Survey, refuse_work_store
from modelpress.housekeeping.turns import Lease
from modelpress.progress import Progress, silent
from modelpress.reports import CollectReport, Counted, Garbage, GarbageItem
from modelpress.store.base import ObjectInfo, Store, Unfinished
from modelpress.store.clock import awake
from modelpress.store.threads import DaemonPool

GRACE_SECONDS = 24 * 3600.0
MAX_GRACE_SECONDS = 100 * 365 * GRACE_SECONDS
DELETES_IN_FLIGHT = 8
BATCH = 256
"""Deletes between two looks at whether the round still runs."""
CERTAIN_SECONDS = 5.0
"""A delete that took longer may have been sent twice, by whatever carries it."""
MAX_FRUITLESS = 3
PROBES = "doctor/"
PROBE_LIFE = timedelta(hours=1)


class _Plan:
    """What was found in a store, sorted by what is to become of it."""

    def __init__(self, store: Store, survey: Survey, now: datetime, grace_seconds: float, abandoned: timedelta) -> None:
        self._survey, self._now = survey, now
        self._young_since = now - timedelta(seconds=grace_seconds)
        self.counts = dict.fromkeys(("needed", "uploading", "young", "foreign"), Counted())
        self.items: list[GarbageItem] = []
        self.parts: dict[str, Unfinished] = {}
        of_packs = {digest for pack in survey.packs.values() for digest in pack.blobs}
        for info in store.list(keys.BLOBS):
            digest = keys.blob_digest(info.key)
            if digest is None:
                self._count("foreign", info)
            elif digest in survey.needed:
                self._count("needed" if digest in of_packs else "uploading", info)
            else:
                self._judge(info, "unreferenced blob")
        wanted = survey.wanted(now)
        for info in store.list(keys.PACKS):
            beside = keys.beside(info.key)
            if beside is None or PackId(beside.name, beside.digest) in survey.packs:
                continue
            if PackId(beside.name, beside.digest) in wanted:
                continue
            self._judge(info, "signature without pack" if beside.kind == "signature" else "run without pack")
        for found in survey.intents:
            if not found.lives(now):
                self._add(ObjectInfo(found.key, found.size_bytes, found.modified), "abandoned upload")
        for info in store.list(PROBES):
            if now - info.modified > PROBE_LIFE:  # whatever the grace: somebody may be looking at it
                self._judge(info, "probe")
        for upload in store.unfinished(keys.BLOBS):
            if keys.blob_digest(upload.key) not in survey.needed | {None} and now - upload.begun > abandoned:
                name = f"{upload.key}?uploadId={upload.upload}"
                self.parts[name] = upload
                self._add(ObjectInfo(name, upload.size_bytes, upload.begun), "unfinished parts")

    def still_garbage(self, item: GarbageItem, now: datetime) -> bool:
        """Whether nothing has come to need it since it was found."""
        if item.reason in ("unreferenced blob", "unfinished parts"):
            return keys.blob_digest(item.key.partition("?")[0]) not in self._survey.needed
        if item.reason in ("signature without pack", "run without pack"):
            beside = keys.beside(item.key)
            assert beside is not None
            owner = PackId(beside.name, beside.digest)
            return owner not in self._survey.packs and owner not in self._survey.wanted(now)
        if item.reason == "abandoned upload":
            return item.key not in {found.key for found in self._survey.living(now)}
        return True

    def _judge(self, info: ObjectInfo, reason: Garbage) -> None:
        if info.modified > self._young_since:
            self._count("young", info)
        else:
            self._add(info, reason)

    def _add(self, info: ObjectInfo, reason: Garbage) -> None:
        self.items.append(GarbageItem(key=info.key, reason=reason, size_bytes=info.size_bytes, modified=info.modified))

    def _count(self, what: str, info: ObjectInfo) -> None:
        self.counts[what] = _more(self.counts[what], info.size_bytes)


def collect(
    store: Store,
    *,
    delete: bool = False,
    grace_seconds: float = GRACE_SECONDS,
    abandoned_days: float = 7.0,
    progress: Progress = silent,
) -> CollectReport:
    """Find what nothing needs, and remove it if asked.

    Args:
        store: the publication store.
        delete: remove; else only say what would go.
        grace_seconds: what is younger stays, whoever needs it: a belt beside the protocol, and the only protection for
            writers that announce nothing.
        abandoned_days: unfinished uploads in parts that nobody needs go when they are older.
        progress: called with bytes that went, and bytes to go.

    Raises:
        ConfigError: stages keep their outputs in this store, or a grace that is no time.
        CorruptionError: a manifest or an intent is damaged, and may need anything. Nothing was removed.
        UnsupportedFormatError: one was written by a newer modelpress, and may need anything. Nothing was removed.
        ConflictError: another collection is at work.
        StoreError: see `modelpress.store.Store`; what was removed until then is garbage all the same.
    """
    if not 0 <= grace_seconds <= MAX_GRACE_SECONDS:
        expected = f"0 to {MAX_GRACE_SECONDS:.0f} seconds"
        raise ConfigError("collecting", found=f"a grace of {grace_seconds} seconds", expected=expected)
    refuse_work_store(store, "collecting")
    abandoned = timedelta(days=abandoned_days)
    survey = Survey()
    if not delete:
        now = datetime.now(UTC)
        survey.look(store, now)
        plan = _Plan(store, survey, now, grace_seconds, abandoned)
        return _report(store, survey, plan, now, grace_seconds, dry_run=True, removed=Counted())
    store.ensure_fit()
    with Lease(store, "collecting in") as lease:
        survey.look(store, lease.now())
        plan = _Plan(store, survey, lease.now(), grace_seconds, abandoned)
        removed = _remove(store, lease, survey, plan, progress)
        return _report(store, survey, plan, lease.now(), grace_seconds, dry_run=False, removed=removed)


def _remove(store: Store, lease: Lease, survey: Survey, plan: _Plan, progress: Progress) -> Counted:
    """Delete in rounds; in each, what writers have said and committed until then is read before the first delete."""
    waiting, removed, fruitless = deque(plan.items), Counted(), 0
    total = sum(item.size_bytes for item in plan.items)

    def one(item: GarbageItem) -> None:
        if item.key in plan.parts:
            store.abort(plan.parts[item.key])
        else:
            store.delete(item.key)

    while waiting:
        lease.next_round()
        survey.look(store, lease.now())
        before = len(waiting)
        while waiting and lease.holds():
            batch = [waiting.popleft() for _ in range(min(BATCH, len(waiting)))]
            due = [item for item in batch if plan.still_garbage(item, lease.now())]
            done = delete_all(lease, [functools.partial(one, item) for item in due])
            for item, gone in zip(due, done, strict=True):
                if gone:
                    removed = _more(removed, item.size_bytes)
                else:
                    waiting.append(item)
            progress(removed.size_bytes, total, "collecting")
        fruitless = fruitless + 1 if len(waiting) == before else 0
        if fruitless == MAX_FRUITLESS:
            raise no_time(store, "collecting in")
    return removed


def delete_all(lease: Lease, deletes: Sequence[Callable[[], None]]) -> list[bool]:
    """Run deletes, several at a time, as long as the round allows; True for each that was run.

    Raises:
        StoreUnavailableError: one was sent again, or answered so late that it may have been, and the first may still
            be on its way. The lease is not given back: it expires when that is over.
        StoreError: see `modelpress.store.Store`; the same.
    """

    def run(delete: Callable[[], None]) -> float | None:
        if not lease.holds():
            return None
        began = awake()
        delete()
        return awake() - began

    lease.uncertain, unanswered = True, lease.store.unanswered_deletes()
    pool = DaemonPool(DELETES_IN_FLIGHT, "collect")
    try:
        seconds = list(pool.map(run, deletes))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    longest = max((one for one in seconds if one is not None), default=0.0)
    unanswered = lease.store.unanswered_deletes() - unanswered
    if unanswered or longest > CERTAIN_SECONDS:
        raise StoreUnavailableError(
            "collecting",
            found=f"{unanswered} deletes sent again for want of an answer"
            if unanswered
            else f"a delete that took {longest:.0f} s",
            expected=f"answers within {CERTAIN_SECONDS:.0f} s",
            fix="run it again later: what was removed was garbage, and the rest is still there",
        )
    lease.uncertain = False
    return [one is not None for one in seconds]


def no_time(store: Store, what: str) -> StoreUnavailableError:
    """Rounds that were over before anything was deleted."""
    return StoreUnavailableError(
        f"{what} {store.uri}",
        found=f"{MAX_FRUITLESS} rounds with no time left for a delete after what is needed was listed",
        fix="run it when the store is less busy, and from nearer to it",
    )


def _report(
    store: Store,
    survey: Survey,
    plan: _Plan,
    now: datetime,
    grace_seconds: float,
    *,
    dry_run: bool,
    removed: Counted,
) -> CollectReport:
    return CollectReport(
        store=store.uri,
        dry_run=dry_run,
        grace_seconds=grace_seconds,
        packs=len(survey.packs),
        uploads=len(survey.living(now)),
        garbage=plan.items,
        removed=removed,
        **plan.counts,
    )


def _more(counted: Counted, size_bytes: int) -> Counted:
    return Counted(objects=counted.objects + 1, size_bytes=counted.size_bytes + size_bytes)
