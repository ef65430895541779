"""Commands that keep a store in order: `gc`, `retain`, `du`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from modelpress.cli.common import Bar, JsonOption, StoreOption, app, echo, opened_store, rows_table

if TYPE_CHECKING:
    from modelpress.reports import CollectReport, RetainReport, UsageReport

DeleteOption = Annotated[bool, typer.Option("--delete", help="Remove it; else only say what would go.")]


@app.command()
def gc(
    delete: DeleteOption = False,
    grace_hours: Annotated[float, typer.Option(min=0, help="What is younger stays.")] = 24.0,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find what no pack and no upload under way needs, and remove it with --delete."""
    from modelpress.housekeeping.collect import collect
    from modelpress.settings import read_settings

    opened = opened_store(store)
    days = read_settings().upload_abandoned_days
    with Bar("collect") as progress:
        report = collect(
            opened, delete=delete, grace_seconds=grace_hours * 3600, abandoned_days=days, progress=progress
        )
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        _show_collected(report)


@app.command()
def retain(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Pack names; none: all.")] = None,
    keep_versions: Annotated[int, typer.Option(min=1, help="The newest versions of each name stay.")] = 3,
    keep_days: Annotated[
        float, typer.Option(min=0, help="Younger versions stay, and those that an alias pointed at since.")
    ] = 30.0,
    rollbacks: Annotated[
        int | None, typer.Option(min=0, help="Steps back that stay possible for each alias; left out, all.")
    ] = None,
    delete: DeleteOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which versions stay and why, and remove the others with --delete; `gc` then frees their bytes."""
    from modelpress.config import RetentionConfig
    from modelpress.housekeeping.retention import retain as apply

    config = RetentionConfig(keep_versions=keep_versions, keep_days=keep_days, rollbacks=rollbacks)
    with Bar("retain") as progress:
        report = apply(opened_store(store), config, names or (), delete=delete, progress=progress)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        _show_retained(report)


@app.command()
def du(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Pack name; none: all.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each version takes, alone and shared, and what no version has."""
    from modelpress.housekeeping.usage import usage

    report = usage(opened_store(store), name)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        _show_usage(report)


def _show_collected(report: CollectReport) -> None:
    kept = {
        "needed by packs": report.needed,
        "needed by uploads": report.uploading,
        f"younger than {report.grace_seconds / 3600:g} h": report.young,
        "not ours": report.foreign,
    }
    verdict = "would go" if report.dry_run else "went"
    rows = [("stays", what, found) for what, found in kept.items()]
    rows += [(verdict, reason, found) for reason, found in report.by_reason().items()]
    echo(
        rows_table(
            [
                {"": does, "why": why, "objects": f"{found.objects:,}", "bytes": f"{found.size_bytes:,}"}
                for does, why, found in rows
            ]
        )
    )
    if report.dry_run:
        objects, size = len(report.garbage), sum(item.size_bytes for item in report.garbage)
        echo(f"{objects:,} objects, {size:,} bytes would go: run it with --delete")
    else:
        echo(f"{report.removed.objects:,} objects, {report.removed.size_bytes:,} bytes went from {report.store}")


def _show_retained(report: RetainReport) -> None:
    verdict = "may go" if report.dry_run else "goes"
    rows = [
        {
            "pack": f"{one.name}@{one.pack[:12]}",
            "committed": one.modified.isoformat(" ", "minutes"),
            "bytes": f"{one.size_bytes:,}",
            "": "stays" if one.keep else verdict,
            "why": "; ".join(one.keep) or "no rule keeps it",
        }
        for one in report.packs
    ]
    echo(rows_table(rows) if rows else f"no packs in {report.store}")
    going = sum(not one.keep for one in report.packs)
    if report.dry_run:
        echo(f"{going} of {len(rows)} versions may go: run it with --delete, and then gc")
    else:
        echo(f"{report.removed} of {len(rows)} versions went; gc --delete frees their bytes")


def _show_usage(report: UsageReport) -> None:
    rows = [
        {
            "pack": f"{one.name}@{one.pack[:12]}",
            "aliases": ", ".join(one.aliases),
            "bytes": f"{one.total_bytes:,}",
            "alone": f"{one.alone_bytes:,}",
            "shared": f"{one.shared_bytes:,}",
            "shared with": _few(one.shared_with),
            "missing": f"{one.missing_bytes:,}" if one.missing_bytes else "",
        }
        for one in report.versions
    ]
    echo(rows_table(rows) if rows else f"no packs in {report.store}")
    for name, size in report.names.items():
        echo(f"{name}: {size:,} bytes, each blob counted once")
    echo(
        f"{report.total_bytes:,} bytes in {report.store}: {report.referenced.size_bytes:,} in blobs of packs, "
        f"{report.unreferenced.size_bytes:,} in other blobs, {report.other.size_bytes:,} in manifests and logs"
    )


def _few(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
