"""Reading everything in the store again, and how that is shown."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from pydantic import ValidationError

from modelpress.errors import CorruptionError
from modelpress.reports.scrub import ScrubReport, ScrubState
from modelpress.settings import read_settings
from modelpress.store.base import Store, get_capped, open_store
from tasks.progress import StageProgress

MAX_STATE_BYTES = 2**24
BAR = 20
"""Characters of the longest bar."""


@task(name="scrub", task_run_name="scrub", cache_policy=NO_CACHE)
def scrub(bytes_per_second: int, afresh: bool) -> ScrubReport:
    """Read everything, from where a run that was cut off stopped; how far it came is kept in the work store."""
    from modelpress import scrub as library

    settings = read_settings()
    store, work = open_store(settings.store_uri, settings), open_store(settings.work_uri, settings)
    key = library.state_key(store.uri)
    state = None if afresh else _state(work, key)
    if state is not None and state.finished is None:
        get_run_logger().info(
            "scrub: goes on behind %s, of a pass that began %s", state.after, state.began.isoformat(" ", "seconds")
        )
    with StageProgress("scrub") as progress:
        return library.scrub(
            store,
            state=state,
            save=lambda now: _save(work, key, now),
            bytes_per_second=bytes_per_second,
            progress=progress,
        )


@task(name="show", task_run_name="show", cache_policy=NO_CACHE)
def show(report: ScrubReport) -> None:
    """The tables of a reading: what is not in order, every pack, and its bytes as bars."""
    findings = [finding.model_dump(mode="json") for finding in report.findings]
    create_table_artifact(findings, key="scrub-findings", description=f"What is not in order in `{report.uri}`")
    create_table_artifact(packs_table(report), key="scrub-packs", description=f"Packs in `{report.uri}`")
    create_markdown_artifact(markdown(report), key="scrub-report", description=f"Reading of `{report.uri}`")


@task(name="judge", task_run_name="judge", cache_policy=NO_CACHE)
def judge(report: ScrubReport) -> None:
    """Fail where something is not in order."""
    from modelpress import scrub as library

    get_run_logger().info(
        "scrub: %d packs, %d blobs, %d bytes read, %d errors",
        len(report.packs),
        report.blobs,
        report.read_bytes,
        report.errors,
        extra={"stage": "scrub"},
    )
    library.check(report)


def packs_table(report: ScrubReport) -> list[dict[str, str | int]]:
    """One row per pack."""
    most = max((row.blob_bytes for row in report.packs), default=0)
    wrong = [finding.pack for finding in report.findings if finding.is_error]
    return [
        {
            "name": row.name,
            "pack": row.digest,
            "blobs": row.blobs,
            "bytes": row.blob_bytes,
            "": "█" * max(1, round(BAR * row.blob_bytes / most)) if most else "",
            "signatures": row.signed_by,
            "errors": wrong.count(f"{row.name}@{row.digest[:12]}"),
        }
        for row in report.packs
    ]


def markdown(report: ScrubReport) -> str:
    """The reading in a page."""
    verdict = f"**{report.errors} objects are not in order.**" if report.errors else "Everything is in order."
    asked = "checked against the trust file" if report.trusted else "not asked for: MODELPRESS_TRUST is not set"
    lines = [
        f"# {report.uri}",
        "",
        verdict,
        "",
        f"- {len(report.packs)} packs, {report.aliases} aliases, {report.signatures} signatures ({asked}), "
        f"{report.decisions} decisions, {report.runs} runs",
        f"- {report.blobs} blobs of {report.blob_bytes:,} bytes; read in this run: {report.read_blobs} of "
        f"{report.read_bytes:,} bytes, in {report.seconds:.0f} s; read before in the pass that began "
        f"{report.began.isoformat(' ', 'seconds')}: {report.resumed_blobs}",
        "",
        *[f"- {finding.line()}" for finding in report.findings if finding.is_error],
    ]
    return "\n".join(lines) + "\n"


def _state(work: Store, key: str) -> ScrubState | None:
    doing = f"reading how far the last scrub came, {work.uri}/{key}"
    if work.info(key) is None:
        return None
    try:
        return ScrubState.model_validate_json(get_capped(work, key, MAX_STATE_BYTES, doing))
    except ValidationError as error:
        found = str(error.errors(include_url=False)[0])
        fix = "delete it, or run once with `afresh`"
        raise CorruptionError(doing, found=found, expected="what a scrub wrote", fix=fix) from error


def _save(work: Store, key: str, state: ScrubState) -> None:
    work.put(key, state.model_dump_json().encode())
