"""What a graph's products have to do, and how long that takes on paper: the roofline (Williams et al. 2009,
doi:10.1145/1498765.1498785).

Only the standard library is imported: what ranks techniques is arithmetic, whatever has measured its numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from modelpress.reports import NotPredicted, Predicted, Prediction
from modelpress.reports.measured import value_of
from modelpress.reports.profile import MachineProfile

Kernel = Literal["float", "dynamic", "static", "nbits-8", "nbits-4"]
"""How a product is computed: in float, whatever its weight is stored as; in int8 with activations ranged per call, or
by calibration; by MatMulNBits, which reads weights of 8 or 4 bits."""

KERNELS: tuple[Kernel, ...] = ("float", "dynamic", "static", "nbits-8", "nbits-4")
WEIGHT_BYTES: dict[Kernel, float] = {"float": 4.0, "dynamic": 1.0, "static": 1.0, "nbits-8": 1.0, "nbits-4": 0.5}
"""Of one weight as the kernel reads it, without its scales."""


@dataclass(frozen=True)
class Work:
    """One product: an operator, its weight and what it multiplies by it."""

    op_type: Literal["MatMul", "Gemm", "Conv"]
    """Operator."""
    weight: tuple[int, ...]
    """Shape of the weight as the operator reads it."""
    input: tuple[int, ...]
    """Shape of the activation, samples first."""
    transposed: bool = False
    """For `Gemm`: the weight is (out, in)."""
    strides: tuple[int, ...] = ()
    """For `Conv`: of the kernel; empty: 1."""
    pads: tuple[int, ...] = ()
    """For `Conv`: at the beginnings and at the ends; empty: 0."""
    groups: int = 1
    """For `Conv`: groups of channels."""

    def __str__(self) -> str:
        weight, given = ("×".join(map(str, shape)) for shape in (self.weight, self.input))
        return f"{self.op_type} {weight} of {given}"

    @property
    def elements(self) -> int:
        """Of the weight."""
        return math.prod(self.weight)

    @property
    def output(self) -> tuple[int, ...]:
        """Shape of what comes out."""
        if self.op_type == "Conv":
            return (self.input[0], self.weight[0], *self._places())
        return (*self.input[:-1], self.weight[0] if self.transposed else self.weight[-1])

    @property
    def flops(self) -> float:
        """Operations; a multiplication and an addition are two."""
        inputs = self.elements // self.weight[0] if self.op_type == "Conv" else self.input[-1]
        return 2.0 * math.prod(self.output) * inputs

    def moved_bytes(self, kernel: Kernel) -> float:
        """Bytes read and written: the weight, the activation and the result, the last two in float32."""
        return WEIGHT_BYTES[kernel] * self.elements + 4.0 * (math.prod(self.input) + math.prod(self.output))

    def takes(self, kernel: Kernel) -> bool:
        """Whether there is such a kernel for the operator."""
        return self.op_type != "Conv" or kernel in ("float", "static")

    def _places(self) -> tuple[int, ...]:
        axes = len(self.input) - 2
        strides, pads = self.strides or (1,) * axes, self.pads or (0,) * (2 * axes)
        kernel = self.weight[2:]
        return tuple(
            (self.input[2 + axis] + pads[axis] + pads[axes + axis] - kernel[axis]) // strides[axis] + 1
            for axis in range(axes)
        )


class Speeds(Protocol):
    """Tells how long a product takes."""

    def seconds(self, work: Work, kernel: Kernel, alike: int = 1) -> Prediction:
        """Of one product; `alike` is how many of its shape a graph has, each with a weight of its own."""


@dataclass(frozen=True)
class Roofline:
    """Seconds on paper: the larger of operations ÷ matrix rate and bytes ÷ bandwidth, and what a call costs.

    A ceiling that was not measured makes the answer a reason.
    """

    copy_bytes_per_second: float | None
    """Of memory."""
    float_flops_per_second: float | None
    """Matrix rate in float32."""
    int8_flops_per_second: float | None
    """Matrix rate in int8."""
    call_seconds: float = 0.0
    """Of an operator with nothing to compute."""
    error: float = 0.5
    """Half-width of the interval, as a share: what is on paper is at most this sure."""

    @classmethod
    def of(cls, machine: MachineProfile) -> Roofline:
        """By the ceilings that a profile measured."""
        rates = {one.dtype: value_of(one.flops_per_second) for one in machine.matrix_rates}
        return cls(
            copy_bytes_per_second=value_of(machine.copy_bytes_per_second),
            float_flops_per_second=rates.get("float32"),
            int8_flops_per_second=rates.get("int8"),
            call_seconds=value_of(machine.call_seconds) or 0.0,
        )

    def seconds(self, work: Work, kernel: Kernel, alike: int = 1) -> Prediction:  # noqa: ARG002 - the protocol's
        """Of one product."""
        if not work.takes(kernel):
            return NotPredicted(not_predicted=f"{work.op_type} has no kernel {kernel}")
        # MatMulNBits rounds activations to int8 as it reads them (accuracy level 4).
        rate = self.float_flops_per_second if kernel == "float" else self.int8_flops_per_second
        if not rate or not self.copy_bytes_per_second:
            missing = "copy bandwidth" if rate else f"matrix rate for {kernel}"
            return NotPredicted(not_predicted=f"no {missing} was measured on this machine")
        value = max(work.flops / rate, work.moved_bytes(kernel) / self.copy_bytes_per_second) + self.call_seconds
        return Predicted(
            value=value, low=value * (1 - self.error), high=value * (1 + self.error), by="roofline of measured ceilings"
        )


Plan = Sequence[tuple[Work, Kernel]]
"""A graph's products, each with its kernel."""


def alike(plan: Plan) -> Counter[Work]:
    """How many products of a graph are of one shape, whatever computes them."""
    return Counter(work for work, _ in plan)


def total(plan: Plan, speeds: Speeds) -> Prediction:
    """Seconds of all products together; a reason where one of them has none.

    Errors of products of one class are one error, so that intervals add up at their ends.
    """
    counts, among = Counter(plan), alike(plan)
    value = low = high = 0.0
    for (work, kernel), count in counts.items():
        found = speeds.seconds(work, kernel, among[work])
        if isinstance(found, NotPredicted):
            return found
        value, low, high = value + found.value * count, low + found.low * count, high + found.high * count
    return Predicted(value=value, low=low, high=high, by=f"{len(counts)} classes of products")


def activations(plan: Plan) -> int:
    """Elements that all products give."""
    return sum(math.prod(work.output) for work, _ in plan)


def elementwise_seconds(seconds: Mapping[int, float], plans: Mapping[int, Plan], speeds: Speeds) -> dict[int, float]:
    """What of a call goes with the elements that products give, by batch size: normalisations, activations, softmax.

    What is no product grows by a sample's part with each sample of a larger call; what does not grow is the price of
    calling operators at all, and stays whatever their width.

    Args:
        seconds: of a call, measured at two batch sizes.
        plans: its products at both.
        speeds: of single products.
    """
    (small, large), rest = sorted(seconds), {}
    for batch, now in seconds.items():
        products = total(plans[batch], speeds)
        rest[batch] = max(now - products.value, 0.0) if isinstance(products, Predicted) else 0.0
    slope = max(rest[large] - rest[small], 0.0) / (large - small)
    return {batch: min(slope * batch, rest[batch]) for batch in seconds}


def changed_seconds(
    now: float, before: Plan, after: Plan, speeds: Speeds, error: float, elementwise: float = 0.0
) -> Prediction:
    """Seconds of a call once its products are others: what was measured of the whole, less what the products took, plus
    what the new ones take.

    What is no product stays, but for the part that goes with the elements that products give: that shrinks where
    structures were removed.

    Args:
        now: seconds of a call as it is, measured, above 0.
        before: its products.
        after: those of the changed graph.
        speeds: of single products.
        error: how far off such sums are known to be, as a share.
        elementwise: seconds of `now` that go with the elements.
    """
    old, new = total(before, speeds), total(after, speeds)
    for found in (old, new):
        if isinstance(found, NotPredicted):
            return found
    assert isinstance(old, Predicted)
    assert isinstance(new, Predicted)
    # Products by themselves may be measured to take longer than all of the call, where it is short.
    scale = min(1.0, now / old.value) if old.value else 1.0
    left = 1 - activations(after) / max(activations(before), 1)
    rest = max(now - scale * old.value, 0.0)
    rest = max(rest - left * min(elementwise, rest), 0.0)
    value = rest + scale * new.value
    spread = scale * ((old.high - old.low) + (new.high - new.low)) / 2 if before != after else 0.0
    margin = spread + error * value
    return Predicted(
        value=value,
        low=max(value - margin, 0.0),
        high=value + margin,
        by=f"{1000 * now:.3f} ms measured, products {1000 * old.value:.3f} → {1000 * new.value:.3f} ms",
    )
