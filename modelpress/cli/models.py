"""Commands that make models smaller, or another form of them: `run`, `plan`, `quantize`, `blockwise`, `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from modelpress.cli.common import Bar, JsonOption, StoreOption, app, echo, export_store, rows_table
from modelpress.errors import GateError


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A YAML recipe, such as configs/digits.yaml.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the whole line: optimise, publish, register, judge, promote."""
    from modelpress.config import load_config

    checked = load_config(config)  # before the orchestrator's seconds of start-up
    export_store(store)
    from flows.console import terminal

    with terminal():
        from flows.optimize import optimize
        from flows.result import table

        result = optimize(checked)
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        echo(rows_table(table(result.stages)))
        echo(f"pack {result.pack}\n{result.source_bytes:,} → {result.published_bytes:,} bytes, {result.uri}")
        for problem in result.page_problems:
            echo(f"not done, {problem}")
    if result.decision is None:
        return
    if not result.decision.promote:
        raise GateError(
            f"promoting {result.name}",
            found="; ".join(result.decision.reasons),
            fix="the pack is published and the champion is who it was; read the report, then change the recipe",
        )
    if not as_json:
        echo(f"{result.name}@{checked.gate.alias} is this pack now: modelpress serve {result.name}")


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe: name, workload, and perhaps export, plan, compress.")],
    to: Annotated[Path, typer.Option("--to", help="Folder for checkpoint, report and plot.")] = Path("plan"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the weights, what they may become and how much is to be measured.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Give each weight its own form: the fewest coded bytes, or the least time, within one budget of disagreement."""
    from modelpress.config import load_plan_recipe

    checked = load_plan_recipe(recipe)
    from modelpress import plan as planning
    from modelpress.export import export
    from modelpress.plan import show
    from modelpress.workload import check_disjoint, load_workload

    workload = load_workload(checked.workload)
    check_disjoint(workload)
    if not dry_run:
        show.check_folder(to, checked.name)
    with Bar("source") as progress:
        # A dry run looks at shapes: nothing is trained for it.
        untrained = dry_run and workload.trains_source
        source = workload.skeleton({}) if untrained else workload.source(progress)
    exported, _ = export(source, workload, checked.export)
    if dry_run:
        outlined = planning.outline(exported, workload, checked.plan)
        if as_json:
            typer.echo(json.dumps([one.model_dump(mode="json") for one in outlined], indent=2))
            return
        echo(rows_table(show.outline(outlined)))
        echo(show.effort(outlined, checked.plan))
        return
    with Bar("plan") as progress:
        if checked.plan.needs_module:
            from modelpress.plan.recovery import plan_module

            made, report = plan_module(
                source, exported, workload, checked.plan, checked.export, checked.compress, progress
            )
        else:
            made, report = planning.plan(exported, workload, checked.plan, checked.compress, progress)
    written = show.write(made, report, to, checked.name)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    echo(rows_table(show.tensors(report)))
    echo(rows_table(show.points(report)))
    echo(show.summary(report))
    echo("wrote " + ", ".join(map(str, written)))


@app.command()
def quantize(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe: workload, quantize and perhaps max_shard_size.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to write; a new or empty one.")],
    layout: Annotated[  # noqa: ARG001  the one there is; others may follow
        Literal["compressed-tensors"],
        typer.Option("--as", help="compressed-tensors: a Hugging Face folder as vLLM and transformers read it."),
    ] = "compressed-tensors",
    as_json: JsonOption = False,
) -> None:
    """Write a Hugging Face model with its linear weights in 4 or 8 bits, or float8; activations stay in float."""
    from modelpress.config import load_quantize_recipe

    checked = load_quantize_recipe(recipe)
    from modelpress import compressed_tensors, hf_writer
    from modelpress.quantize.linear import check_config
    from modelpress.workload import check_disjoint, load_workload

    check_config(checked.quantize)  # before hours are spent
    hf_writer.check_folder(to)
    workload = load_workload(checked.workload)
    check_disjoint(workload)
    with Bar("source") as progress:
        source = workload.source(progress)
    with Bar("quantize") as progress:
        report = compressed_tensors.deliver(source, workload, checked.quantize, to, checked.max_shard_size, progress)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    echo(f"{report.summary()}\nwrote {to}")


@app.command()
def blockwise(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe: workload, and prune or quantize.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to write; a new or empty one.")],
    as_json: JsonOption = False,
) -> None:
    """Prune or quantize a model larger than memory: from a folder into another, one block at a time."""
    from modelpress.config import load_blockwise_recipe

    checked = load_blockwise_recipe(recipe)
    from modelpress.blockwise import run_recipe, table
    from modelpress.hf_writer import check_folder

    check_folder(to)
    with Bar("blockwise") as progress:
        report = run_recipe(checked, to, progress)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    echo(rows_table(table(report)))
    echo(f"{report.method}: {report.coverage:.1%} of the eligible weights → {to}")


@app.command("export")
def export_program(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe: workload, and perhaps export.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to write; a new or empty one.")],
    layout: Annotated[  # noqa: ARG001  the one there is; the ONNX graph is what `run` makes
        Literal["stablehlo"], typer.Option("--as", help="stablehlo: for OpenXLA's compilers, run by JAX alone.")
    ] = "stablehlo",
    as_json: JsonOption = False,
) -> None:
    """Write the source model as StableHLO with its weights, for TPUs and whatever else OpenXLA compiles for."""
    from modelpress.config import load_export_recipe

    checked = load_export_recipe(recipe)
    from modelpress.stablehlo import check_folder, export_stablehlo
    from modelpress.workload import load_workload

    check_folder(to)  # before a source model is trained
    workload = load_workload(checked.workload)
    with Bar("source") as progress:
        source = workload.source(progress)
    with Bar("export") as progress:
        report = export_stablehlo(source, workload, checked.export, to, progress)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    echo(
        f"{report.weights} tensors, {report.weights_bytes:,} bytes; for {', '.join(report.platforms)}; differs by "
        f"up to {report.max_difference:.3g} on {report.ran_on}\nwrote {to}"
    )
