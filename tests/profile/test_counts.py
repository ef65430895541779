"""Operations by formula: against torch's own counter, which others wrote, and against sums done one by one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from modelpress.profile.counts import Call, Value, attention_flops, flops, total_bytes

SMALL = st.integers(1, 7)


def value(*shape: int, dtype: str = "float32") -> Value:
    return Value(dtype, shape)


def counted(run: object) -> int:
    with FlopCounterMode(display=False) as counter:
        run()  # type: ignore[operator]
    return int(counter.get_total_flops())


@given(SMALL, SMALL, SMALL, SMALL)
@settings(max_examples=25, deadline=None)
def test_a_product_counts_as_torch_counts_it(batch: int, rows: int, length: int, columns: int) -> None:
    call = Call("MatMul", [value(batch, rows, length), value(batch, length, columns)], [value(batch, rows, columns)])
    first, second = torch.empty(batch, rows, length, device="meta"), torch.empty(batch, length, columns, device="meta")
    assert flops(call) == counted(lambda: first @ second) == 2 * batch * rows * length * columns


@given(SMALL, SMALL, SMALL, st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_linear_layer_counts_its_bias_once_per_output(
    rows: int, length: int, columns: int, turned: bool, biased: bool
) -> None:
    first = value(length, rows) if turned else value(rows, length)
    inputs = [first, value(length, columns), *([value(columns)] if biased else [])]
    call = Call("Gemm", inputs, [value(rows, columns)], {"transA": int(turned)})
    assert flops(call) == rows * columns * (2 * length + biased)


@given(SMALL, SMALL, SMALL, st.integers(1, 3), st.integers(1, 3), st.integers(3, 8), st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_a_convolution_counts_as_torch_counts_it(
    batch: int, inputs: int, filters: int, groups: int, kernel: int, size: int, stride: int
) -> None:
    image = torch.empty(batch, inputs * groups, size, size, device="meta")
    weight = torch.empty(filters * groups, inputs, kernel, kernel, device="meta")
    made = torch.nn.functional.conv2d(image, weight, stride=stride, groups=groups)
    call = Call("Conv", [value(*image.shape), value(*weight.shape)], [value(*made.shape)])
    expected = counted(lambda: torch.nn.functional.conv2d(image, weight, stride=stride, groups=groups))
    assert flops(call) == expected
    biased = Call("Conv", [value(*image.shape), value(*weight.shape), value(filters)], [value(*made.shape)])
    assert flops(biased) == expected + made.numel()


@given(SMALL, SMALL, SMALL, st.integers(1, 4), SMALL)
@settings(max_examples=25, deadline=None)
def test_attention_counts_both_of_its_products(batch: int, queries: int, keys: int, heads: int, size: int) -> None:
    query = torch.empty(batch, heads, queries, size, device="meta")
    key = torch.empty(batch, heads, keys, size, device="meta")
    expected = counted(lambda: (query @ key.transpose(2, 3)) @ key)
    assert attention_flops(batch, queries, keys, heads * size) == expected
    own = Call("Attention", [value(*query.shape), value(*key.shape), value(*key.shape)], [value(*query.shape)])
    assert flops(own) == expected
    flat = [value(batch, queries, heads * size), value(batch, keys, heads * size), value(batch, keys, heads * size)]
    assert flops(Call("MultiHeadAttention", flat, [flat[0]])) == expected
    assert flops(Call("Attention", flat, [flat[0]])) == expected


@given(SMALL, SMALL, st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_fused_attention_is_its_projection_and_attention(batch: int, length: int, width: int) -> None:
    shape = (batch, length, width)
    call = Call("Attention", [value(*shape), value(width, 3 * width)], [value(*shape)], {"domain": "com.microsoft"})
    assert flops(call) == 2 * batch * length * width * 3 * width + attention_flops(batch, length, length, width)


def test_what_only_moves_bytes_computes_nothing() -> None:
    assert flops(Call("Transpose", [value(3, 4)], [value(4, 3)])) == 0
    assert flops(Call("Gather", [value(100, 8), value(5, dtype="int64")], [value(5, 8)])) == 0


def test_what_is_not_known_is_not_nothing() -> None:
    assert flops(Call("Einsum", [value(2, 2)], [value(2, 2)])) is None
    assert flops(Call("MatMul", [None, value(2, 2)], [value(2, 2)])) is None
    assert flops(Call("MatMul", [value(2, 2)], [None])) is None
    assert flops(Call("MaxPool", [value(1, 1, 4, 4)], [value(1, 1, 2, 2)])) is None  # without its kernel_shape
    assert total_bytes([value(2, 2), None]) is None
    assert total_bytes([Value("string", (3,))]) is None


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 48), ("int8", 12), ("bfloat16", 24), ("int4", 6), ("float64", 96), ("bool", 12)]
)
def test_bytes_of_a_value(dtype: str, size: int) -> None:
    assert value(3, 4, dtype=dtype).nbytes == size
    assert total_bytes([value(3, 4, dtype=dtype), value(dtype=dtype)]) == size + math.ceil(size / 12)


def test_elements_of_reductions_are_those_of_the_input() -> None:
    assert flops(Call("ReduceMean", [value(4, 6)], [value(4, 1)])) == 24
    assert flops(Call("Add", [value(4, 1), value(4, 6)], [value(4, 6)])) == 24
    pool = Call("MaxPool", [value(1, 2, 4, 4)], [value(1, 2, 2, 2)], {"kernel_shape": [2, 2]})
    assert flops(pool) == 32


def test_a_recurrent_layer_multiplies_with_all_weights_in_each_step() -> None:
    steps, batch, inputs, hidden = 5, 2, 3, 4
    call = Call(
        "LSTM",
        [value(steps, batch, inputs), value(1, 4 * hidden, inputs), value(1, 4 * hidden, hidden)],
        [value(steps, 1, batch, hidden)],
    )
    assert flops(call) == sum(2 * batch * 4 * hidden * (inputs + hidden) for _ in range(steps))


def test_few_bits_count_by_the_length_of_their_sums() -> None:
    call = Call("MatMulNBits", [value(3, 64), value(8, 4, 8, dtype="uint8")], [value(3, 8)], {"K": 64, "N": 8})
    assert flops(call) == 2 * 3 * 8 * 64
