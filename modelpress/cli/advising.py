"""The command that says what to do: `advise`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelpress.cli.common import Bar, JsonOption, app, echo, rows_table

if TYPE_CHECKING:
    from modelpress.reports import ProfileReport


@app.command()
def advise(
    recipe: Annotated[
        Path, typer.Argument(help="A YAML recipe: name, workload, advise; with --check, the advice that was written.")
    ],
    profile: Annotated[
        Path | None, typer.Option("--profile", help="What `modelpress profile` wrote of the model on this machine.")
    ] = None,
    to: Annotated[Path, typer.Option("--to", help="Folder for the advice and the advised recipe.")] = Path("advice"),
    check: Annotated[
        Path | None,
        typer.Option("--check", help="What `modelpress run RECIPE --json` printed: put foretold beside measured."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Rank the techniques for a model, a budget and a machine, by what is foretold of each, with a recipe to run."""
    if check is not None:
        _check(recipe, check, as_json)
        return
    from modelpress.config import load_advise_recipe

    checked = load_advise_recipe(recipe)
    from modelpress import advise as advising
    from modelpress.advise import show
    from modelpress.settings import read_settings
    from modelpress.workload import load_workload

    show.check_folder(to, checked.name)
    known = _profile(profile)
    workload = load_workload(checked.workload)
    with Bar("advise") as progress:
        report = advising.advise(checked, workload, profile=known, home=read_settings().home, progress=progress)
    written = show.write(report, to)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    echo(rows_table(show.table(report)))
    echo("\n" + show.reasons(report))
    echo("\n" + show.summary(report))
    echo("wrote " + ", ".join(map(str, written)))


def _check(advice: Path, run: Path, as_json: bool) -> None:
    from modelpress.advise import CHECKS_FILE, past, show
    from modelpress.advise import check as checking
    from modelpress.settings import read_settings

    report = checking.read(advice)
    found = checking.compare(report, checking.measured(run, report.batch_size))
    past.keep(found, read_settings().home / CHECKS_FILE)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    echo(rows_table(show.check_table(found)))


def _profile(path: Path | None) -> ProfileReport | None:
    from pydantic import ValidationError

    from modelpress.errors import ConfigError
    from modelpress.reports import ProfileReport

    if path is None:
        return None
    try:
        return ProfileReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"reading profile {path}", found=str(error), expected="what `modelpress profile` wrote"
        ) from error
