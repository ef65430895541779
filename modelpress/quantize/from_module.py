"""Quantization that needs the torch module behind the graph, because it trains it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from modelpress import graph
from modelpress.agreement import Judge, from_cosine
from modelpress.checkpoint import Checkpoint
from modelpress.config import ExportConfig, QuantizeConfig
from modelpress.errors import ConfigError, CoverageError
from modelpress.export import export
from modelpress.progress import Progress, silent
from modelpress.quantize import quantize
from modelpress.quantize.aware import train_aware_
from modelpress.quantize.codebook import cluster_
from modelpress.quantize.indices import halve_, index_
from modelpress.quantize.selection import chosen_layers, eligible_layers
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
    """Train a copy of `module` for its quantized form, export it and quantize its graph.

    `codebook` clusters the weights and stores them as indices, the biases as float16. Int8 methods with a `recovery`
    round the weights and activations in the training, see `train_aware_`.

    Agreement is measured on the workload's calibration split, in batches of 32, between the two graphs.

    Args:
        module: as it was exported; it stays as it is.
        checkpoint: its float graph.
        workload: data and metric.
        config: of method `codebook`, or with a `recovery`.
        export_config: how the float graph was exported.
        progress: told of each layer, and of the training.

    Returns:
        The graph, and what was done: coverage counts the weights that stand there as indices, or integers.

    Raises:
        ConfigError: nothing to train, or a pattern in `targets` or `ignore` that matches nothing.
        CoverageError: nothing to quantize, less than `min_coverage`, or too far from the float graph.
        ExportError: see `export`.
        StageError: weights that are NaN or infinite, or a failed training.
    """
    if not config.needs_module:
        raise ConfigError(
            f"quantizing a torch module ({config.method})",
            found="no quantize.recovery",
            expected="a method that trains the module",
            fix="call modelpress.quantize.quantize with the graph",
        )
    copied = copy.deepcopy(module).eval()
    fold_norms_(copied, workload)
    run = _share if config.method == "codebook" else _train_and_round
    model, found = run(copied, checkpoint, workload, config, export_config, progress)
    _check(found, config)
    progress(1, 1, f"coverage {found.coverage:.1%}, agreement {found.agreement:.4f}")
    made = graph.split(model)
    return Checkpoint("onnx", made.tensors, checkpoint.files | made.files, checkpoint.metadata), found


def _share(
    module: nn.Module,
    checkpoint: Checkpoint,
    workload: Workload,
    config: QuantizeConfig,
    export_config: ExportConfig,
    progress: Progress,
) -> tuple[ModelProto, QuantizeReport]:
    """Let the module's weights share their values, and store them as indices in its graph."""
    report = cluster_(module, workload, config, progress)
    model = graph.join(export(module, workload, export_config)[0])
    layers = {layer.weight: layer.elements for layer in eligible_layers(model, config.embeddings)}
    indexed = index_(model, layers)
    # Parameters alone: a buffer may hold frequencies or positions, which rounding would move by whole turns.
    halve_(model, {name for name, _ in module.named_parameters()})
    eligible, integers = sum(layers.values()), sum(layers[name] for name in indexed)
    return model, QuantizeReport(
        method=f"codebook-{config.num_bits}",
        eligible_weights=eligible,
        quantized_weights=integers,
        coverage=integers / eligible,
        agreement=_agreement(model, checkpoint, workload),
        codebook=report,
    )


def _train_and_round(
    module: nn.Module,
    checkpoint: Checkpoint,
    workload: Workload,
    config: QuantizeConfig,
    export_config: ExportConfig,
    progress: Progress,
) -> tuple[ModelProto, QuantizeReport]:
    """Train the module with its weights and activations rounded, then quantize its graph."""
    chosen = chosen_layers(eligible_layers(graph.join(checkpoint), config.embeddings), config)
    names = [layer.node.rpartition(".")[0] for layer in chosen]
    training = train_aware_(module, names, workload, config, progress)
    exported, _ = export(module, workload, export_config)
    made, report = quantize(exported, workload, config.model_copy(update={"recovery": None}), progress)
    model = graph.join(made)
    # Against the graph that was given, not against what training made of it.
    agreement = _agreement(model, checkpoint, workload)
    return model, report.model_copy(update={"recovery": training, "agreement": agreement})


def _agreement(model: ModelProto, checkpoint: Checkpoint, workload: Workload) -> float:
    """Mean cosine between the outputs of a graph and those of a checkpoint's, on the calibration split."""
    batches = [batch.inputs for batch in workload.batches("calibration", min(_BATCH, workload.evaluation_batch_size))]
    return 1.0 - Judge(checkpoint, batches, from_cosine).disagreement(graph.split(model))


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
            # It makes a bias that learns only of one that the convolution had; here it is the normalisation's shift.
            conv.bias.requires_grad_(norm.bias is not None and norm.bias.requires_grad)
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
        f"quantizing a torch module ({report.method})",
        found=f"{report.quantized_weights} of {report.eligible_weights} eligible weights as integers "
        f"({report.coverage:.1%}), agreement {report.agreement:.4f} with the float graph",
        expected=f"at least quantize.min_coverage, {config.min_coverage:.1%}, within quantize.max_quality_drop, "
        f"{config.max_quality_drop}",
        fix="a longer quantize.recovery, more quantize.num_bits for 'codebook', a wider quantize.max_quality_drop, or "
        "a smaller quantize.min_coverage",
    )
