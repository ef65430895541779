"""The command that KServe's init container runs: `kserve-init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelpress.cli.common import app
from modelpress.errors import ModelpressError


@app.command("kserve-init")
def kserve_init(
    pairs: Annotated[
        list[str],
        typer.Argument(metavar="SRC DEST...", help="modelpress://BUCKET/PREFIX/NAME@REF?as=LAYOUT, and a folder."),
    ],
    termination_log: Annotated[
        Path | None, typer.Option(help="Where an error goes as well [/dev/termination-log].")
    ] = None,
) -> None:
    """Fill a model server's folder from a pack: the storage initializer of KServe."""
    from modelpress import kserve

    try:
        for line in kserve.initialise(pairs, kserve.container_settings()):
            typer.echo(line)
    except ModelpressError as error:
        line = kserve.one_line(error)
        kserve.leave_message(line, termination_log or kserve.TERMINATION_LOG)
        typer.echo(f"error: {line}", err=True)
        raise typer.Exit(error.exit_code) from None
