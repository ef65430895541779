"""Commands that write pages: `report`, `compare`, `fleet`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelpress.cli.common import (
    AfterArgument,
    Bar,
    BeforeArgument,
    PackArgument,
    StoreOption,
    app,
    echo,
    opened_store,
    parse_pack,
    parse_pair,
)

if TYPE_CHECKING:
    from modelpress.errors import NotFoundError
    from modelpress.page.parts import Page
    from modelpress.page.registry import Registry

SHORT = 12
OutOption = Annotated[Path | None, typer.Option("--out", help="File to write; `-` prints. Left out: named by digest.")]


@app.command()
def report(
    pack: PackArgument,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            metavar="FILE",
            help="A report of `profile` or `advise`, or the checks.jsonl of `advise --check`, to be shown; several.",
        ),
    ] = None,
    out: OutOption = None,
    store: StoreOption = None,
) -> None:
    """Write one HTML page on a pack and the run that made it: quality, bytes, speed, layers, gate, origin."""
    from modelpress.page import drawing, read_story, report_page, with_report

    name, ref = parse_pack(pack)
    story = read_story(opened_store(store), name, ref)
    for path in beside or ():
        story = with_report(story, path)
    with drawing(f"drawing the page of {name}@{story.pack or ref}"):
        page = report_page(story)
    _write(page, out or Path(f"{name}-{(story.pack or ref)[:SHORT]}.html"))


@app.command()
def compare(
    before: BeforeArgument,
    after: AfterArgument,
    out: OutOption = None,
    store: StoreOption = None,
) -> None:
    """Write one HTML page on two packs side by side; `diff` says what of it is words."""
    from modelpress.page import drawing
    from modelpress.page.compare import comparison_page, read_comparison

    found, one, two = read_comparison(opened_store(store), *parse_pair(before, after))
    named = f"{one.name}-{found.before.pack[:SHORT]}-{found.after.pack[:SHORT]}.html"
    with drawing(f"drawing the comparison of {before} and {after}"):
        page = comparison_page(found, one, two)
    _write(page, out or Path(named))


@app.command()
def fleet(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="These models; none: all.")] = None,
    registry: Annotated[
        bool, typer.Option("--registry", help="With what MLflow's registry says, beside what lies in the store.")
    ] = False,
    alias: Annotated[str | None, typer.Option("--alias", help="This alias alone; left out, all of them.")] = None,
    out: OutOption = None,
    store: StoreOption = None,
) -> None:
    """Write one HTML page on all models: what each alias serves, how large, how good, how fast, and what is amiss."""
    from modelpress.page import drawing
    from modelpress.page.fleet import fleet_page, read_fleet

    wanted, opened, said = names or [], opened_store(store), None
    if registry:
        said = _registered(wanted, alias)
    with Bar("fleet") as progress:
        found = read_fleet(opened, alias, progress, names=wanted)
    for name in wanted:
        if name not in found.packs and (said is None or name not in said.models):
            raise _unknown(name, found.uri, said)
    with drawing(f"drawing the page of all models in {found.uri}"):
        page = fleet_page(found, said)
    _write(page, out or Path("fleet.html"))


def _registered(names: list[str], alias: str | None) -> Registry:
    """What MLflow's registry says; of its aliases, this one alone."""
    from dataclasses import replace

    from flows.fleet import registered
    from modelpress.settings import read_settings

    found = registered(read_settings(), names)
    if alias is None:
        return found
    return replace(found, aliases={key: number for key, number in found.aliases.items() if key[1] == alias})


def _unknown(name: str, uri: str, registry: Registry | None) -> NotFoundError:
    from modelpress.errors import NotFoundError

    searched = f"no packs of this name in {uri}"
    if registry is not None:
        searched += f", and no registered model of this name at {registry.address}"
    return NotFoundError(f"looking for model {name!r}", found=searched, fix="`modelpress fleet` without a name has all")


def _write(page: Page, out: Path) -> None:
    """The page into a file, as a whole or not at all; `-` is the output."""
    from modelpress.page import render
    from modelpress.store.local import local_errors

    text = render(page)
    if str(out) == "-":
        typer.echo(text, nl=False)
        return
    with local_errors(f"writing {out}", writing=True):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".page-") as folder:
            partial = Path(folder, out.name)
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, out)
    echo(f"{page.title}: {len(text.encode()):,} bytes in {out}")
