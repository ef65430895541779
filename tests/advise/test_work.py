"""The arithmetic of products, against what numpy and torch make of the same shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress.advise.work import KERNELS, Plan, Roofline, Work, changed_seconds, elementwise_seconds, total
from modelpress.reports import Measured, NotMeasured, NotPredicted, Predicted
from modelpress.reports.profile import MachineProfile, MatrixRate

MACHINE = Roofline(copy_bytes_per_second=1e10, float_flops_per_second=1e11, int8_flops_per_second=4e11)
UP = Work("MatMul", (64, 256), (4, 16, 64))
DOWN = Work("MatMul", (256, 64), (4, 16, 256))


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(1, 3),
    st.integers(5, 9), st.sampled_from([1, 2]),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_a_convolution_has_the_shape_that_torch_gives(
    batch: int, inputs: int, outputs: int, kernel: int, pad: int, stride: int, side: int, groups: int
) -> None:
    inputs, outputs = inputs * groups, outputs * groups
    layer = torch.nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups)
    work = Work(
        "Conv", tuple(layer.weight.shape), (batch, inputs, side, side), strides=(stride, stride), pads=(pad,) * 4,
        groups=groups,
    )  # fmt: skip
    found = layer(torch.zeros(batch, inputs, side, side))
    assert work.output == tuple(found.shape)
    assert work.flops == 2 * found.numel() * (inputs // groups) * kernel**2


def test_products_are_counted() -> None:
    assert UP.output == (4, 16, 256)
    assert UP.flops == 2 * 4 * 16 * 64 * 256
    transposed = Work("Gemm", (10, 64), (8, 64), transposed=True)
    assert transposed.output == (8, 10)
    assert transposed.flops == 2 * 8 * 64 * 10
    assert UP.moved_bytes("nbits-4") == UP.moved_bytes("float") - 3.5 * 64 * 256


def test_a_ceiling_that_is_missing_is_named() -> None:
    blind = Roofline(copy_bytes_per_second=None, float_flops_per_second=1e9, int8_flops_per_second=None)
    for kernel, missing in (("float", "copy bandwidth"), ("static", "matrix rate for static")):
        found = blind.seconds(UP, kernel)  # type: ignore[arg-type]
        assert isinstance(found, NotPredicted)
        assert missing in found.not_predicted
    assert isinstance(total([(UP, "float"), (DOWN, "static")], blind), NotPredicted)
    conv = Work("Conv", (4, 4, 3, 3), (1, 4, 8, 8))
    refused = [kernel for kernel in KERNELS if isinstance(MACHINE.seconds(conv, kernel), NotPredicted)]
    assert refused == ["dynamic", "nbits-8", "nbits-4"]


@given(st.floats(1e-5, 10), st.floats(0, 0.5), st.sampled_from(KERNELS))
@settings(deadline=None, max_examples=60)
def test_the_time_of_a_changed_graph(now: float, error: float, kernel: str) -> None:
    """What is no product stays, and the interval holds what is foretold; without a change nothing changes."""
    before: Plan = [(UP, "float"), (DOWN, "float")]
    after: Plan = [(UP, kernel), (DOWN, kernel)]  # type: ignore[list-item]
    same = changed_seconds(now, before, before, MACHINE, error)
    assert isinstance(same, Predicted)
    assert same.value == pytest.approx(now)
    found = changed_seconds(now, before, after, MACHINE, error)
    assert isinstance(found, Predicted)
    assert found.low <= found.value <= found.high
    old, new = (total(one, MACHINE) for one in (before, after))
    assert isinstance(old, Predicted)
    assert isinstance(new, Predicted)
    if now >= old.value:
        assert found.value == pytest.approx(now - old.value + new.value)
    else:  # products by themselves took longer than the whole: their ratio counts
        assert found.value == pytest.approx(now * new.value / old.value)


def test_what_is_no_product_shrinks_with_the_structures() -> None:
    half: Plan = [(Work("MatMul", (64, 128), (4, 16, 64)), "float"), (Work("MatMul", (128, 64), (4, 16, 128)), "float")]
    old = total([(UP, "float"), (DOWN, "float")], MACHINE)
    new = total(half, MACHINE)
    assert isinstance(old, Predicted)
    assert isinstance(new, Predicted)
    full: Plan = [(UP, "float"), (DOWN, "float")]
    for elementwise in (0.0, 0.4, 1.0, 7.0):  # no more than what is no product can shrink
        found = changed_seconds(old.value + 1.0, full, half, MACHINE, 0.0, elementwise)
        assert isinstance(found, Predicted)
        gone = min(elementwise, 1.0) * (1 - (128 + 64) / (256 + 64))
        assert found.value == pytest.approx(new.value + 1.0 - gone)


def test_what_grows_with_a_batch_is_elementwise() -> None:
    plans: dict[int, Plan] = {}
    products = {}
    for batch in (1, 8):
        plans[batch] = [(Work("MatMul", (64, 256), (batch, 16, 64)), "float")]
        found = total(plans[batch], MACHINE)
        assert isinstance(found, Predicted)
        products[batch] = found.value
    calls, each = 3e-5, 1e-5  # of a call at all, and of each sample
    seconds = {batch: products[batch] + calls + each * batch for batch in (1, 8)}
    assert elementwise_seconds(seconds, plans, MACHINE) == pytest.approx({1: each, 8: 8 * each})
    assert elementwise_seconds(products, plans, MACHINE) == pytest.approx({1: 0, 8: 0}, abs=1e-12)


def test_ceilings_come_from_a_profile() -> None:
    missing = NotMeasured(not_measured="no such unit")
    machine = MachineProfile(
        cpu="some", cores=2, memory_bytes=1, device="cpu", gpu=None, gpu_memory_bytes=missing, threads=2,
        copy_bytes_per_second=Measured(value=1e10),
        matrix_rates=[
            MatrixRate(dtype="float32", flops_per_second=Measured(value=1e11)),
            MatrixRate(dtype="int8", flops_per_second=missing),
        ],
        call_seconds=Measured(value=1e-6),
    )  # fmt: skip
    found = Roofline.of(machine)
    expected = MACHINE.seconds(UP, "float")
    told = found.seconds(UP, "float")
    assert isinstance(told, Predicted)
    assert isinstance(expected, Predicted)
    assert told.value == pytest.approx(expected.value + 1e-6)
    assert isinstance(found.seconds(UP, "static"), NotPredicted)
