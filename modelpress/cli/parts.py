"""The command that splits a model: `partition`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from modelpress.cli.common import Bar, JsonOption, app, echo, rows_table

if TYPE_CHECKING:
    from torch import nn

    from modelpress.parallel.outline import Outline
    from modelpress.parallel.tensor import TensorPlan
    from modelpress.reports import PartitionReport


@app.command()
def partition(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, as of `run`; its workload's model is split.")],
    parts: Annotated[int, typer.Option("--parts", min=1, help="Stages of the pipeline.")] = 2,
    by: Annotated[
        Literal["bytes", "flops", "seconds"],
        typer.Option("--by", help="What is to be even; seconds are measured here."),
    ] = "bytes",
    tensor: Annotated[int, typer.Option("--tensor", min=1, help="Ranks that share each layer.")] = 1,
    microbatches: Annotated[int, typer.Option("--microbatches", min=1, help="Of a batch, for the bubble.")] = 8,
    samples: Annotated[int, typer.Option("--samples", min=2, help="In the example that is run.")] = 8,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw it: a .svg, .png or .pdf.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Split a model's blocks into parts, the dearest as cheap as it can be, and prove that the parts are the model."""
    from modelpress.config import load_config

    checked = load_config(recipe)
    from modelpress.parallel.costs import split
    from modelpress.parallel.outline import outline
    from modelpress.parallel.pipeline import prove
    from modelpress.parallel.tensor import plan_tensors
    from modelpress.workload import load_workload

    workload = load_workload(checked.workload)
    with Bar("source") as progress:
        # Shapes decide: nothing is trained for it.
        module = workload.skeleton({}).eval() if workload.trains_source else workload.source(progress)
    inputs = workload.example(samples)
    outlined = outline(module, inputs)
    with Bar("partition") as progress:
        chosen, report = split(module, inputs, parts, by, outlined=outlined, progress=progress)
    prove(module, outlined, chosen.bounds, inputs)
    plan = plan_tensors(module, tensor, inputs) if tensor > 1 else {}
    if plot is not None:
        from modelpress.parallel.figure import draw

        draw(report, plot)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    _show(report, module, outlined, plan, tensor, microbatches)
    if plot is not None:
        echo(f"wrote {plot}")


def _show(
    report: PartitionReport, module: nn.Module, outlined: Outline, plan: TensorPlan, tensor: int, microbatches: int
) -> None:
    from modelpress.parallel.partition import bubble

    rows = []
    for number, part in enumerate(report.parts):
        row = {
            "part": str(number),
            "blocks": f"{part.first_block} … {part.last_block}" if part.blocks > 1 else part.first_block,
            "bytes": f"{part.size_bytes:,}",
            "flops": f"{part.flops:,}",
            "forward, ms": f"{part.forward_seconds * 1e3:.2f}",
        }
        if plan:
            row[f"bytes on each of {tensor}"] = f"{_share_bytes(module, outlined, report, number, plan, tensor):,}"
        rows.append(row)
    echo(rows_table(rows))
    echo(
        f"by {report.by}: the dearest part is {report.imbalance:.3f} × the mean, and no split has less; equally many "
        f"blocks: {report.equal_counts_imbalance:.3f}"
    )
    share = bubble(len(report.parts), microbatches)
    echo(f"{microbatches} microbatches: each part waits {share:.1%} of the time, were all parts equal")
    if plan:
        echo(f"{len(plan)} layers are cut among {tensor} ranks")


def _share_bytes(
    module: nn.Module, outlined: Outline, report: PartitionReport, part: int, plan: TensorPlan, ranks: int
) -> int:
    """Bytes of what each tensor-parallel rank of a part holds."""
    from modelpress.parallel.tensor import axis_of

    tensors = outlined.parameters(module, tuple(report.bounds), part)
    unique = {id(tensor): (name, tensor) for name, tensor in tensors.items()}
    sizes = [
        tensor.numel() * tensor.element_size() // (1 if axis_of(name, plan) is None else ranks)
        for name, tensor in unique.values()
    ]
    return sum(sizes)
