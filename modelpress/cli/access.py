"""Commands on the keys that requests to the server bring: `access create|list|revoke`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from modelpress.cli.common import JsonOption, app, echo, rows_table

access = typer.Typer(no_args_is_help=True, help="Keys that requests to the server bring; their file holds no key.")
app.add_typer(access, name="access")

FileOption = Annotated[
    Path,
    typer.Option("--file", envvar="MODELPRESS_SERVING_KEYS_FILE", help="The file of hashed keys that servers read."),
]


@access.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who gets it: the tenant of its requests.")],
    file: FileOption,
    scope: Annotated[list[str], typer.Option("--scope", help="infer, admin, promote or metrics; may be repeated.")],
    model: Annotated[
        list[str] | None, typer.Option(help="Model that it is for, with *; may be repeated. None: every model.")
    ] = None,
    expires: Annotated[str, typer.Option(help="90d, 12h, 2027-01-31T00:00:00Z or never.")] = "90d",
) -> None:
    """Make a key and print it, once: the file keeps its digest alone. A server that runs takes it within a second."""
    from modelpress.access import add_key, parse_expiry

    until = parse_expiry(expires, datetime.now(UTC))
    key = add_key(file, name, scope, until, model or ["*"])
    end = f"until {until.isoformat(' ', 'seconds')}" if until else "for ever"
    typer.echo(f"{name}: {', '.join(scope)}, {end}; this is shown once:", err=True)
    typer.echo(key)


@access.command(name="list")
def list_keys(file: FileOption, as_json: JsonOption = False) -> None:
    """Show who has which key, for what, and whether it counts: ids, no key and no digest."""
    from modelpress.access import read_keys

    keys, now = read_keys(file).keys, datetime.now(UTC)
    if as_json:
        shown = [key.model_dump(mode="json", exclude={"sha256"}) | {"state": key.state(now)} for key in keys]
        typer.echo(json.dumps(shown, indent=2))
        return
    rows = [
        {
            "name": key.name,
            "id": key.id,
            "scopes": ", ".join(key.scopes),
            "models": ", ".join(key.models),
            "created": key.created.isoformat(" ", "seconds"),
            "expires": key.expires.isoformat(" ", "seconds") if key.expires else "never",
            "state": key.state(now),
        }
        for key in keys
    ]
    echo(rows_table(rows or [{"name": "none"}]))


@access.command()
def revoke(
    which: Annotated[str, typer.Argument(metavar="NAME|ID", help="A key's id, or a name: then all its keys.")],
    file: FileOption,
) -> None:
    """Revoke a key, or all keys of a name. A server that runs refuses it within a second."""
    from modelpress.access import revoke_keys

    for key in revoke_keys(file, which):
        echo(f"{key.name}: {key.id} ({', '.join(key.scopes)}) is revoked")
