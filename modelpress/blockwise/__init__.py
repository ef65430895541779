"""Models larger than memory: from a Hugging Face folder to another, with one block in memory at a time.

The methods are those of `modelpress.prune` and `modelpress.quantize`, and so are the numbers: they are told that the
weights are elsewhere (`modelpress.residence`), and each block is read, changed and written when its turn comes. Beyond
it there are the calibration data's activations, and for methods that judge by them one block's statistics, whose size
follows the widths of the layers and not their number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from modelpress import __version__
from modelpress.blockwise.paged import Paged, without_memory
from modelpress.config import BlockwiseRecipe, Config, PruneConfig, QuantizeConfig
from modelpress.errors import ConfigError, StageError, WorkloadError
from modelpress.hf_writer import json_bytes, new_folder, small_files
from modelpress.progress import Progress, silent
from modelpress.prune import prune_
from modelpress.quantize.linear import check_config, choose_linears, round_linears_
from modelpress.quantize.packed import RoundedWeight, pack, quantization_config, unpack
from modelpress.reports import LayersReport, PruneReport, Report
from modelpress.workload import Workload, load_workload
from modelpress.workloads.hf_folder import read_object

REPORT_FILE = "blockwise_report.json"
"""What was done, from which folder: written beside the weights."""

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

    That has the layout of compressed-tensors, which vLLM reads, and transformers with compressed-tensors installed. Its
    tensors are those that `compressed_tensors.deliver` makes of the whole model. Scales are rounded to the dtype that
    the weight had.

    Args:
        workload: names a Hugging Face folder; a model larger than memory is read block by block.
        config: `weight-only` by `rtn`, `gptq` or `fp8`; `targets` and `ignore` are names or globs of the Hugging Face
            model's linear layers. The float model is not run beside it: `max_quality_drop` must be left as it is.
        to: a folder that is not there yet. It appears when it is whole.
        progress: called once per block.
        scratch_on_disk: keep what the calibration data give, activations between two blocks and second moments, in
            files beside `to`: the kernel may take their pages back.

    Raises:
        ConfigError, WorkloadError, CoverageError, StageError, CorruptionError, StoreFullError: see `prune_folder` and
            `linear.choose_linears`.
    """
    check_config(config)
    if config.max_quality_drop != QuantizeConfig.model_fields["max_quality_drop"].default:
        raise ConfigError(
            "quantizing a model block by block",
            found=f"quantize.max_quality_drop {config.max_quality_drop}",
            expected="none: the float model is not run beside it",
            fix="leave it out, and judge the folder that this makes",
        )

    def work(paged: Paged) -> tuple[LayersReport, Mapping[str, Any]]:
        def stored_as(layer: nn.Module) -> torch.dtype:
            return paged.source[paged.names[layer.get_parameter("weight")]].dtype

        def put(name: str, layer: nn.Module, weight: RoundedWeight) -> None:
            def read(found: Mapping[str, Tensor]) -> Tensor:
                return unpack({part.removeprefix(f"{name}."): one for part, one in found.items()}, config).dequantize()

            tensors = {f"{name}.{part}": one for part, one in pack(weight, stored_as(layer)).items()}
            paged.pack(layer.get_parameter("weight"), (tensors, read))

        choice = choose_linears(paged.module.get_submodule(paged.prefix.rstrip(".")), config)
        report = round_linears_(
            *(paged.module, choice, workload, config),
            prefix=paged.prefix,
            stored_as=stored_as,
            put=put,
            residence=paged,
            progress=progress,
        )
        return report, {"quantization_config": quantization_config(config, choice.in_float)}

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
        document = {**read_object(folder / "config.json"), **changes}
        files = {"config.json": json_bytes(document), REPORT_FILE: json_bytes(facts)}
        writer.finish(small_files(folder) | files)
    return report
