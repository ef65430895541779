"""The command line: one door to all parts. Each command imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING

import typer

from modelpress.cli import (
    access,
    advising,
    caches,
    canaries,
    comparing,
    folders,
    hooks,
    housekeeping,
    kserve,
    models,
    packs,
    pages,
    parts,
    pointers,
    profiling,
    secrecy,
    servers,
    signing,
    stack,
    submodels,
    variants,
)
from modelpress.cli.common import app
from modelpress.errors import ModelpressError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "access",
    "advising",
    "app",
    "caches",
    "canaries",
    "comparing",
    "folders",
    "hooks",
    "housekeeping",
    "kserve",
    "main",
    "models",
    "packs",
    "pages",
    "parts",
    "pointers",
    "profiling",
    "secrecy",
    "servers",
    "signing",
    "stack",
    "submodels",
    "variants",
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. Known errors become a message and the exit code of their kind."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except ModelpressError as error:
        typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
        typer.echo(str(error), err=True)
        sys.exit(error.exit_code)
    except Exception:  # noqa: BLE001  the last resort: what nobody foresaw keeps its traceback
        traceback.print_exc()
        typer.echo("error: unforeseen; this is a fault of modelpress, please report the lines above", err=True)
        sys.exit(1)
