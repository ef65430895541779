"""What all commands share: the application, their options, and how they print."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from modelpress.progress import Progress
    from modelpress.settings import Settings
    from modelpress.store import Store

CHAMPION = "champion"
WIDTH = 400

app = typer.Typer(
    name="modelpress",
    help="From a trained PyTorch model to a smaller, faster, verified one in the bucket, the registry and the server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PackArgument = Annotated[str, typer.Argument(metavar="NAME[@REF]", help="Pack name; REF is an alias or a digest.")]
PackOrNameArgument = Annotated[
    str, typer.Argument(metavar="NAME[@REF]", help="Pack name; with REF, an alias or a digest, this pack alone.")
]
BeforeArgument = Annotated[str, typer.Argument(metavar="NAME[@REF]", help="Where it starts: an alias or a digest.")]
AfterArgument = Annotated[
    str, typer.Argument(metavar="NAME[@REF]", help="Where it ends; @REF alone is of the same name.")
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Pack name.")]
StoreOption = Annotated[str | None, typer.Option("--store", help="s3://bucket/prefix or a folder [MODELPRESS_STORE].")]
AliasOption = Annotated[str, typer.Option("--alias", help="The pointer.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def parse_pack(text: str) -> tuple[str, str]:
    """Name and reference of `NAME[@REF]`."""
    name, _, ref = text.partition("@")
    return name, ref or CHAMPION


def parse_pair(before: str, after: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Names and references of two packs; `@REF` alone is of the first one's name."""
    name, ref = parse_pack(before)
    other, other_ref = parse_pack(after)
    return (name, ref), (other or name, other_ref)


def store_settings(store: str | None) -> Settings:
    """The settings, with the store that `--store` names."""
    export_store(store)
    from modelpress.settings import read_settings

    return read_settings()


def export_store(store: str | None) -> None:
    """`--store` is MODELPRESS_STORE for this process: flows and tasks read their settings from the environment."""
    if store is not None:
        os.environ["MODELPRESS_STORE"] = store


def opened_store(store: str | None) -> Store:
    """The store that `--store` or the settings name."""
    from modelpress.store import open_store

    settings = store_settings(store)
    return open_store(settings.store_uri, settings)


def echo(*what: Any) -> None:
    """Print, without rich's markup."""
    from rich.console import Console

    # A narrow terminal wraps lines; it does not cut digests short.
    Console(highlight=False, soft_wrap=True, width=WIDTH).print(*what, markup=False)


def rows_table(rows: Sequence[dict[str, str]]) -> Table:
    """A table of rows that have the same keys."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in rows[0]:
        table.add_column(head, no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    return table


class Bar:
    """A progress bar on stderr while a command works; nothing where nobody watches."""

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar

        self._bar = Bar(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _show(self, done: int, total: int, note: str = "") -> None:
        self._bar.update(self._task, completed=done, total=total, description=note or None)
