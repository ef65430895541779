"""Reports of the graph and of its quantization."""

from __future__ import annotations

from pydantic import Field

from modelpress.reports.base import Report
from modelpress.reports.module import TrainReport


class ExportReport(Report):
    """The ONNX graph."""

    opset: int
    """Operator set."""
    nodes: int
    """Nodes in the graph."""
    max_difference: float
    """Largest absolute difference to the torch module on the example inputs."""


class StableHloReport(Report):
    """A module as StableHLO, for OpenXLA's compilers."""

    platforms: list[str]
    """What it was lowered for, as JAX names them."""
    weights: int
    """Tensors beside the program."""
    weights_bytes: int
    """Their bytes."""
    program_bytes: int
    """Bytes of the program without them."""
    ran_on: str
    """Where OpenXLA ran it when it was made, as JAX names it."""
    max_difference: float
    """Largest absolute difference to the torch module on the example inputs, there."""
    versions: dict[str, str]
    """Of the packages that made it."""


class SensitivityRow(Report):
    """How much one layer suffers from quantization."""

    node: str
    """ONNX node name."""
    disagreement: float
    """1 − agreement with the float graph, with this node alone quantized (or alone left in float)."""
    kept_float: bool
    """Whether the method left it out to keep the budget: it computes in float (its weight may be stored as integers
    all the same), or beside 4-bit weights has one of 8 bits."""


class SharedTensor(Report):
    """One weight tensor with few values."""

    name: str
    """Its name in the model."""
    shape: list[int]
    """Shape."""
    values: int
    """Distinct values, 0 among them where it occurs."""
    zeros: int
    """Zero elements."""
    relative_error: float
    """Root-mean-square of the change by clustering ÷ that of the weights, before values were trained."""


class CodebookReport(Report):
    """What weight sharing did to a module."""

    num_bits: int
    """Bits of an index."""
    eligible_weights: int
    """Weights in the layers that can be shared."""
    shared_weights: int
    """Weights in the layers that are."""
    tensors: list[SharedTensor]
    """Each of them."""
    recovery: TrainReport | None = None
    """The training of the values."""


class FrozenWeight(Report):
    """Whether one weight is rounded on the scales of an earlier version."""

    name: str
    """Initializer name."""
    frozen: bool
    """Whether it is; else on fresh ones, and a new version sends it whole."""
    error_growth: float | None
    """Rounding error on the earlier scales ÷ on fresh ones; None: there are none for it."""
    reason: str = ""
    """Why not."""


class FrozenReport(Report):
    """Whether an earlier version's scales served, and what they cost in quality."""

    base: str
    """Digest of the pack that the scales are of."""
    chosen: bool
    """Whether they were taken; else all scales are fresh."""
    reason: str
    """Why."""
    agreement: float
    """With the float graph on calibration data, on the earlier scales."""
    fresh_agreement: float
    """The same on fresh scales, each layer in the same form."""
    frozen_weights: int
    """Weight tensors on the earlier scales."""
    fresh_weights: int
    """Weight tensors on fresh ones."""
    weights: list[FrozenWeight]
    """Each of them."""


class QuantizeReport(Report):
    """What quantization did."""

    method: str
    """The method."""
    eligible_weights: int
    """Weights in the operators that the method can quantize."""
    quantized_weights: int
    """Weights that are integers now, or float8."""
    coverage: float
    """quantized ÷ eligible."""
    agreement: float
    """Agreement with the float graph on calibration data (mean cosine of the outputs)."""
    sensitivity: list[SensitivityRow] = Field(default_factory=list)
    """Layers by falling sensitivity."""
    codebook: CodebookReport | None = None
    """For `codebook`: the values that the weights share."""
    recovery: TrainReport | None = None
    """For int8: the training with rounded weights and activations that came before."""
    frozen: FrozenReport | None = None
    """With `scales_from`: whether those scales served."""


class RoundedLayer(Report):
    """One layer of a torch module whose weight was rounded."""

    name: str
    """The weight's name in the model."""
    shape: list[int]
    """(outputs, inputs)."""
    num_bits: int
    """Bits of a code."""
    weight_error: float
    """Squared change of the weights, as a share of their squares."""
    calibration_rows: int | None = None
    """Inputs of calibration data by which it was rounded, for `gptq`."""
    output_error: float | None = None
    """Squared change of the layer's outputs on them, as a share of the outputs' squares."""


class LayersReport(Report):
    """What weight-only quantization did to a torch module, layer by layer."""

    method: str
    """The method."""
    eligible_weights: int
    """Weights in linear layers, without those that give the logits or are another layer's as well."""
    quantized_weights: int
    """Weights that are codes now, or float8."""
    coverage: float
    """quantized ÷ eligible."""
    layers: list[RoundedLayer]
    """Each of them."""
