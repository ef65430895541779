"""Quantization that needs the torch module behind the graph, because it trains it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import ExportConfig, QuantizeConfig
from modelpress.errors import ConfigError, CoverageError
from modelpress.export import export
from modelpress.progress import Progress, silent
from modelpress.quantize.codebook import cluster_
from modelpress.quantize.indices import halve_, index_
from modelpress.quantize.selection import eligible_layers
from modelpress.quantize.sensitivity import Judge
from modelpress.reports import QuantizeReport
from modelpress.workload import Workload

_BATCH = 32
_FOLDED_TOLERANCE = 1e-4
"""Largest difference, relative to the largest output, between a module and the same with its normalisations folded."""


def quantize_module(
    module: nn.Module,
    checkpoint: Checkpoint,
    workload: Workload,
    config: QuantizeConfig,
    export_config: ExportConfig,
    progress: Progress = silent,
) -> tuple[Checkpoint, QuantizeReport]:
    """Cluster and train a copy of `module`, export it, and store its weights as indices, its biases as float16.

    Agreement is measured on the workload's calibration split, in batches of 32, between the two graphs.

    Args:
        module: as it was exported; it stays as it is.
        checkpoint: its float graph.
        workload: data and metric.
        config: of method `codebook`.
        export_config: how the float graph was exported.
        progress: told of each layer, and of the training.

    Returns:
        The graph, and what was done: coverage counts the weights that stand there as indices.

    Raises:
        ConfigError: another method, or a pattern in `targets` or `ignore` that matches nothing.
        CoverageError: nothing to share, less than `min_coverage` as indices, or too far from the float graph.
        ExportError: see `export`.
        StageError: weights that are NaN or infinite, or a failed training.
    """
    if config.method != "codebook":
        raise ConfigError("quantizing a torch module", found=f"method {config.method!r}", expected="'codebook'")
    reference = graph.join(checkpoint)
    shared = copy.deepcopy(module).eval()
    fold_norms_(shared, workload)
    report = cluster_(shared, workload, config, progress)
    model = graph.join(export(shared, workload, export_config)[0])
    layers = {layer.weight: layer.elements for layer in eligible_layers(model, config.embeddings)}
    indexed = index_(model, layers)
    # Parameters alone: a buffer may hold frequencies or positions, which rounding would move by whole turns.
    halve_(model, {name for name, _ in shared.named_parameters()})
    made = graph.split(model)
    batches = [batch.inputs for batch in workload.batches("calibration", _BATCH)]
    agreement = 1.0 - Judge(reference, batches).disagreement(model)
    eligible, integers = sum(layers.values()), sum(layers[name] for name in indexed)
    found = QuantizeReport(
        method=f"codebook-{config.num_bits}",
        eligible_weights=eligible,
        quantized_weights=integers,
        coverage=integers / eligible,
        agreement=agreement,
        codebook=report,
    )
    _check(found, config)
    progress(1, 1, f"coverage {found.coverage:.1%}, agreement {agreement:.4f}")
    return Checkpoint("onnx", made.tensors, checkpoint.files | made.files, checkpoint.metadata), found


def fold_norms_(module: nn.Module, workload: Workload) -> list[str]:
    """Multiply batch normalisations into the convolutions before them, in place, as the export would do.

    It would give every channel its own multiple of the shared values. Pairs are found by running the module: what the
    convolution returns is what the normalisation is given. One that changes the module's output, because something
    else reads the convolution as well, stays.

    Returns:
        Names of the normalisations that are gone.
    """
    inputs = workload.example(2)
    folded = []
    with torch.no_grad():
        expected = module(**inputs)
        for conv, name, norm in _normed_convolutions(module, inputs):
            before = conv.weight, conv.bias
            owner, _, key = name.rpartition(".")
            assert norm.running_mean is not None
            assert norm.running_var is not None
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            setattr(module.get_submodule(owner), key, nn.Identity())
            if torch.allclose(module(**inputs), expected, rtol=0, atol=_FOLDED_TOLERANCE * float(expected.abs().max())):
                folded.append(name)
                continue
            setattr(module.get_submodule(owner), key, norm)
            conv.weight, conv.bias = before
    return folded


def _normed_convolutions(
    module: nn.Module, inputs: dict[str, Tensor]
) -> list[tuple[nn.Conv1d | nn.Conv2d, str, nn.BatchNorm1d | nn.BatchNorm2d]]:
    """Convolutions, each with the name of the batch normalisation that is given its output, and that."""
    outputs: list[tuple[nn.Conv1d | nn.Conv2d, Tensor]] = []
    pairs: dict[str, tuple[nn.Conv1d | nn.Conv2d, str, nn.BatchNorm1d | nn.BatchNorm2d]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(child: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(child, nn.Conv1d | nn.Conv2d):
                outputs.append((child, output))
            elif isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d) and child.running_mean is not None:
                for conv, tensor in outputs:
                    if tensor is given[0]:
                        pairs[name] = conv, name, child

        return note

    kinds = (nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)
    handles = [
        child.register_forward_hook(hook(name)) for name, child in module.named_modules() if isinstance(child, kinds)
    ]
    try:
        module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(pairs.values())


def _check(report: QuantizeReport, config: QuantizeConfig) -> None:
    if 1.0 - report.agreement <= config.max_quality_drop and report.coverage >= config.min_coverage:
        return
    raise CoverageError(
        "sharing weights by codebooks",
        found=f"{report.quantized_weights} of {report.eligible_weights} eligible weights as indices "
        f"({report.coverage:.1%}), agreement {report.agreement:.4f} with the float graph",
        expected=f"at least quantize.min_coverage, {config.min_coverage:.1%}, within quantize.max_quality_drop, "
        f"{config.max_quality_drop}",
        fix="more quantize.num_bits, a quantize.recovery, a wider quantize.max_quality_drop, or a smaller "
        "quantize.min_coverage",
    )
