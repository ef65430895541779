"""Commands on what is served: `promote`, `rollback`, `history`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from modelpress.cli.canaries import begin
from modelpress.cli.common import (
    CHAMPION,
    AliasOption,
    JsonOption,
    NameArgument,
    StoreOption,
    app,
    echo,
    export_store,
    opened_store,
    rows_table,
)


@app.command()
def promote(
    name: NameArgument,
    candidate: Annotated[str, typer.Argument(help="An alias, a model version's number or a digest.")] = "challenger",
    canary: Annotated[
        str | None,
        typer.Option(metavar="CONFIG", help="Step by step, watched by tests: a YAML file of steps, or `default`."),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Judge a published pack on its own bytes, and move the alias if it passes."""
    if canary is not None:
        begin(name, candidate, canary, store)
        return
    export_store(store)
    from flows.console import terminal

    with terminal():
        from flows.promote import promote as flow

        decision = flow(name, candidate)
    echo(f"{name}: promoted; " + "; ".join(decision.reasons))


@app.command()
def rollback(
    name: NameArgument,
    alias: AliasOption = CHAMPION,
    to: Annotated[str | None, typer.Option(help="Digest to go back to; left out, the pack before.")] = None,
    pointer_only: Annotated[
        bool, typer.Option("--pointer-only", help="Move only what servers follow: for when MLflow or Prefect is down.")
    ] = False,
    signed_by: Annotated[
        str | None,
        typer.Option(help="With --pointer-only: leave an entry that this key signed, though it be revoked."),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Point an alias back at an earlier pack."""
    if signed_by is not None and not pointer_only:
        from modelpress.errors import ConfigError

        raise ConfigError("rolling back", found="--signed-by alone", expected="--pointer-only --signed-by KEY")
    if pointer_only:
        from modelpress import load, pointer
        from modelpress.trust.again import pardoned

        opened = opened_store(store)
        accepted = pardoned(opened, signed_by) if signed_by else None
        target = load.resolve(opened, name, to) if to else None
        pack = pointer.rollback(opened, name, alias, target, accepted=accepted).pack
    else:
        export_store(store)
        from flows.console import terminal

        with terminal():
            from flows.promote import rollback as flow

            pack = flow(name, alias, to)
    echo(f"{name}@{alias} is pack {pack} again")


@app.command()
def history(
    name: NameArgument, alias: AliasOption = CHAMPION, store: StoreOption = None, as_json: JsonOption = False
) -> None:
    """Show the log of an alias: when, who, why, which pack."""
    from modelpress import pointer
    from modelpress.errors import NotFoundError

    opened = opened_store(store)
    entries = pointer.history(opened, name, alias)
    if as_json:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in entries], indent=2))
        return
    if not entries:
        raise NotFoundError(f"reading the log of {name}@{alias} in {opened.uri}", found="no entry")
    rows = [
        {
            "number": str(entry.number),
            "when": entry.created.isoformat(" ", "seconds"),
            "who": entry.who,
            "why": entry.reason,
            "pack": entry.pack,
        }
        for entry in entries
    ]
    echo(rows_table(rows))
