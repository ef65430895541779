"""A Hugging Face folder whose linear weights are stored in few bits, in the layout of compressed-tensors.

It is what vLLM and transformers read. ``pack-quantized``: integer codes, eight of 4 bits or four of 8 in an int32 with
the first lowest, scales and (unless symmetric) zero points per group of inputs. ``float-quantized``: float8 e4m3 and a
scale per output channel, or one. Activations stay as they are: W4A16, W8A16. Source: the package compressed-tensors
0.20, whose reader the tests load the folders with; it is not needed to write one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelpress import hf_writer
from modelpress.agreement import mean_cosine
from modelpress.config import QuantizeConfig
from modelpress.errors import ConfigError, CoverageError, WorkloadError
from modelpress.evaluate import compare_modules
from modelpress.progress import Progress, silent
from modelpress.quantize import weight_only_method
from modelpress.quantize.float8 import Float8Weight
from modelpress.quantize.linear import RoundedWeight, chosen_linears, eligible_linears, round_linears_
from modelpress.quantize.nbits import in_bytes
from modelpress.reports import FolderReport, QuantizeReport
from modelpress.workload import Workload

CONFIDENCE = 0.95
REPORT_FILE = "quantize_report.json"

_BATCH = 32


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
        ConfigError: a config that has no such form (see `check_config`), patterns that match nothing, or a folder that
            is there.
        WorkloadError: no transformers model in the module, or one whose sizes its config cannot say.
        CoverageError: nothing to quantize, less than `min_coverage`, or too far from the float model.
        StageError: see `linear.chosen_linears` and `linear.round_linears_`.
        StoreError: the folder cannot be written.
    """
    check_config(config)
    hf_writer.check_folder(folder)
    rounded, report = quantize(module, workload, config, progress)
    files = hf_writer.other_files(rounded.model, workload)
    named = tensors(rounded, hf_writer.left_out(rounded.model, workload))
    in_float = _in_float(rounded)
    document = model_config(rounded, config, in_float)
    judged = compare_modules(rounded.module, module, workload, CONFIDENCE, progress)
    size = sum(tensor.nbytes for tensor in named.values())
    coded = sum(one.nbytes for weight in rounded.weights.values() for one in stored(weight, rounded.dtype).values())
    before = size - coded + sum(weight.codes.numel() for weight in rounded.weights.values()) * rounded.dtype.itemsize
    made = FolderReport(
        scheme=scheme_name(config),
        quantize=report,
        quality=judged,
        layers=sorted(rounded.weights),
        in_float=in_float,
        dtype=str(rounded.dtype).removeprefix("torch."),
        source_bytes=before,
        size_bytes=size,
        compression_ratio=before / size,
    )
    files |= {
        "config.json": (json.dumps(document, indent=2, sort_keys=True) + "\n").encode(),
        REPORT_FILE: (made.model_dump_json(indent=2) + "\n").encode(),
    }
    hf_writer.write(named, files, folder, max_shard_size)
    return made


def quantize(
    module: nn.Module, workload: Workload, config: QuantizeConfig, progress: Progress = silent
) -> tuple[Rounded, QuantizeReport]:
    """Round the linear layers of a copy of the module.

    Returns:
        The copy and its codes; coverage counts the weights of the layers that are rounded among those that could be.

    Raises:
        see `deliver`.
    """
    check_config(config)
    copied = copy.deepcopy(module).eval()
    prefix, model = find_model(copied)
    hf_writer.check_structure(model)
    dtype = hf_writer.stored_dtype(workload)
    outputs: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    eligible = eligible_linears(model, outputs)
    others = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name not in eligible]
    chosen = chosen_linears(eligible, others, config)
    with torch.no_grad():  # what is judged is what is stored
        for value in model.state_dict(keep_vars=True).values():
            if value.is_floating_point():
                value.copy_(value.to(dtype))
    names = {f"{prefix}{name}": name for name in chosen}
    found = round_linears_(copied, list(names), workload, config, dtype, progress)
    weights = {names[full]: weight for full, weight in found.items()}
    total, taken = (sum(layer.weight.numel() for layer in some.values()) for some in (eligible, chosen))
    report = QuantizeReport(
        method=weight_only_method(config),
        eligible_weights=total,
        quantized_weights=taken,
        coverage=taken / total,
        agreement=_agreement(copied, module, workload),
    )
    _check(report, config)
    progress(len(names), len(names), f"coverage {report.coverage:.1%}, agreement {report.agreement:.4f}")
    return Rounded(copied, model, weights, dtype), report


def check_config(config: QuantizeConfig) -> None:
    """Refuse what the format cannot hold, before anything is loaded.

    Raises:
        ConfigError: another method than `weight-only`, real zero points, or embedding tables.
    """
    obstacles = {
        f"quantize.method {config.method!r}": ("'weight-only'", config.method != "weight-only"),
        "quantize.algorithm 'hqq', whose zero points are real numbers": (
            "'gptq', 'rtn' or 'fp8': zero points are integers here",
            config.algorithm == "hqq",
        ),
        "quantize.embeddings true": ("false: only linear layers are stored in few bits", config.embeddings),
    }
    for found, (expected, refused) in obstacles.items():
        if refused:
            raise ConfigError("preparing a compressed-tensors folder", found=found, expected=expected)


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
            made |= {f"{layer}.{part}": one for part, one in stored(rounded.weights[layer], rounded.dtype).items()}
        elif id(value) not in seen:
            made[name] = _as_stored(value, rounded.dtype)
        seen.add(id(value))
    return made | {name: _as_stored(value, rounded.dtype) for name, value in (left_out or {}).items()}


def stored(weight: RoundedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """One layer's tensors by the format's names.

    Args:
        weight: (out, in).
        dtype: of the scales, which it must hold exactly.

    Returns:
        ``weight_packed`` (out, in · bits ÷ 32) int32, ``weight_scale`` (out, groups), ``weight_zero_point``
        (out · bits ÷ 32, groups) int32 unless symmetric, ``weight_shape`` (2,) int64; or ``weight`` (out, in)
        float8_e4m3fn and ``weight_scale`` (out, 1) or (1,).
    """
    if isinstance(weight, Float8Weight):
        scale = weight.scale.reshape(1) if weight.axis is None else weight.scale
        return {"weight": weight.codes.contiguous(), "weight_scale": scale.to(dtype).contiguous()}
    bits = weight.grid.num_bits
    made = {
        "weight_packed": _in_words(weight.codes, bits),
        "weight_scale": weight.scale.to(dtype).contiguous(),
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not weight.grid.symmetric:
        made["weight_zero_point"] = _in_words(weight.zero_point.T.contiguous(), bits).T.contiguous()
    return made


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


def quantization_config(config: QuantizeConfig, ignore: list[str]) -> dict[str, Any]:
    """What compressed-tensors' `QuantizationConfig` reads.

    Args:
        config: of method `weight-only`.
        ignore: names of linear layers that stay in float.
    """
    float8 = config.algorithm == "fp8"
    weights: dict[str, Any] = {"num_bits": config.num_bits, "symmetric": config.symmetric, "dynamic": False}
    if float8:
        weights |= {"type": "float", "strategy": "channel" if config.per_channel else "tensor"}
    else:
        weights |= {"type": "int", "strategy": "group", "group_size": config.group_size}
    if config.act_order:
        weights["actorder"] = "weight"  # the order of rounding alone: groups are of neighbours, and no index is stored
    layout = "float-quantized" if float8 else "pack-quantized"
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {"group_0": scheme | {"format": layout}},
        "ignore": sorted(ignore),
    }


def scheme_name(config: QuantizeConfig) -> str:
    """Bits of weights and activations, such as W4A16."""
    kind = "-fp8" if config.algorithm == "fp8" else "" if config.symmetric else "-asym"
    return f"W{config.num_bits}A16{kind}"


def _in_float(rounded: Rounded) -> list[str]:
    """Names of the linear layers that a reader would otherwise take for quantized, the left-out ones among them."""
    skeleton = hf_writer.skeleton(rounded.model)
    return sorted(
        name for name, layer in skeleton.named_modules() if isinstance(layer, nn.Linear) and name not in rounded.weights
    )


def _in_words(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) uint8 codes as (rows, words) int32, the first code lowest."""
    packed = in_bytes(codes, bits)
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(np.ascontiguousarray(packed).view("<i4").astype(np.int32))


def _as_stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
    return value.contiguous()


def _agreement(module: nn.Module, original: nn.Module, workload: Workload) -> float:
    """Mean cosine between the outputs of two modules on the calibration split; a batch's are held at a time."""
    total, samples = 0.0, 0
    original = original.eval()
    with torch.inference_mode():
        for batch in workload.batches("calibration", min(_BATCH, workload.evaluation_batch_size)):
            found, expected = (one(**batch.inputs).flatten(1).numpy() for one in (module, original))
            total, samples = total + mean_cosine(found, expected) * len(found), samples + len(found)
    return total / samples


def _check(report: QuantizeReport, config: QuantizeConfig) -> None:
    if 1.0 - report.agreement <= config.max_quality_drop and report.coverage >= config.min_coverage:
        return
    raise CoverageError(
        f"quantizing linear layers ({report.method})",
        found=f"{report.quantized_weights} of {report.eligible_weights} eligible weights ({report.coverage:.1%}), "
        f"agreement {report.agreement:.4f} with the float model",
        expected=f"at least quantize.min_coverage, {config.min_coverage:.1%}, within quantize.max_quality_drop, "
        f"{config.max_quality_drop}",
        fix="8 bits or smaller groups, quantize.algorithm 'gptq', sensitive layers in quantize.ignore, or a wider "
        "quantize.max_quality_drop",
    )
