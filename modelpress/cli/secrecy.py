"""Commands on keys and access: `keys make|new|rotate|show`, `share`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelpress.cli.common import (
    JsonOption,
    NameArgument,
    PackArgument,
    StoreOption,
    app,
    echo,
    opened_store,
    parse_pack,
    rows_table,
    store_settings,
)

if TYPE_CHECKING:
    from modelpress.cipher import WrappingKey
    from modelpress.cipher.secrets import SecretsEntry
    from modelpress.store import Store

keys = typer.Typer(no_args_is_help=True, help="Keys of encrypted packs: never shown, only their ids.")
app.add_typer(keys, name="keys")


@keys.command()
def make(path: Annotated[Path, typer.Argument(metavar="FILE", help="A file that does not exist.")]) -> None:
    """Write a new key to a file that only its owner reads, for MODELPRESS_KEY_FILE. Keep a copy elsewhere."""
    from modelpress.cipher.wrapping import make_key_file

    echo(f"key {make_key_file(path)} → {path}")


@keys.command()
def new(name: NameArgument, store: StoreOption = None) -> None:
    """Give a model a new secret: packs published from now on are encrypted with it. For after a leak."""
    from modelpress.cipher import secrets

    opened, wrapping = _opened(store)
    entry = secrets.renew(opened, name, wrapping)
    echo(f"{name}: secret {entry.secrets[-1]} from now on; packs of older ones stay as they are: publish them again")


@keys.command()
def rotate(
    name: NameArgument,
    forget: Annotated[
        bool, typer.Option("--forget", help="Then delete what older keys wrapped: only the first key opens it then.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Wrap a model's secrets with the first key of the settings. No blob is sent again."""
    from modelpress.cipher import secrets

    opened, wrapping = _opened(store)
    entry = secrets.rewrap(opened, name, wrapping)
    echo(f"{name}: {len(entry.secrets)} secrets are wrapped by {entry.algorithm} key {entry.key}")
    if forget:
        deleted = secrets.forget(opened, name, wrapping)
        echo(f"{name}: {len(deleted)} older entries are deleted")


@keys.command()
def show(name: NameArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show which keys wrap which secrets of a model: ids, no key and no secret."""
    from modelpress.cipher import secrets

    opened, wrapping = _opened(store)
    entries = secrets.history(opened, name)
    if as_json:
        typer.echo(json.dumps([entry.model_dump(mode="json", exclude={"wrapped"}) for entry in entries], indent=2))
        return
    echo("keys in the settings: " + (", ".join(str(key) for key in wrapping) or "none"))
    echo(rows_table([_row(entry) for entry in entries] or [{"number": "none"}]))


@app.command()
def share(
    pack: PackArgument,
    to: Annotated[Path, typer.Option("--to", help="A new file. Who has it reads the pack: it is a secret.")],
    duration: Annotated[str, typer.Option("--for", help="How long the links work: 90s, 30m, 1h, at most 7d.")] = "1h",
    store: StoreOption = None,
) -> None:
    """Write links with which a process without credentials loads one pack for a while."""
    from modelpress import share as sharing

    name, ref = parse_pack(pack)
    links = sharing.share(opened_store(store), name, ref, sharing.parse_duration(duration))
    links.write(to)
    until = links.expires.isoformat(" ", "seconds")
    echo(f"{name} {links.pack}: {len(links.objects)} links until {until} → {to}")
    echo(f"modelpress pull {name}@{links.pack} --store links+{to.absolute().as_uri()} --to FOLDER")


def _opened(store: str | None) -> tuple[Store, list[WrappingKey]]:
    from modelpress.cipher import wrapping_keys
    from modelpress.store import open_store

    settings = store_settings(store)
    return open_store(settings.store_uri, settings), wrapping_keys(settings)


def _row(entry: SecretsEntry) -> dict[str, str]:
    return {
        "number": str(entry.number),
        "when": entry.created.isoformat(" ", "seconds"),
        "key": f"{entry.algorithm} {entry.key}",
        "secrets": ", ".join(entry.secrets),
    }
