"""Static int8 in QDQ form, by ONNX Runtime's own quantizer; ranges of activations from calibration data.

In a graph without convolutions only the inputs of products are rounded: their outputs stay in float, as additions and
normalisations read them, and ONNX Runtime multiplies all the same in integers (`MatMulIntegerToFloat`).
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quant_pre_process
from onnxruntime.quantization.calibrate import TensorData, TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from torch import Tensor

from modelpress.config import QuantizeConfig
from modelpress.errors import CoverageError
from modelpress.quantize import powers
from modelpress.quantize.frozen import Frozen
from modelpress.quantize.ranges import Here, Observer, least_error_ranges
from modelpress.quantize.rewrite import channel_axis
from modelpress.quantize.selection import WEIGHTED

_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
# With ONNX Runtime's defaults (128 bins for 128 levels) entropy calibration has nothing to choose between.
_HISTOGRAM_BINS = 2048
_ENTROPY_LEVELS = 128
_COMPANIONS = (
    "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Add", "Concat", "Flatten", "Reshape", "Transpose",
)  # fmt: skip
"""Operators that stay in integers between quantized convolutions."""


class _OneBatch(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feed: dict[str, np.ndarray]) -> None:
        self._feeds = iter([feed])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def prepare(model: ModelProto) -> ModelProto:
    """Fold constants, fuse what can be fused and infer shapes, as ONNX Runtime's quantizer wants it."""
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        before, after = Path(folder, "before.onnx"), Path(folder, "after.onnx")
        # By path: given a ModelProto, the tool moves the initializers out of it and then fails to fold constants.
        onnx.save_model(model, before)
        quant_pre_process(str(before), str(after), skip_symbolic_shape=True)
        return onnx.load(after)


def calibrate(
    model: ModelProto,
    batches: Sequence[dict[str, Tensor]],
    config: QuantizeConfig,
    observer: Observer | None = None,
) -> TensorsData:
    """Ranges of the activations around every weighted node and its companions.

    Args:
        model: as `prepare` gave it.
        batches: named inputs; shapes may differ between batches.
        config: `calibration` and `percentile`.
        observer: for `mse`, where the batches are run; None: here.
    """
    if config.calibration == "mse":
        fit = powers.least_error_range if config.powers_of_two else None
        found = least_error_ranges(model, _activations(model), observer or Here(batches), fit)
        ends = {name: np.asarray(ends, dtype=np.float32) for name, ends in found.items()}
        data = {name: TensorData(lowest=low, highest=high) for name, (low, high) in ends.items()}
        return TensorsData(CalibrationMethod.MinMax, data)
    names = [one.name for one in model.graph.input]
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder, _quiet():
        source = Path(folder, "model.onnx")
        onnx.save_model(model, source)
        calibrator = create_calibrator(
            source,
            [*WEIGHTED, *_COMPANIONS],
            augmented_model_path=str(Path(folder, "augmented.onnx")),
            calibrate_method=_METHODS[config.calibration],
            providers=["CPUExecutionProvider"],
            extra_options=_calibration_options(config),
        )
        # One batch at a time: ONNX Runtime's histograms stack the batches that they are given, which fails where
        # lengths differ, and hold all of them in memory.
        for batch in batches:
            calibrator.collect_data(_OneBatch({name: batch[name].numpy() for name in names}))
        return calibrator.compute_data()


def quantize_static(
    model: ModelProto,
    nodes: Collection[str],
    ranges: TensorsData,
    config: QuantizeConfig,
    frozen: Frozen | None = None,
) -> ModelProto:
    """The model with QuantizeLinear and DequantizeLinear around the named nodes; the model given is left as it is.

    Weights are signed and symmetric, activations unsigned with a zero point; with `config.powers_of_two` both are
    signed and symmetric (see `powers`). In a network of convolutions, the operators between quantized layers (`Relu`,
    pooling, …) are quantized with them. Weights and activations are on the scales of `frozen` where it has them.

    Raises:
        CoverageError: an activation of a named node has no calibrated range.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    if not nodes:
        # ONNX Runtime's quantizer takes an empty list for "all".
        return copy
    _check_calibrated(model, nodes, ranges)
    quantizer = QDQQuantizer(
        copy,
        config.per_channel,
        False,  # reduce_range: 7-bit weights
        QuantType.QInt8,
        QuantType.QInt8 if config.powers_of_two else QuantType.QUInt8,
        ranges,
        [*nodes, *_companions(model, nodes)],
        [],
        [*WEIGHTED, *_COMPANIONS],
        {
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": [] if _has_convolutions(model) else list(WEIGHTED),
            **_form(model, nodes, ranges, config, frozen),
        },
    )
    quantizer.quantize_model()
    quantized: ModelProto = quantizer.model.model
    if config.powers_of_two:
        powers.fuse_activations_(quantized, nodes)
    return quantized


def _form(
    model: ModelProto, nodes: Collection[str], ranges: TensorsData, config: QuantizeConfig, frozen: Frozen | None
) -> dict[str, Any]:
    """Options of ONNX Runtime's quantizer that hang on the scales."""
    if not config.powers_of_two:
        overrides = _overrides(model, nodes, ranges, config, frozen) if frozen else {}
        return {"ActivationSymmetric": False, "TensorQuantOverrides": overrides}
    return {
        "ActivationSymmetric": True,  # and so a Relu stays: no zero point says what it cuts off
        "TensorQuantOverrides": powers.scales(model, nodes, ranges),
        "QDQDisableWeightAdjustForInt32Bias": True,  # the scales make room for biases themselves
        "DedicatedQDQPair": True,  # each reader its own, as AMD's quantizer writes it
    }


def _overrides(
    model: ModelProto, nodes: Collection[str], ranges: TensorsData, config: QuantizeConfig, frozen: Frozen
) -> dict[str, list[dict[str, Any]]]:
    """An earlier version's scales as ONNX Runtime's quantizer takes them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ranges.keys():  # noqa: SIM118
        activation = frozen.activation(name)
        if activation is not None:
            found[name] = [{"scale": activation[0], "zero_point": activation[1]}]
    initializers = {one.name: one for one in model.graph.initializer}
    for node in model.graph.node:
        if node.name not in nodes or len(node.input) < 2 or node.input[1] not in initializers:
            continue
        values = numpy_helper.to_array(initializers[node.input[1]])
        axis = channel_axis(node, values.ndim) if config.per_channel else None
        scales = frozen.symmetric(node.input[1], values, axis)
        if scales is not None:
            zero, place = np.int8(0), {} if axis is None else {"axis": axis}
            found[node.input[1]] = [{**place, "scale": scale, "zero_point": zero} for scale in scales.reshape(-1)]
    return found


def _calibration_options(config: QuantizeConfig) -> dict[str, Any]:
    if config.calibration == "percentile":
        return {"percentile": config.percentile, "num_bins": _HISTOGRAM_BINS, "symmetric": False}
    if config.calibration == "entropy":
        return {"num_bins": _HISTOGRAM_BINS, "num_quantized_bins": _ENTROPY_LEVELS, "symmetric": False}
    return {"symmetric": False}


def _companions(model: ModelProto, nodes: Collection[str]) -> list[str]:
    """Nodes that only read what quantized nodes write, in graphs with convolutions.

    Transformers have none: integer additions and normalisations ruin them.
    """
    if not _has_convolutions(model):
        return []
    constants = {one.name for one in model.graph.initializer}
    integers: set[str] = set()
    companions = []
    for node in model.graph.node:
        if node.name in nodes:
            integers |= set(node.output)
        elif node.op_type in _COMPANIONS:
            values = [name for name in node.input if name and name not in constants]
            if values and integers.issuperset(values):
                integers |= set(node.output)
                companions.append(node.name)
    return companions


def _has_convolutions(model: ModelProto) -> bool:
    return any(node.op_type == "Conv" for node in model.graph.node)


def _activations(model: ModelProto) -> list[str]:
    """Float values that may be rounded: the inputs of weighted nodes, with convolutions also what is around them."""
    constants = {one.name for one in model.graph.initializer}
    names: dict[str, None] = {}
    for node in model.graph.node:
        if not _has_convolutions(model):
            taken = [*node.input[:1]] if node.op_type in WEIGHTED and node.input[1] in constants else []
        else:
            taken = [*node.input, *node.output] if node.op_type in (*WEIGHTED, *_COMPANIONS) else []
        names |= dict.fromkeys(name for name in taken if name and name not in constants)
    return list(names)


def _check_calibrated(model: ModelProto, nodes: Collection[str], ranges: TensorsData) -> None:
    for node in model.graph.node:
        if node.name not in nodes:
            continue
        for value in (node.input[0], *(node.output if _has_convolutions(model) else ())):
            found = "no range" if value not in ranges else f"the range {ranges[value].range_value}"
            if value not in ranges or not np.isfinite(ranges[value].range_value).all():
                raise CoverageError(
                    f"calibrating {node.name!r}",
                    found=f"{found} for its activation {value!r}",
                    expected="a finite range from calibration data",
                    fix=f"look for NaN or infinity in the calibration data, or add {node.name!r} to quantize.ignore",
                )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime's calibrator prints what it does."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
