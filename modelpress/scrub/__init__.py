"""Read everything in a store again: manifests, signatures, pointers, and every byte of every blob.

What a pass needs in memory is one range of a blob and, of each blob that packs list, its digest.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import islice

from modelpress.errors import CorruptionError, ModelpressError, NotFoundError, TrustError
from modelpress.progress import Progress, silent
from modelpress.reports.scrub import Finding, PackRow, ScrubReport, ScrubState
from modelpress.scrub.blobs import read_blobs
from modelpress.scrub.survey import survey
from modelpress.store.base import Store

__all__ = ["MAX_FINDINGS", "Finding", "PackRow", "ScrubReport", "ScrubState", "check", "scrub", "state_key"]

MAX_FINDINGS = 1000


def scrub(
    store: Store,
    *,
    state: ScrubState | None = None,
    save: Callable[[ScrubState], None] = lambda _: None,
    bytes_per_second: int = 0,
    progress: Progress = silent,
) -> ScrubReport:
    """Read a whole store and report what is not in order; nothing is changed, and what is wrong is no exception.

    A pack that is published meanwhile may be shown as unreferenced blobs, and is read by the next pass.

    Args:
        store: the publication store, held to its trust.
        state: how far an earlier run came; blobs before it are not read again, everything else is.
        save: given the state now and then, and at the end.
        bytes_per_second: how much of the line reading blobs may take; 0 takes what it gets.
        progress: told of bytes of blobs.

    Raises:
        StoreError: the store does not answer, or refuses access.
        TrustFileError: its trust file can't be used.
    """
    started = time.perf_counter()
    if state is None or state.finished is not None or state.uri != store.uri:
        now = datetime.now(UTC)
        state = ScrubState(uri=store.uri, began=now, seen=now)
    resumed = state.read_blobs
    found = survey(store)
    before = state.read_bytes
    counted = read_blobs(store, found, state, save, bytes_per_second, progress)
    findings = [*found.findings, *counted.state.damaged, *counted.findings]
    errors = sum(finding.is_error for finding in findings)
    findings.sort(key=lambda finding: not finding.is_error)
    return ScrubReport(
        uri=store.uri,
        packs=tuple(found.packs),
        aliases=len(found.aliases),
        signatures=found.signatures,
        decisions=found.decisions,
        runs=found.runs,
        trusted=store.trust is not None,
        blobs=counted.blobs,
        blob_bytes=counted.blob_bytes,
        read_blobs=counted.state.read_blobs - resumed,
        read_bytes=counted.state.read_bytes - before,
        resumed_blobs=resumed,
        errors=errors,
        findings=tuple(islice(findings, MAX_FINDINGS)),
        began=state.began,
        seconds=time.perf_counter() - started,
    )


def check(report: ScrubReport) -> None:
    """Refuse a store that is not in order.

    Raises:
        CorruptionError: something is not in order; the first twenty are named.
        NotFoundError: something is missing, and nothing else is wrong.
        TrustError: something is not vouched for, and nothing else is wrong.
    """
    wrong = [finding for finding in report.findings if finding.is_error]
    if not wrong:
        return
    kinds = {finding.kind for finding in wrong}
    alone: dict[str, type[ModelpressError]] = {"missing": NotFoundError, "untrusted": TrustError}
    kind = alone.get(kinds.pop(), CorruptionError) if len(kinds) == 1 else CorruptionError
    shown = [f"    {finding.line()}" for finding in wrong[:20]]
    more = [f"    and {report.errors - len(shown)} more"] if report.errors > len(shown) else []
    raise kind(
        f"reading everything in {report.uri}",
        found="\n".join([f"{report.errors} objects that are not in order", *shown, *more]),
        expected="every object as its key, its manifest and its signatures say",
        fix="delete a damaged blob and publish its pack again, which sends what is missing; keep what was tampered "
        "with for inquiry first",
    )


def state_key(uri: str) -> str:
    """Where the state of passes over the store `uri` is kept, in another store."""
    return f"scrub/{hashlib.sha256(uri.encode()).hexdigest()}.json"
