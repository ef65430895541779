"""From what was counted and timed to the roofline: which ceiling each operator is under.

Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for Multicore Architectures",
CACM 52 (2009). To their two ceilings comes a third that small models meet: what it costs to call an operator at all.
"""

from __future__ import annotations

from modelpress.profile.ran import Operator, Ran
from modelpress.reports.measured import Figure, Measured, NotMeasured, value_of
from modelpress.reports.profile import Bound, MachineProfile, OperatorProfile, OperatorTotals


def place_operators(ran: Ran, machine: MachineProfile) -> list[OperatorProfile]:
    """Each operator under the machine's ceilings."""
    timed = [one.seconds for one in ran.operators if one.seconds is not None]
    whole = sum(timed) if len(timed) == len(ran.operators) else None
    return [_placed(one, machine, whole) for one in ran.operators]


def _placed(one: Operator, machine: MachineProfile, whole: float | None) -> OperatorProfile:
    moved = None if one.read_bytes is None or one.written_bytes is None else one.read_bytes + one.written_bytes
    least, bound = _ceiling(one, moved, machine)
    return OperatorProfile(
        name=one.name,
        op_type=one.op_type,
        dtype=one.dtype,
        weights=one.weights,
        weight_bytes=one.weight_bytes,
        flops=_counted(one.flops, f"no formula for {one.op_type} with these shapes"),
        read_bytes=_counted(one.read_bytes, "the shape of an input is not known"),
        written_bytes=_counted(one.written_bytes, "the shape of an output is not known"),
        intensity=_intensity(one.flops, moved),
        seconds=Measured(value=one.seconds) if one.seconds is not None else NotMeasured(not_measured=one.untimed),
        share=_share(one.seconds, whole),
        modelled_seconds=least,
        bound=bound,
    )


def _counted(value: int | None, why: str) -> Figure:
    return NotMeasured(not_measured=why) if value is None else Measured(value=value)


def _intensity(flops: int | None, moved: int | None) -> Figure:
    if flops is None or moved is None:
        return NotMeasured(not_measured="its operations or its bytes could not be counted")
    if moved == 0:
        return NotMeasured(not_measured="it moves no bytes")
    return Measured(value=flops / moved)


def _share(seconds: float | None, whole: float | None) -> Figure:
    if seconds is None or not whole:
        return NotMeasured(not_measured="not every operator has a time")
    return Measured(value=seconds / whole)


def _ceiling(one: Operator, moved: int | None, machine: MachineProfile) -> tuple[Figure, Bound | None]:
    """The least time by the ceilings, and which of them it is."""
    rate = matrix_rate(machine, one.dtype)
    bandwidth, call = value_of(machine.copy_bytes_per_second), value_of(machine.call_seconds)
    if one.flops is None or moved is None:
        return NotMeasured(not_measured="its operations or its bytes could not be counted"), None
    if rate is None and one.flops:
        return NotMeasured(not_measured=f"the rate of matrix products in {one.dtype} was not measured"), None
    if bandwidth is None:
        return NotMeasured(not_measured="the bandwidth of memory was not measured"), None
    computing, moving = (one.flops / rate if rate else 0.0), moved / bandwidth
    least = Measured(value=max(computing, moving))
    if call is not None and computing + moving < call:
        return least, "latency"
    return least, "compute" if computing > moving else "memory"


def matrix_rate(machine: MachineProfile, dtype: str) -> float | None:
    """Measured rate of matrix products in a type, operations per second; other types than those are computed as
    float32 is."""
    rates = {one.dtype: value_of(one.flops_per_second) for one in machine.matrix_rates}
    return rates.get(dtype, rates.get("float32"))


def total(ran: Ran, operators: list[OperatorProfile]) -> OperatorTotals:
    """All operators together, and what the runtime takes beside them."""
    flops = [found for one in operators if (found := value_of(one.flops)) is not None]
    sizes = [value_of(figure) for one in operators for figure in (one.read_bytes, one.written_bytes)]
    seconds = [found for one in operators if (found := value_of(one.seconds)) is not None]
    timed = len(seconds) == len(operators) and bool(operators)
    untimed = NotMeasured(not_measured="not every operator has a time")
    known = [size for size in sizes if size is not None]
    slower = ran.watched_seconds / ran.run_seconds - 1
    return OperatorTotals(
        flops=Measured(value=sum(flops)) if flops else NotMeasured(not_measured="no operator could be counted"),
        moved_bytes=Measured(value=sum(known))
        if len(known) == len(sizes)
        else NotMeasured(not_measured="the shape of a value is not known"),
        uncounted=len(operators) - len(flops),
        operator_seconds=Measured(value=sum(seconds)) if timed else untimed,
        run_seconds=Measured(value=ran.run_seconds),
        outside_seconds=Measured(value=max(0.0, ran.run_seconds - sum(seconds))) if timed else untimed,
        watched_overhead=Measured(value=slower, by="runs with and without watching, in turns"),
        overhead=Measured(value=slower * ran.watched_share, by=f"{ran.watched_share:.0%} of the runs are watched"),
    )
