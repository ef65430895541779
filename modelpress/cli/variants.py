"""The command that tries variants of a recipe: `variants`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from modelpress.cli.common import JsonOption, StoreOption, app, echo, export_store, rows_table
from modelpress.errors import ConfigError

if TYPE_CHECKING:
    from modelpress.config import VariantsConfig
    from modelpress.variants.expand import Variant


@app.command()
def variants(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, as of `run`; variants differ from it.")],
    grid: Annotated[Path | None, typer.Option("--grid", help="A YAML file: grid, also, budgets, workers.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE,…", help="Values of a setting; several --set are combined."),
    ] = None,
    objective: Annotated[
        Literal["bytes", "quality", "latency"] | None,
        typer.Option("--objective", help="What the best has the best of."),
    ] = None,
    max_quality_drop: Annotated[
        float | None,
        typer.Option("--max-quality-drop", min=0, help="Budget, by the whole interval [the gate's margin]."),
    ] = None,
    max_bytes: Annotated[int | None, typer.Option("--max-bytes", min=0, help="Budget of graph and tensors.")] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option("--max-latency-ms", min=0, help="Budget of a call at the smallest batch.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes on this machine [2].")] = None,
    publish: Annotated[bool, typer.Option("--publish", help="Publish the best, and judge it by the recipe.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and what is shared.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Try variants of a recipe side by side: which no other beats, and the best within budgets; publishes nothing."""
    from modelpress.config import load_config

    checked = load_config(recipe)
    asked = {
        "objective": objective,
        "max_quality_drop": max_quality_drop,
        "max_bytes": max_bytes,
        "max_latency_seconds": max_latency_ms / 1000 if max_latency_ms is not None else None,
        "workers": workers,
        "publish": publish or None,
    }
    config = _config(grid, settings or [], {name: value for name, value in asked.items() if value is not None})
    from modelpress.variants.expand import expand

    found = expand(checked, config)  # before the orchestrator's seconds of start-up
    if dry_run:
        _outline(found, as_json)
        return
    export_store(store)
    from flows.console import terminal

    with terminal():
        from flows.variants import optimize_variants

        report = optimize_variants(checked, config)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    from modelpress.variants import show

    echo(rows_table(show.table(report, {one.number: one.label for one in found})))
    echo("\n" + show.summary(report))
    echo(f"table, plot and runs: {report.mlflow_url}")
    if report.pack is not None:
        echo(f"published as pack {report.pack}")


def _config(grid: Path | None, settings: list[str], asked: dict[str, Any]) -> VariantsConfig:
    """What the file says, with what the options say in its place."""
    from modelpress.config import load_variants, parse_variants
    from modelpress.variants.expand import parse_setting

    named: dict[str, list[Any]] = {}
    for text in settings:
        name, values = parse_setting(text)
        if name in named:
            raise ConfigError(f"reading --set {text!r}", found=f"{name} twice", expected="all its values in one --set")
        named[name] = values
    document: dict[str, Any] = load_variants(grid).model_dump(mode="json") if grid is not None else {}
    document |= asked
    if named:
        document["grid"] = {**document.get("grid", {}), **named}
    return parse_variants(document, origin=str(grid) if grid is not None else "the options")


def _outline(found: list[Variant], as_json: bool) -> None:
    """The variants and the runs that they take, without running one."""
    from modelpress.variants.schedule import schedule

    steps = schedule([one.recipe for one in found])
    rows = [
        {
            "run": str(place),
            "after": "–" if step.after is None else str(step.after),
            "what": found[step.variants[0]].label
            if step.last is None
            else f"up to {step.last}, for {len(step.variants)}",
        }
        for place, step in enumerate(steps)
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    echo(rows_table(rows))
    echo(f"{len(found)} variants in {len(steps)} runs")
