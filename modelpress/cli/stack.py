"""Commands on the local stack: `up`, `down`, `status`, `logs`, `env`."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelpress.cli.common import JsonOption, app, echo, rows_table

if TYPE_CHECKING:
    from modelpress.stack.layout import Folder, State

FolderOption = Annotated[
    Path | None,
    typer.Option(
        "--folder",
        help="Of the stack [MODELPRESS_STACK, else MODELPRESS_HOME/stack, else ~/.local/share/modelpress/stack].",
    ),
]


@app.command()
def up(
    folder: FolderOption = None,
    port: Annotated[
        list[str] | None,
        typer.Option(
            "--port", metavar="PART=PORT", help="Of s3, prefect, mlflow, worker or serving; 0 takes a free one."
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Where packs are published: s3://bucket/prefix, a folder, or `local`, an S3 server of its own [local]."
        ),
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(metavar="PART", help="Not started this time: worker or serving.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="Address to listen on; others than loopback are not encrypted.")
    ] = None,
    checkout: Annotated[Path | None, typer.Option(help="The clone that holds flows/ and infra/.")] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, and stop at Ctrl-C; for systemd and others.")
    ] = False,
) -> None:
    """Start the local stack: Prefect, MLflow, S3, a worker and the server, with logins, and keep them running.

    What was chosen (ports, store, checkout) is kept for the next start, and so are the data and the credentials.
    """
    from modelpress.stack import control

    place = _place(folder)
    wanted = control.Wanted(_ports(port or []), store, checkout, listen, tuple(without or ()))
    if foreground:
        control.stay(place, wanted)
    state = control.up(place, wanted, lambda line: echo(line))
    _show_doors(place, state)


@app.command()
def down(
    folder: FolderOption = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove its data and credentials, too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before deleting.")] = False,
) -> None:
    """Stop the local stack; its data stays, unless --delete."""
    from modelpress.stack import control

    place = _place(folder)
    if place.read_chosen() is None:
        echo(f"there is no stack in {place.path}")
        return
    if delete and not yes:
        typer.confirm(f"Remove {place.path} with every model, run and credential in it?", abort=True)
    control.down(place, lambda line: echo(line))
    if delete:
        control.delete(place)
    echo(f"stopped; {'removed ' if delete else 'its data stays in '}{place.path}")


@app.command()
def status(folder: FolderOption = None, as_json: JsonOption = False) -> None:
    """Show each part of the local stack; the exit code is 0 if all are healthy, else 3."""
    from modelpress.stack import control

    place = _place(folder)
    state = control.look(place)
    if as_json:
        typer.echo(state.model_dump_json(indent=2) if state else "null")
    elif state is None:
        echo(f"no stack was started in {place.path}: modelpress up")
    else:
        _show_state(state)
    if state is None or not state.healthy:
        raise typer.Exit(3)


@app.command()
def logs(
    part: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PART]...", help="s3, prefect, mlflow, prepare, worker, serving, supervisor; none: all."
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Last lines of each.")] = 20,
    folder: FolderOption = None,
) -> None:
    """Show the logs of the local stack's parts."""
    from modelpress.errors import ConfigError
    from modelpress.stack.supervisor import tail

    place = _place(folder)
    known = sorted(log.stem for log in place.logs.glob("*.log"))
    names = part or known
    if missing := [name for name in names if name not in known]:
        raise ConfigError(
            f"reading the log of {missing[0]}", found="none", expected=f"one of: {', '.join(known) or 'a start'}"
        )
    paths = {name: place.log(name) for name in names}
    ends = {name: path.stat().st_size for name, path in paths.items()}
    for name, path in paths.items():
        _print_lines(name if len(names) > 1 else "", tail(path, lines))
    while follow:
        time.sleep(0.3)
        for name, path in paths.items():
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(ends[name] if size >= ends[name] else 0)  # it was cut
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            ends[name] = (ends[name] if size >= ends[name] else 0) + len(whole)
            _print_lines(name if len(names) > 1 else "", whole.decode(errors="replace"))


@app.command()
def env(folder: FolderOption = None) -> None:
    """Print the line that lets a shell use the local stack: eval "$(modelpress env)".

    The line names a file that only you can read; no secret is printed.
    """
    from modelpress.errors import SetupError

    place = _place(folder)
    path = place.keys / "environment"
    if not path.is_file():
        raise SetupError("looking for the stack's environment", found=f"no {path}", fix="modelpress up")
    typer.echo(f". {shlex.quote(str(path))}")


def _place(folder: Path | None) -> Folder:
    from modelpress.errors import SetupError

    if sys.platform == "win32":
        raise SetupError("looking for the local stack", found="Windows", expected="Linux or macOS", fix="use WSL 2")
    from modelpress.stack.control import default_folder
    from modelpress.stack.layout import Folder

    return Folder(folder or default_folder())


def _ports(given: list[str]) -> dict[str, int]:
    from modelpress.errors import ConfigError

    ports = {}
    for text in given:
        name, _, number = text.partition("=")
        if not number.isdecimal() or int(number) > 65535:
            raise ConfigError("reading --port", found=text, expected="PART=PORT, like prefect=4200; 0 takes a free one")
        ports[name] = int(number)
    return ports


def _show_doors(place: Folder, state: State) -> None:
    keys, doors = place.keys, {part.name: part.address for part in state.parts}
    logins = {
        "prefect": f"the UI asks for a password: the line in {keys / 'prefect'}",
        "mlflow": f"user modelpress, password in {keys / 'mlflow'} (administrator: admin, {keys / 'mlflow-admin'})",
        "s3": f"keys in {keys / 's3-writer'}, and in {keys / 's3-reader'} for reading only",
        "serving": f"bearer token in {keys / 'serving'}",
    }
    rows = [{"part": name, "address": doors[name], "log in with": logins[name]} for name in logins if name in doors]
    echo(rows_table(rows))
    if "worker" in doors:
        echo(f"worker of {doors['worker']}: the deployments can be started in Prefect's UI")
    echo('in a shell:  eval "$(modelpress env)" && modelpress run configs/digits-quick.yaml')
    echo("see also:    modelpress status, logs, down")


def _show_state(state: State) -> None:
    rows = [
        {
            "part": part.name,
            "pid": str(part.pid or ""),
            "status": part.status,
            "since": part.since.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            "restarts": str(part.restarts),
            "address": part.address,
            "": part.why,
        }
        for part in state.parts
    ]
    echo(rows_table(rows))
    if state.phase != "up" or state.why:
        echo(f"{state.phase}{f': {state.why}' if state.why else ''}")


def _print_lines(name: str, text: str) -> None:
    for line in text.splitlines():
        typer.echo(f"{name:>10} | {line}" if name else line)
