"""Which resource binds, by the time of one request: what has to give before the model is cheaper or faster here.

The time of a request is that of its share of a run, and of its share of what happens once per start. Operators under
the compute ceiling count for compute, those under the bandwidth ceiling for memory bandwidth; calls that are too short
for either, the runtime's own time, and the start of a process count for latency; fetching, verifying, decoding and the
modelled transfer of the pack for storage and transfer. Joules and money are no seconds: they bind where a budget of the
config is exceeded, and then before all others.
"""

from __future__ import annotations

from collections.abc import Sequence

from modelpress.config import ProfileConfig
from modelpress.profile.energy import joules_per_request
from modelpress.profile.show import time_of
from modelpress.reports.measured import Figure, Measured, NotMeasured, value_of
from modelpress.reports.profile import (
    ColdStart,
    Cost,
    EnergyProfile,
    LatencyProfile,
    OperatorProfile,
    OperatorTotals,
    ProfileVerdict,
    Resource,
    ResourceShare,
    StorageProfile,
)

MILLION = 1e6
JOULES_PER_KILOWATT_HOUR = 3.6e6
_ONCE = ("interpreter_seconds", "import_seconds", "session_seconds", "first_answer_seconds")


def costs(config: ProfileConfig, latency: Sequence[LatencyProfile], energy: EnergyProfile) -> list[Cost]:
    """A million requests on each machine of the price table, at the best measured throughput."""
    best = max(latency, key=lambda row: row.throughput_per_second)
    hours = MILLION / best.throughput_per_second / 3600
    joules = joules_per_request(energy)
    return [_cost(name, price, best.batch_size, hours, joules, config) for name, price in sorted(config.prices.items())]


def _cost(name: str, price: float, batch_size: int, hours: float, joules: Figure, config: ProfileConfig) -> Cost:
    machine = price * hours
    energy: Figure
    if not config.price_per_kilowatt_hour:
        energy = NotMeasured(
            not_measured="energy is part of the machine's price (profile.price_per_kilowatt_hour is 0)"
        )
        total: Figure = Measured(value=machine, by="the machine's price alone")
    elif (used := value_of(joules)) is None:
        energy = joules
        total = NotMeasured(not_measured="the energy of a request was not measured, and has a price of its own")
    else:
        energy = Measured(value=used * MILLION / JOULES_PER_KILOWATT_HOUR * config.price_per_kilowatt_hour)
        total = Measured(value=machine + energy.value, by="machine and energy")
    return Cost(
        price=name,
        per_hour=price,
        currency=config.currency,
        batch_size=batch_size,
        machine_per_million=Measured(value=machine),
        energy_per_million=energy,
        total_per_million=total,
    )


def judge(
    config: ProfileConfig,
    operators: Sequence[OperatorProfile],
    totals: OperatorTotals,
    storage: StorageProfile,
    start: ColdStart,
    energy: EnergyProfile,
    found_costs: Sequence[Cost],
) -> ProfileVerdict:
    """Which resource binds, and the share of each."""
    seconds: dict[Resource, tuple[Figure, str]] = {
        "compute": _under(operators, "compute", config.batch_size),
        "memory-bandwidth": _under(operators, "memory", config.batch_size),
        "latency": _latency(operators, totals, start, config),
        "storage-transfer": _storage(storage, start, config),
    }
    known = {name: found[0].value for name, found in seconds.items() if isinstance(found[0], Measured)}
    whole = sum(known.values())
    rows = [
        ResourceShare(
            resource=name,
            seconds_per_request=figure,
            share=Measured(value=known[name] / whole) if name in known and whole else _no_share(figure),
            reason=reason,
        )
        for name, (figure, reason) in seconds.items()
    ]
    rows.sort(key=lambda row: -(value_of(row.share) or 0.0))
    times_over, budget = _budgets(config, energy, found_costs)
    over = value_of(times_over)
    rows.append(
        ResourceShare(
            resource="energy-cost",
            seconds_per_request=NotMeasured(not_measured="joules and money are no seconds; they have budgets"),
            share=NotMeasured(not_measured="joules and money are no share of the time; they have budgets"),
            reason=budget,
        )
    )
    if over is not None and over > 1:
        rows.insert(0, rows.pop())
        return ProfileVerdict(
            binds="energy-cost",
            share=times_over,
            reason=f"{budget}; of the time, {_words(rows[1])}",
            resources=rows,
        )
    first = rows[0]
    return ProfileVerdict(binds=first.resource, share=first.share, reason=_words(first), resources=rows)


def _words(row: ResourceShare) -> str:
    share = value_of(row.share)
    part = "no share of a request's time is known" if share is None else f"{share:.0%} of a request's time"
    return f"{_NAMES[row.resource]}: {part}; {row.reason}"


_NAMES: dict[Resource, str] = {
    "compute": "compute",
    "memory-bandwidth": "memory bandwidth",
    "latency": "latency",
    "storage-transfer": "storage and transfer",
    "energy-cost": "energy and cost",
}


def _no_share(figure: Figure) -> Figure:
    return figure if isinstance(figure, NotMeasured) else NotMeasured(not_measured="no time was measured at all")


def _seconds_of(one: OperatorProfile) -> float | None:
    """Its time; where a device's operators have none, what the ceilings allow."""
    return value_of(one.seconds) if isinstance(one.seconds, Measured) else value_of(one.modelled_seconds)


def _under(operators: Sequence[OperatorProfile], bound: str, batch_size: int) -> tuple[Figure, str]:
    """Seconds per request of the operators under a ceiling, and the numbers."""
    placed = [one for one in operators if one.bound is not None]
    if not placed:
        return NotMeasured(not_measured="no operator could be placed under a ceiling"), "no operator could be placed"
    chosen = [(one, seconds) for one in placed if one.bound == bound and (seconds := _seconds_of(one)) is not None]
    total = sum(seconds for _, seconds in chosen)
    if not chosen:
        return Measured(value=0.0, by="no operator is under this ceiling"), "no operator is under this ceiling"
    most, seconds = max(chosen, key=lambda pair: pair[1])
    least = sum(value_of(one.modelled_seconds) or 0.0 for one, _ in chosen)
    modelled = any(isinstance(one.seconds, NotMeasured) for one, _ in chosen)
    reach = "modelled, not timed" if modelled else f"they reach {least / total:.0%} of the ceiling"
    words = (
        f"{len(chosen)} of {len(operators)} operators are under this ceiling and take {time_of(total / batch_size)}; "
        f"{reach}; the most takes {most.op_type} {most.name}, {time_of(seconds / batch_size)}"
    )
    return Measured(value=total / batch_size, by="modelled" if modelled else "operators' times"), words


def _latency(
    operators: Sequence[OperatorProfile], totals: OperatorTotals, start: ColdStart, config: ProfileConfig
) -> tuple[Figure, str]:
    short = [one for one in operators if one.bound == "latency"]
    if isinstance(totals.outside_seconds, Measured):
        outside = totals.outside_seconds.value
        calls = sum(value_of(one.seconds) or 0.0 for one in short)
    else:  # of a run whose operators have no times, all that the ceilings do not explain
        run = value_of(totals.run_seconds) or 0.0
        explained = sum(value_of(one.modelled_seconds) or 0.0 for one in operators if one.bound != "latency")
        outside, calls = max(0.0, run - explained), 0.0
    once = [value for name in _ONCE if (value := value_of(getattr(start, name))) is not None]
    begun = sum(once) / config.requests_per_start
    total = (outside + calls) / config.batch_size + begun
    began = f"and the start of a process {time_of(begun)}" if once else "the start of a process was not measured"
    words = (
        f"{len(short)} of {len(operators)} operators are shorter than a call and take "
        f"{time_of(calls / config.batch_size)}, the runtime itself {time_of(outside / config.batch_size)}, {began}"
    )
    return Measured(value=total), words


def _storage(storage: StorageProfile, start: ColdStart, config: ProfileConfig) -> tuple[Figure, str]:
    parts = [value_of(figure) for figure in (start.fetch_seconds, start.verify_seconds, start.decode_seconds)]
    known = [part for part in parts if part is not None]
    if not known:
        return NotMeasured(not_measured="no pack was started"), "no pack was started"
    slowest = (
        max((value_of(one.modelled_seconds) or 0.0, one.network) for one in storage.transfers)
        if storage.transfers
        else (0.0, "no network")
    )
    total = (sum(known) + slowest[0]) / config.requests_per_start
    words = (
        f"a start reads, verifies and decodes for {time_of(sum(known))} and waits {time_of(slowest[0])} for "
        f"{slowest[1]}, over {config.requests_per_start:,} requests {time_of(total)} each"
    )
    return Measured(value=total), words


def _budgets(config: ProfileConfig, energy: EnergyProfile, found: Sequence[Cost]) -> tuple[Figure, str]:
    """How many times over its budget energy or cost is, the larger of both, and the numbers."""
    ratios: list[tuple[float, str]] = []
    missing: list[str] = []
    if config.max_joules_per_request:
        joules = joules_per_request(energy)
        if isinstance(joules, Measured):
            words = f"a request takes {joules.value:.3g} J, the budget is {config.max_joules_per_request:.3g} J"
            ratios.append((joules.value / config.max_joules_per_request, words))
        else:
            missing.append(f"energy has a budget and was not measured: {joules.not_measured}")
    if config.max_cost_per_million:
        known = [(total, one) for one in found if (total := value_of(one.total_per_million)) is not None]
        if known:
            total, cheapest = min(known, key=lambda pair: pair[0])
            words = (
                f"a million requests cost {total:.4g} {cheapest.currency} on {cheapest.price}, the budget is "
                f"{config.max_cost_per_million:.4g} {cheapest.currency}"
            )
            ratios.append((total / config.max_cost_per_million, words))
        else:
            missing.append("cost has a budget, and energy, which has a price of its own, was not measured")
    if not ratios:
        why = "; ".join(missing) or "no budget is set: profile.max_joules_per_request, profile.max_cost_per_million"
        return NotMeasured(not_measured=why), why
    worst, words = max(ratios)
    return Measured(value=worst, by=words), "; ".join([words, *missing])
