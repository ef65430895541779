"""The command on two packs: `diff`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from modelpress.cli.common import (
    AfterArgument,
    BeforeArgument,
    JsonOption,
    StoreOption,
    app,
    echo,
    opened_store,
    parse_pair,
    rows_table,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelpress.reports.changes import ChangesReport, FieldChange


@app.command()
def diff(
    before: BeforeArgument,
    after: AfterArgument,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what changed from one pack to another: recipe, tensors, files, bytes, quality with its interval."""
    from modelpress import changes

    found = changes.compare(opened_store(store), *parse_pair(before, after))
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    echo(f"{found.before.name} {found.before.pack}\n→ {found.after.name} {found.after.pack}")
    if found.before.pack == found.after.pack:
        echo("the same pack")
        return
    _show_bytes(found)
    _show_quality(found)
    for title, fields in (("recipe", found.config), ("manifest", found.about), ("files", found.files)):
        _show_fields(title, fields)
    _show_tensors(found)


def _show_bytes(found: ChangesReport) -> None:
    rows = [
        {
            "bytes": what,
            "before": f"{getattr(found.before, name):,}",
            "after": f"{getattr(found.after, name):,}",
            "change": f"{getattr(found.after, name) - getattr(found.before, name):+,}",
        }
        for what, name in (("raw", "raw_bytes"), ("published", "published_bytes"))
    ]
    echo(rows_table(rows))
    echo(f"{found.shared_bytes:,} bytes of blobs are in both")


def _show_quality(found: ChangesReport) -> None:
    if found.unmeasured is not None:
        echo(f"\nquality: not compared, {found.unmeasured}")
        return
    rows = [
        {
            "quality": one.metric,
            "before": f"{one.before:.4f}",
            "after": f"{one.after:.4f}",
            "difference": f"{one.difference:+.4f}",
            f"{one.confidence:.0%}": f"[{one.low:+.4f}, {one.high:+.4f}]",
            "samples": f"{one.samples:,}" + ("" if one.paired else ", others than before"),
        }
        for one in found.quality
    ]
    echo("")
    echo(rows_table(rows))


def _show_fields(title: str, fields: Sequence[FieldChange]) -> None:
    if fields:
        rows = [{title: one.field, "before": one.before or "–", "after": one.after or "–"} for one in fields]
        echo("")
        echo(rows_table(rows))


def _show_tensors(found: ChangesReport) -> None:
    rows = [
        {
            "tensor": one.name,
            "change": one.what,
            "before": one.before or "–",
            "after": one.after or "–",
            "stored": f"{one.stored_before:,} → {one.stored_after:,}",
        }
        for one in found.tensors
    ]
    echo("")
    if rows:
        echo(rows_table(rows))
    echo(f"{found.equal_tensors} tensors are the same")
