"""Models larger than memory: from a Hugging Face folder to another, with one block in memory at a time.

The methods are those of `modelpress.prune` and `modelpress.quantize`, and so are the numbers: they are told that the
weights are elsewhere (`modelpress.residence`), and each block is read, changed and written when its turn comes. Beyond
it there are the calibration data's activations, and for methods that judge by them one block's statistics, whose size
follows the widths of the layers and not their number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from modelpress import __version__
from modelpress.blockwise.folder import new_folder
from modelpress.blockwise.packed import describe, pack, unpack
from modelpress.blockwise.paged import Paged, without_memory
from modelpress.config import BlockwiseRecipe, Config, PruneConfig, QuantizeConfig
from modelpress.errors import StageError, WorkloadError
from modelpress.layerwise import users
from modelpress.progress import Progress, silent
from modelpress.prune import prune_
from modelpress.quantize.groups import Grid, GroupedWeight
from modelpress.quantize.layers import quantize_layers_
from modelpress.reports import LayersReport, PruneReport, Report
from modelpress.workload import Workload, load_workload

WITHOUT_MEMORY = re.compile(r"\b(device|on|and) meta\b|\bmeta (tensor|device|and)|'Meta' backend")
"""What torch says of a tensor without memory that something tries to read; a path may have a `meta` in it too."""

ReportT = TypeVar("ReportT", bound=Report)


def run_recipe(recipe: BlockwiseRecipe, to: Path, progress: Progress = silent) -> PruneReport | LayersReport:
    """Do what a recipe says; see `prune_folder` and `quantize_folder`."""
    workload = load_workload(recipe.workload)
    if recipe.prune is not None:
        return prune_folder(workload, recipe.prune, to, progress, scratch_on_disk=recipe.scratch_on_disk)
    assert recipe.quantize is not None
    return quantize_folder(workload, recipe.quantize, to, progress, scratch_on_disk=recipe.scratch_on_disk)


def table(report: PruneReport | LayersReport) -> list[dict[str, str]]:
    """A row of texts per changed weight."""
    if isinstance(report, LayersReport):
        return [
            {"weight": row.name, "bits": str(row.num_bits), "rows": _text(row.calibration_rows)}
            | {"weight error": f"{row.weight_error:.3g}", "output error": _text(row.output_error)}
            for row in report.layers
        ]
    return [
        {"weight": row.name, "zeros": f"{row.zeros / prod(row.after):.1%}", "rows": _text(row.calibration_rows)}
        | {"output error": _text(row.output_error)}
        for row in report.tensors
    ]


def _text(number: float | None) -> str:
    return "not measured" if number is None else f"{number:,}" if isinstance(number, int) else f"{number:.3g}"


def prune_folder(
    workload: Workload,
    config: PruneConfig,
    to: Path,
    progress: Progress = silent,
    *,
    scratch_on_disk: bool = False,
) -> PruneReport:
    """Prune the model that a workload reads from a Hugging Face folder, and write it into another.

    The weights are those of `prune_` on the whole model, in the dtype that the folder has them in; a weight that
    `sparsegpt` updates is rounded to it before the next block sees it.

    Args:
        workload: names a Hugging Face folder; a model larger than memory is read block by block.
        config: `magnitude`, `wanda` or `sparsegpt`, by layer and without `recovery`.
        to: a folder that is not there yet. It appears when it is whole.
        progress: called once per block.
        scratch_on_disk: keep what the calibration data give, activations between two blocks and second moments, in
            files beside `to`: the kernel may take their pages back.

    Raises:
        ConfigError: `to` is there already, an option that needs all weights at once, or a pattern without a match.
        WorkloadError: no folder, a model without blocks, or a folder whose tensors are not its model's.
        CoverageError, StageError: see `prune_`; a tensor that is NaN or infinite is named when it is read.
        CorruptionError: a file is damaged or cut short.
        StoreFullError: the disk is full; nothing of `to` stays.
    """

    def work(paged: Paged) -> tuple[PruneReport, Mapping[str, Any]]:
        return prune_(paged.module, workload, config, progress, paged), {}

    return _from_folder_to_folder(workload, config, to, scratch_on_disk, work)


def quantize_folder(
    workload: Workload,
    config: QuantizeConfig,
    to: Path,
    progress: Progress = silent,
    *,
    scratch_on_disk: bool = False,
) -> LayersReport:
    """Quantize the linear layers of a model that a workload reads from a Hugging Face folder into another folder.

    That has the layout of compressed-tensors (`pack-quantized`), which vLLM reads, and transformers with
    compressed-tensors installed. Scales are rounded to the dtype that the weight had.

    Args:
        workload: names a Hugging Face folder; a model larger than memory is read block by block.
        config: `weight-only` by `rtn` or `gptq`; `targets` and `ignore` are module names or globs. There is no search
            for layers to leave in float: `max_quality_drop` must be left as it is.
        to: a folder that is not there yet. It appears when it is whole.
        progress: called once per block.
        scratch_on_disk: keep what the calibration data give, activations between two blocks and second moments, in
            files beside `to`: the kernel may take their pages back.

    Raises:
        ConfigError, WorkloadError, CoverageError, StageError, CorruptionError, StoreFullError: see `prune_folder` and
            `quantize_layers_`; a layer whose inputs `quantize.group_size` does not divide.
    """
    grid = Grid(config.num_bits, config.group_size, config.symmetric)

    def work(paged: Paged) -> tuple[LayersReport, Mapping[str, Any]]:
        packed: set[nn.Module] = set()

        def put(layer: nn.Module, weight: GroupedWeight) -> GroupedWeight:
            parameter = layer.get_parameter("weight")
            name = paged.names[parameter]
            scale = weight.scale.to(paged.source[name].dtype)
            if not bool((scale > 0).all() & torch.isfinite(scale).all()):
                raise StageError(
                    f"packing {name}",
                    found=f"scales that {paged.source[name].entry.dtype} does not hold",
                    expected="scales above 0, and finite",
                    fix="name the layer in quantize.ignore",
                )
            tensors = pack(name, replace(weight, scale=scale))
            paged.pack(parameter, (tensors, lambda found: unpack(name, found, grid).dequantize()))
            packed.update(users(paged.module, layer))
            return replace(weight, scale=scale.float())

        report = quantize_layers_(paged.module, workload, config, progress, paged, put, full_groups=True)
        linears = [(name, one) for name, one in paged.module.named_modules() if isinstance(one, nn.Linear)]
        ignored = [name.removeprefix(paged.prefix) for name, one in linears if one not in packed]
        return report, {"quantization_config": describe(grid, ignored)}

    return _from_folder_to_folder(workload, config, to, scratch_on_disk, work)


def _from_folder_to_folder(
    workload: Workload,
    config: Config,
    to: Path,
    scratch_on_disk: bool,
    work: Callable[[Paged], tuple[ReportT, Mapping[str, Any]]],
) -> ReportT:
    """Open, let `work` change and write blocks, write the rest, and give the folder its name."""
    place = workload.weights()
    if place is None:
        raise WorkloadError(
            "taking a model block by block",
            found=f"a workload ({type(workload).__name__}) whose model is not read from a Hugging Face folder as it is",
            expected="`workload.kind` causal-lm and a `workload.model` that is a folder of safetensors",
            fix="use the line (modelpress run): it holds the whole model in memory",
        )
    folder, prefix = place
    with new_folder(to) as writer:
        with without_memory():
            module = workload.skeleton({})
        paged = Paged(module, folder, prefix, writer, scratch_on_disk=scratch_on_disk)
        try:
            report, changes = work(paged)
        except RuntimeError as error:
            if not WITHOUT_MEMORY.search(str(error)):
                raise
            raise StageError(
                f"running the model of {folder} block by block",
                found=f"a weight that is used outside the module that it belongs to ({str(error)[:200]})",
                expected="modules that use their own weights",
                fix="use the line (modelpress run): it holds the whole model in memory",
            ) from error
        finally:
            paged.close()
        paged.write_rest()
        facts = {"modelpress": __version__, "source": workload.identity(), "config": config.model_dump(mode="json")}
        facts |= {"report": report.model_dump(mode="json"), "sizes": paged.sizes()}
        writer.finish(folder, changes, facts)
    return report
