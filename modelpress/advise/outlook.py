"""From what a trial found to what the hardware that was asked about will make of it. Arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

from modelpress.advise.work import Kernel, Plan, Speeds, Work, changed_seconds, elementwise_seconds
from modelpress.config import HardwareConfig
from modelpress.reports import NotPredicted, Outlook, Predicted, Prediction

Plans = dict[int, list[tuple[Work, Kernel]]]
"""By batch size: products with their kernels."""


@dataclass(frozen=True)
class Known:
    """What was measured of the model as it is."""

    seconds: dict[int, float]
    """Median time of a call by batch size."""
    fastest: dict[int, float]
    """The fastest of many calls, as products are measured."""
    plans: Plans
    """Its products."""
    session_seconds: float
    """To make a session of it."""
    activations_bytes: float | None
    """Most memory of values that are alive at once; None: not known."""
    cores: int
    """That all of it was measured on."""

    @property
    def batch_size(self) -> int:
        """The larger one."""
        return max(self.seconds)


@dataclass(frozen=True)
class Errors:
    """How far off numbers are known to be, as shares."""

    latency_seconds: float
    batch_seconds: float
    cold_start_seconds: float


@dataclass(frozen=True)
class Found:
    """What a trial found, as numbers."""

    plans: Plans
    """Its products."""
    published_bytes: Prediction
    """Of a pack of it."""
    weights_bytes: float
    """Of its tensors in memory, as the kernels read them."""
    decode_seconds: float
    """CPU time of decoding its tensors."""
    quality_drop: Prediction
    """In the metric's units."""


def outlook(found: Found, known: Known, hardware: HardwareConfig, speeds: Speeds, errors: Errors) -> Outlook:
    """What is foretold of a model.

    Args:
        found: what a trial gave.
        known: of the model as it is.
        hardware: what it will run on.
        speeds: of single products.
        errors: of foretold times.
    """
    one = _seconds(found.plans, known, 1, hardware, speeds, errors.latency_seconds)
    many = _seconds(found.plans, known, known.batch_size, hardware, speeds, errors.batch_seconds)
    throughput = _inverse(many, float(known.batch_size))
    return Outlook(
        published_bytes=found.published_bytes,
        memory_bytes=_memory(found, known),
        latency_seconds=one,
        batch_seconds=many,
        throughput_per_second=throughput,
        cold_start_seconds=_cold_start(found, known, hardware, one, errors.cold_start_seconds),
        cost_per_million=_cost(throughput, hardware),
        quality_drop=found.quality_drop,
    )


def _seconds(
    plans: Plans, known: Known, batch: int, hardware: HardwareConfig, speeds: Speeds, error: float
) -> Prediction:
    if hardware.cores not in (0, known.cores):
        return NotPredicted(
            not_predicted=f"measured on {known.cores} cores, asked for {hardware.cores}: run the advice there, or on "
            f"as many (taskset -c 0-{hardware.cores - 1})"
        )
    before, after = known.plans[batch], plans[batch]
    if _same(before, after):
        now = known.seconds[batch]
        return Predicted(value=now, low=now * (1 - error / 2), high=now * (1 + error / 2), by="the float graph's own")
    moving = elementwise_seconds(known.fastest, known.plans, speeds)[batch]
    found = changed_seconds(known.fastest[batch], before, after, speeds, error, moving)
    if isinstance(found, NotPredicted):
        return found
    # Whatever else the machine does strikes medians, of one graph as of the other.
    return found.scaled(known.seconds[batch] / known.fastest[batch])


def _same(before: Plan, after: Plan) -> bool:
    return list(before) == list(after)


def _memory(found: Found, known: Known) -> Prediction:
    if known.activations_bytes is None:
        weights = found.weights_bytes
        return Predicted(value=weights, low=weights, high=2 * weights, by="weights alone: activations not measured")
    value = found.weights_bytes + known.activations_bytes
    return Predicted(
        value=value,
        low=found.weights_bytes,
        high=value + known.activations_bytes,
        by=f"weights {found.weights_bytes:,.0f}, activations {known.activations_bytes:,.0f}",
    )


def _cold_start(found: Found, known: Known, hardware: HardwareConfig, latency: Prediction, error: float) -> Prediction:
    size = found.published_bytes
    for part in (size, latency):
        if isinstance(part, NotPredicted):
            return part
    assert isinstance(size, Predicted)
    assert isinstance(latency, Predicted)
    wire = size.scaled(8 / hardware.bandwidth_bits_per_second)
    here = found.decode_seconds / known.cores + known.session_seconds + latency.value
    value = wire.value + here
    margin = (wire.high - wire.low) / 2 + error * here
    return Predicted(
        value=value,
        low=max(value - margin, 0.0),
        high=value + margin,
        by=f"network {wire.value:.3f} s, decoding {found.decode_seconds / known.cores:.3f} s, session "
        f"{known.session_seconds:.3f} s, first answer {latency.value:.4f} s",
    )


def _inverse(seconds: Prediction, samples: float) -> Prediction:
    if isinstance(seconds, NotPredicted):
        return seconds
    low = max(seconds.low, 1e-3 * seconds.value)  # an interval that reaches 0 says nothing of the other end
    return Predicted(
        value=samples / seconds.value, low=samples / seconds.high, high=samples / low, by=f"{samples:.0f} a call"
    )


def _cost(throughput: Prediction, hardware: HardwareConfig) -> Prediction:
    if not hardware.price_per_hour:
        return NotPredicted(not_predicted="no advise.hardware.price_per_hour")
    if isinstance(throughput, NotPredicted):
        return throughput
    second = hardware.price_per_hour / 3600 * 1e6
    return Predicted(
        value=second / throughput.value,
        low=second / throughput.high,
        high=second / throughput.low,
        by=f"{hardware.price_per_hour:g} an hour at {throughput.value:,.0f}/s, always busy",
    )
