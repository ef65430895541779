"""The command that says which resource binds: `profile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelpress.cli.common import Bar, JsonOption, StoreOption, app, echo, opened_store, parse_pack, rows_table
from modelpress.errors import ConfigError

if TYPE_CHECKING:
    from modelpress.config import OptimizeConfig, ProfileConfig
    from modelpress.profile.run import Subject
    from modelpress.progress import Progress
    from modelpress.reports import ProfileReport
    from modelpress.store import Store

_RECIPE_SUFFIXES = (".yaml", ".yml")


@app.command()
def profile(
    what: Annotated[str, typer.Argument(metavar="RECIPE|NAME[@REF]", help="A YAML recipe, or a published pack.")],
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="For a pack: the recipe whose `profile` and workload are taken.")
    ] = None,
    plots: Annotated[Path | None, typer.Option("--plots", help="Folder for plots of the profile, as PNG.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Operators shown; --json has all of them.")] = 15,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure which resource binds: compute, memory bandwidth, storage and transfer, latency, or energy and cost."""
    from modelpress.config import ProfileConfig, load_config

    checked = load_config(what) if what.endswith(_RECIPE_SUFFIXES) else None
    if recipe is not None and checked is not None:
        raise ConfigError("reading --recipe", found=f"it beside the recipe {what}", expected="it beside a pack alone")
    of_pack = load_config(recipe) if recipe is not None else None
    given = checked or of_pack
    config = (given.profile if given is not None else None) or ProfileConfig()
    if plots is not None:
        _make_folder(plots)
    from modelpress.profile.run import profile as run
    from modelpress.settings import read_settings

    with Bar("profile") as progress:
        if checked is not None:
            subject = _of_recipe(checked, config, progress)
            report = run(subject, config, checked.compress, progress)
        else:
            report = run(_of_pack(opened_store(store), what, of_pack), config, progress=progress)
    report = report.model_copy(update={"hardware": read_settings().hardware or None})
    written = []
    if plots is not None:
        from modelpress.profile import figures

        written = figures.draw(report, plots)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    _show(report, top)
    if written:
        echo("wrote " + ", ".join(map(str, written)))


def _make_folder(folder: Path) -> None:
    from modelpress.store.local import local_errors

    with local_errors(f"making the folder {folder} for plots", writing=True):
        folder.mkdir(parents=True, exist_ok=True)


def _of_recipe(recipe: OptimizeConfig, config: ProfileConfig, progress: Progress) -> Subject:
    """The source model of a recipe: its graph, or the torch module itself."""
    from modelpress.checkpoint import from_module
    from modelpress.export import export
    from modelpress.profile.run import Subject
    from modelpress.workload import load_workload

    workload = load_workload(recipe.workload)
    module = workload.source(progress).eval()
    if config.runtime == "torch":
        return Subject(recipe.name, from_module(module), workload.example, module=module)
    exported, _ = export(module, workload, recipe.export)
    return Subject(recipe.name, exported, workload.example)


def _of_pack(store: Store, what: str, recipe: OptimizeConfig | None) -> Subject:
    """A published graph, with the inputs of a recipe's workload or, without one, its golden samples."""
    from modelpress.load import load_checkpoint, resolve
    from modelpress.profile import packed
    from modelpress.profile.run import Subject
    from modelpress.profile.samples import golden_example
    from modelpress.workload import load_workload

    name, ref = parse_pack(what)
    digest = resolve(store, name, ref)
    _, checkpoint = load_checkpoint(store, name, digest)
    example = load_workload(recipe.workload).example if recipe is not None else golden_example(checkpoint, what)
    return Subject(f"{name}@{digest[:12]}", checkpoint, example, placed=packed.open_placed(store, name, digest))


def _show(report: ProfileReport, top: int) -> None:
    from modelpress.profile import show

    echo("\n".join(show.machine(report)))
    for rows in (
        show.operators(report, top),
        show.latencies(report),
        show.loads(report),
        show.figures(report),
        show.verdict(report),
    ):
        if rows:
            echo("")
            echo(rows_table(rows))
    echo(f"\n{report.subject} is bound by {report.verdict.reason}")
