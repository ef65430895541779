"""A Hugging Face folder whose linear weights are stored in few bits, in the layout of compressed-tensors.

It is what vLLM and transformers read; `quantize.packed` has the layout. Activations stay as they are: W4A16, W8A16.
The whole model is in memory, and what is written is judged; `modelpress.blockwise` writes the same tensors with one
block in memory. The tests load the folders with the reader of the package compressed-tensors.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelpress import hf_writer
from modelpress.agreement import mean_cosine
from modelpress.config import QuantizeConfig
from modelpress.errors import CoverageError, WorkloadError
from modelpress.evaluate import compare_modules
from modelpress.progress import Progress, silent
from modelpress.quantize.linear import BATCH_SIZE, check_config, choose_linears, round_linears_
from modelpress.quantize.packed import RoundedWeight, pack, quantization_config, scheme_name
from modelpress.reports import FolderReport, LayersReport
from modelpress.workload import Workload

CONFIDENCE = 0.95
REPORT_FILE = "quantize_report.json"


@dataclass(frozen=True)
class Rounded:
    """A model whose linear weights are rounded, and how they are stored."""

    module: nn.Module
    """Computes with what the codes stand for; otherwise as the module that was given."""
    model: PreTrainedModel
    """The Hugging Face model inside."""
    weights: dict[str, RoundedWeight]
    """By layer name in `model`."""
    dtype: torch.dtype
    """Of the scales and of all that is not rounded."""


def deliver(
    module: nn.Module,
    workload: Workload,
    config: QuantizeConfig,
    folder: Path,
    max_shard_size: int = hf_writer.SHARD_BYTES,
    progress: Progress = silent,
) -> FolderReport:
    """Round a Hugging Face model's linear layers and write the folder, whole or not at all.

    The layer that gives a language model's logits, and weights that several layers share, stay in float. So do the
    tensors that the module has left out and the source folder has (an unused pooler).

    Args:
        module: holds a transformers model, and takes `Batch.inputs` as keyword arguments; it stays as it is, in
            eval mode.
        workload: calibration data for `gptq` and for the agreement, held-out data for the metric; the tokenizer.
        config: of method `weight-only`; `targets` and `ignore` are names of the model's layers.
        folder: new, or empty.
        max_shard_size: bytes; a file is larger only where one tensor is.
        progress: told of each layer or block.

    Returns:
        What was done and what it cost; it stands in the folder too.

    Raises:
        ConfigError: a config that has no such form (see `linear.check_config`), patterns that match nothing, or a
            folder that is there.
        WorkloadError: no transformers model in the module, or one whose sizes its config cannot say.
        CoverageError: nothing to quantize, less than `min_coverage`, or too far from the float model.
        StageError: see `linear.choose_linears` and `linear.round_linears_`.
        StoreError: the folder cannot be written.
    """
    check_config(config)
    hf_writer.check_folder(folder)
    rounded, report, agreement = quantize(module, workload, config, progress)
    files = hf_writer.other_files(rounded.model, workload)
    named = tensors(rounded, hf_writer.left_out(rounded.model, workload))
    in_float = _in_float(rounded)
    document = model_config(rounded, config, in_float)
    judged = compare_modules(rounded.module, module, workload, CONFIDENCE, progress)
    size = sum(tensor.nbytes for tensor in named.values())
    coded = sum(one.nbytes for weight in rounded.weights.values() for one in pack(weight, rounded.dtype).values())
    before = size - coded + sum(weight.codes.numel() for weight in rounded.weights.values()) * rounded.dtype.itemsize
    made = FolderReport(
        scheme=scheme_name(config),
        quantize=report,
        agreement=agreement,
        quality=judged,
        in_float=in_float,
        dtype=str(rounded.dtype).removeprefix("torch."),
        source_bytes=before,
        size_bytes=size,
        compression_ratio=before / size,
    )
    files |= {
        "config.json": hf_writer.json_bytes(document),
        REPORT_FILE: hf_writer.json_bytes(made.model_dump(mode="json")),
    }
    hf_writer.write(named, files, folder, max_shard_size)
    return made


def quantize(
    module: nn.Module, workload: Workload, config: QuantizeConfig, progress: Progress = silent
) -> tuple[Rounded, LayersReport, float]:
    """Round the linear layers of a copy of the module.

    Returns:
        The copy and its codes; what was rounded; the agreement with the module on the calibration split, the mean
        cosine of the outputs.

    Raises:
        see `deliver`.
    """
    copied = copy.deepcopy(module).eval()
    prefix, model = find_model(copied)
    hf_writer.check_structure(model)
    dtype = hf_writer.stored_dtype(workload)
    choice = choose_linears(model, config)
    with torch.no_grad():  # what is judged is what is stored
        for value in model.state_dict(keep_vars=True).values():
            if value.is_floating_point():
                value.copy_(value.to(dtype))
    weights: dict[str, RoundedWeight] = {}

    def keep(name: str, _: nn.Module, weight: RoundedWeight) -> None:
        weights[name] = weight

    report = round_linears_(
        *(copied, choice, workload, config), prefix=prefix, stored_as=lambda _: dtype, put=keep, progress=progress
    )
    agreement = _agreement(copied, module, workload)
    _check(report, agreement, config)
    progress(len(weights), len(weights), f"coverage {report.coverage:.1%}, agreement {agreement:.4f}")
    return Rounded(copied, model, weights, dtype), report, agreement


def find_model(module: nn.Module) -> tuple[str, PreTrainedModel]:
    """The outermost transformers model of a module, and the prefix of its names.

    Raises:
        WorkloadError: there is none, or it is quantized already.
    """
    for name, child in module.named_modules():
        if isinstance(child, PreTrainedModel):
            if getattr(child.config, "quantization_config", None) is not None:
                raise WorkloadError(
                    "looking for the Hugging Face model",
                    found="one that is quantized already",
                    expected="float weights",
                )
            return f"{name}." if name else "", child
    raise WorkloadError(
        "looking for the Hugging Face model",
        found=f"a {type(module).__name__} without one",
        expected="a transformers model, whose folder vLLM and transformers read",
        fix="publish the ONNX graph instead: modelpress run",
    )


def tensors(rounded: Rounded, left_out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What the folder's safetensors files hold, by name; of names that share a tensor the first.

    Args:
        rounded: the model.
        left_out: tensors of the source folder that the module does without.
    """
    made: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in rounded.model.state_dict(keep_vars=True).items():
        layer, _, key = name.rpartition(".")
        if key == "weight" and layer in rounded.weights:
            made |= {f"{layer}.{part}": one for part, one in pack(rounded.weights[layer], rounded.dtype).items()}
        elif id(value) not in seen:
            made[name] = _as_stored(value, rounded.dtype)
        seen.add(id(value))
    return made | {name: _as_stored(value, rounded.dtype) for name, value in (left_out or {}).items()}


def model_config(rounded: Rounded, config: QuantizeConfig, in_float: list[str]) -> dict[str, Any]:
    """The folder's config.json: the model's own, and ``quantization_config``.

    Args:
        rounded: the model.
        config: how it was rounded.
        in_float: all its linear layers that stay in float.
    """
    document: dict[str, Any] = json.loads(rounded.model.config.to_json_string())
    document |= {
        "architectures": [type(rounded.model).__name__],
        "dtype": str(rounded.dtype).removeprefix("torch."),
        "quantization_config": quantization_config(config, in_float),
    }
    return document


def _in_float(rounded: Rounded) -> list[str]:
    """Names of the linear layers that a reader would otherwise take for quantized, the left-out ones among them."""
    skeleton = hf_writer.skeleton(rounded.model)
    return sorted(
        name for name, layer in skeleton.named_modules() if isinstance(layer, nn.Linear) and name not in rounded.weights
    )


def _as_stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
    return value.contiguous()


def _agreement(module: nn.Module, original: nn.Module, workload: Workload) -> float:
    """Mean cosine between the outputs of two modules on the calibration split; a batch's are held at a time."""
    total, samples = 0.0, 0
    original = original.eval()
    with torch.inference_mode():
        for batch in workload.batches("calibration", min(BATCH_SIZE, workload.evaluation_batch_size)):
            found, expected = (one(**batch.inputs).flatten(1).numpy() for one in (module, original))
            total, samples = total + mean_cosine(found, expected) * len(found), samples + len(found)
    return total / samples


def _check(report: LayersReport, agreement: float, config: QuantizeConfig) -> None:
    if 1.0 - agreement <= config.max_quality_drop:
        return
    raise CoverageError(
        f"quantizing linear layers ({report.method})",
        found=f"agreement {agreement:.4f} with the float model",
        expected=f"within quantize.max_quality_drop, {config.max_quality_drop}",
        fix="8 bits or smaller groups, quantize.algorithm 'gptq', sensitive layers in quantize.ignore, or a wider "
        "quantize.max_quality_drop",
    )
