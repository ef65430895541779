"""Operations of an operator, counted from the shapes that it had in a run.

A multiplication and an addition are two operations; products of matrices, convolutions, attention and recurrent layers
are counted exactly. Of what works element by element, each element of the output counts by `PER_ELEMENT`: one for
arithmetic and comparisons, and for a function such as an exponential one as well, as its cost differs from machine to
machine. What only moves or re-shapes bytes has none. An operator that stands in no table is not counted at all, and
never taken for 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ITEM_BYTES = {
    **dict.fromkeys(("float64", "int64", "uint64"), 8.0),
    **dict.fromkeys(("float32", "int32", "uint32"), 4.0),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2.0),
    **dict.fromkeys(("int8", "uint8", "bool", "float8"), 1.0),
    **dict.fromkeys(("int4", "uint4"), 0.5),
}
"""Bytes of an element."""


@dataclass(frozen=True)
class Value:
    """What an operator reads or writes."""

    dtype: str
    """As in numpy: `float32`, `int8`, ..."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int | None:
        """Bytes; None for a type without a fixed size (text)."""
        item = ITEM_BYTES.get(self.dtype)
        return None if item is None else math.ceil(self.size * item)


@dataclass(frozen=True)
class Call:
    """One operator with the values of one run. A value that is not there, or whose shape is not known, is None."""

    op_type: str
    inputs: Sequence[Value | None]
    outputs: Sequence[Value | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)


INTEGER = {
    *("MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul"),
    *("QLinearConv", "QGemm", "QAttention", "DynamicQuantizeLSTM"),
}
"""Operators whose products are of integers."""

NOTHING = {
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Constant"),
    *("ConstantOfShape", "Gather", "GatherElements", "GatherND", "ScatterND", "ScatterElements", "Slice", "Split"),
    *("Concat", "Expand", "Tile", "Pad", "Cast", "Range", "DepthToSpace", "SpaceToDepth", "Dropout", "Trilu"),
    *("EyeLike", "OneHot", "NonZero", "MemcpyFromHost", "MemcpyToHost", "ReorderInput", "ReorderOutput", "CastLike"),
}
"""Operators that move bytes and compute nothing."""

PER_ELEMENT = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "And", "Or", "Xor", "Not", "Neg"), 1),
    **dict.fromkeys(("Abs", "Sqrt", "Reciprocal", "Exp", "Log", "Erf", "Tanh", "Sigmoid", "Sin", "Cos", "Sign"), 1),
    **dict.fromkeys(("Relu", "Clip", "Floor", "Ceil", "Round", "Where", "Equal", "Less", "Greater", "IsNaN"), 1),
    **dict.fromkeys(("LessOrEqual", "GreaterOrEqual", "CumSum", "PRelu", "LeakyRelu", "Elu", "Softplus"), 1),
    **dict.fromkeys(("HardSigmoid", "BitShift", "BitwiseAnd", "BitwiseOr", "IsInf"), 1),
    **dict.fromkeys(("HardSwish", "QuickGelu", "Swish", "BatchNormalization", "QuantizeLinear"), 2),
    **dict.fromkeys(("DequantizeLinear", "QLinearAdd", "QLinearMul"), 2),
    **dict.fromkeys(("Gelu", "BiasGelu", "FastGelu"), 5),
    **dict.fromkeys(("Softmax", "LogSoftmax", "BiasSoftmax"), 5),
    **dict.fromkeys(("LayerNormalization", "InstanceNormalization", "GroupNormalization"), 8),
    **dict.fromkeys(("SkipLayerNormalization",), 9),
    **dict.fromkeys(("SimplifiedLayerNormalization", "RMSNormalization"), 5),
    **dict.fromkeys(("SkipSimplifiedLayerNormalization",), 6),
    "DynamicQuantizeLinear": 4,
    "RotaryEmbedding": 3,
    "EmbedLayerNormalization": 10,
}
"""Operations of each element of the first output."""

PER_INPUT = {
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ArgMax", "ArgMin"), 1),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "ReduceL1", "TopK"), 1),
    **dict.fromkeys(("ReduceL2", "ReduceSumSquare", "LpNormalization"), 2),
}
"""Operations of each element of the first input."""


def flops(call: Call) -> int | None:
    """Operations of a call; None where its kind is not known, or a shape that it hangs on."""
    if call.op_type in NOTHING:
        return 0
    try:
        if call.op_type in PER_ELEMENT:
            return PER_ELEMENT[call.op_type] * _output(call).size
        if call.op_type in PER_INPUT:
            return PER_INPUT[call.op_type] * _input(call, 0).size
        formula = _FORMULAS.get(call.op_type)
        return None if formula is None else formula(call)
    except LookupError:
        return None


def total_bytes(values: Sequence[Value | None]) -> int | None:
    """Bytes of values; None where one's shape is not known, or its type has no fixed size."""
    sizes = [None if value is None else value.nbytes for value in values]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _input(call: Call, place: int) -> Value:
    value = call.inputs[place]
    if value is None:
        raise LookupError(place)
    return value


def _output(call: Call) -> Value:
    value = call.outputs[0]
    if value is None:
        raise LookupError("output")
    return value


def _matmul(call: Call) -> int:
    """2 · (elements of the product) · (length of the sums): the last axis of the first factor."""
    first, product = _input(call, 0), _output(call)
    if call.attributes.get("transA"):
        return 2 * product.size * first.shape[-2]
    return 2 * product.size * first.shape[-1]


def _gemm(call: Call) -> int:
    """The product and, where there is a third input, its addition."""
    first, product = _input(call, 0), _output(call)
    length = first.shape[0] if call.attributes.get("transA") else first.shape[-1]
    adds = len(call.inputs) > 2 and call.inputs[2] is not None and call.op_type in ("Gemm", "FusedGemm")
    return 2 * product.size * length + (product.size if adds else 0)


def _conv(weight: int, bias: int | None) -> Callable[[Call], int]:
    """2 · (elements of the output) · (weights of one filter), and one addition for a bias.

    Weights are (filters, channels ÷ groups, kernel axes ...): the groups are in their second axis.
    """

    def formula(call: Call) -> int:
        filters, made = _input(call, weight), _output(call)
        adds = bias is not None and len(call.inputs) > bias and call.inputs[bias] is not None
        return 2 * made.size * math.prod(filters.shape[1:]) + (made.size if adds else 0)

    return formula


def _conv_transposed(call: Call) -> int:
    """Each element of the input meets (channels of the output ÷ groups) · kernel weights."""
    return 2 * _input(call, 0).size * math.prod(_input(call, 1).shape[1:])


def _pool(call: Call) -> int:
    kernel: Sequence[int] = call.attributes["kernel_shape"]
    return _output(call).size * math.prod(kernel)


def _few_bits(call: Call) -> int:
    return 2 * _output(call).size * int(call.attributes["K"])


def _recurrent(call: Call) -> int:
    """X is (steps, batch, inputs); each step multiplies with all of W and R (Hochreiter & Schmidhuber 1997)."""
    steps, batch = _input(call, 0).shape[:2]
    return 2 * steps * batch * (_input(call, 1).size + _input(call, 2).size)


def attention_flops(batch: int, queries: int, keys: int, width: int, value_width: int | None = None) -> int:
    """Scores and weighted sum of attention over all heads: 2 · batch · queries · keys · (width + width of the values).

    `width` is heads · head size (Vaswani et al. 2017, "Attention Is All You Need"); the softmax is not in it.
    """
    return 2 * batch * queries * keys * (width + (width if value_width is None else value_width))


def _attention(call: Call) -> int:
    """ONNX's own: Q, K and V of (batch, length, width) or (batch, heads, length, head size)."""
    query, key, value = (_input(call, place).shape for place in range(3))
    if len(query) == 3:
        return attention_flops(query[0], query[1], key[1], query[2], value[2] * query[2] // key[2])
    return attention_flops(query[0], query[2], key[2], query[1] * query[3], query[1] * value[3])


def _projected_attention(call: Call) -> int:
    """ONNX Runtime's fused kind: X (batch, length, inputs) times W (inputs, widths of Q, K and V), then attention."""
    (batch, length, width), weight, made = _input(call, 0).shape, _input(call, 1).shape, _output(call).shape
    values = made[-1]
    queries = (weight[-1] - values) // 2
    return 2 * batch * length * width * weight[-1] + attention_flops(batch, length, length, queries, values)


def _own_or_projected(call: Call) -> int:
    return _attention(call) if call.attributes.get("domain", "") in ("", "ai.onnx") else _projected_attention(call)


def _three_inputs(call: Call) -> int:
    """MultiHeadAttention: Q, K and V of three axes."""
    query, key, value = (_input(call, place).shape for place in range(3))
    if not len(query) == len(key) == len(value) == 3:
        raise LookupError("packed")
    return attention_flops(query[0], query[1], key[1], query[2], value[2])


_FORMULAS: dict[str, Callable[[Call], int]] = {
    **dict.fromkeys(("MatMul", "FusedMatMul", "MatMulInteger", "DynamicQuantizeMatMul"), _matmul),
    **dict.fromkeys(("MatMulIntegerToFloat", "QLinearMatMul"), _matmul),
    **dict.fromkeys(("Gemm", "FusedGemm", "QGemm"), _gemm),
    **dict.fromkeys(("Conv", "FusedConv"), _conv(1, 2)),
    "ConvInteger": _conv(1, None),
    "QLinearConv": _conv(3, 8),
    "ConvTranspose": _conv_transposed,
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), _pool),
    "MatMulNBits": _few_bits,
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), _recurrent),
    "Attention": _own_or_projected,
    "QAttention": _projected_attention,
    "MultiHeadAttention": _three_inputs,
}
