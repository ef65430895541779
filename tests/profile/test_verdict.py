"""The roofline's classes, the verdict and the costs: arithmetic on figures, no measurement."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpress.config import ProfileConfig
from modelpress.profile import packed, roofline, verdict
from modelpress.profile.ran import Operator, Ran
from modelpress.reports import Figure, Measured, NotMeasured
from modelpress.reports.profile import (
    ColdStart,
    EnergyProfile,
    LatencyProfile,
    MachineProfile,
    MatrixRate,
    StorageProfile,
    TransferTime,
)

NONE = NotMeasured(not_measured="there is none")
TEN_GIGA = Measured(value=1e10)


def machine(*, bandwidth: Figure = TEN_GIGA) -> MachineProfile:
    """10 Gop/s, 10 GB/s: the ridge is at one operation per byte."""
    return MachineProfile(
        cpu="a processor",
        cores=2,
        memory_bytes=2**30,
        device="cpu",
        gpu=None,
        gpu_memory_bytes=NONE,
        threads=2,
        copy_bytes_per_second=bandwidth,
        matrix_rates=[
            MatrixRate(dtype="float32", flops_per_second=TEN_GIGA),
            MatrixRate(dtype="int8", flops_per_second=Measured(value=4e10)),
            MatrixRate(dtype="float16", flops_per_second=NONE),
        ],
        call_seconds=Measured(value=1e-6),
    )


def operator(
    flops: int | None, moved: int | None, seconds: float | None = 1e-3, dtype: str = "float32", name: str = "node"
) -> Operator:
    why = "" if seconds is not None else "nobody looked"
    return Operator(name, "MatMul", dtype, [], 0, flops, moved, 0 if moved is not None else None, seconds, why)


@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_the_ceiling_is_the_slower_of_both(flops: int, moved: int) -> None:
    (found,) = roofline.place_operators(Ran([operator(flops, moved)], 1.0, 1.0, None), machine())
    assert isinstance(found.modelled_seconds, Measured)
    assert found.modelled_seconds.value == pytest.approx(max(flops, moved) / 1e10)
    if flops + moved < 1e4:
        assert found.bound == "latency"
    else:
        assert found.bound == ("compute" if flops > moved else "memory")
    assert isinstance(found.intensity, Measured if moved else NotMeasured)


def test_integers_are_under_their_own_ceiling() -> None:
    ran = Ran([operator(10**9, 1, dtype="int8"), operator(10**9, 1, dtype="float16")], 1.0, 1.0, None)
    first, second = roofline.place_operators(ran, machine())
    assert isinstance(first.modelled_seconds, Measured)
    assert first.modelled_seconds.value == pytest.approx(0.025)
    assert (second.bound, isinstance(second.modelled_seconds, NotMeasured)) == (None, True)


@pytest.mark.parametrize(
    ("one", "at"),
    [
        (operator(None, 10**6), machine()),
        (operator(10**6, None), machine()),
        (operator(10**6, 10**6), machine(bandwidth=NONE)),
    ],
)
def test_what_is_not_known_is_under_no_ceiling(one: Operator, at: MachineProfile) -> None:
    ran = Ran([one], 1.0, 1.0, None)
    (found,) = roofline.place_operators(ran, at)
    assert found.bound is None
    assert isinstance(found.modelled_seconds, NotMeasured)
    assert "modelled_seconds" not in found.metrics()
    uncounted = roofline.total(ran, [found]).uncounted
    assert uncounted == (1 if one.flops is None else 0)


def test_shares_add_up_and_the_rest_is_the_runtimes() -> None:
    ran = Ran(
        [operator(1, 1, 0.001), operator(1, 1, 0.003)], run_seconds=0.005, watched_seconds=0.006, activations_bytes=1
    )
    found = roofline.place_operators(ran, machine())
    totals = roofline.total(ran, found)
    assert [one.share for one in found] == [Measured(value=0.25), Measured(value=0.75)]
    assert isinstance(totals.outside_seconds, Measured)
    assert totals.outside_seconds.value == pytest.approx(0.001)
    assert isinstance(totals.watched_overhead, Measured)
    assert totals.watched_overhead.value == pytest.approx(0.2)
    assert isinstance(totals.overhead, Measured)
    assert totals.overhead.value == pytest.approx(0.1)  # every second run


def start(seconds: float = 0.0) -> ColdStart:
    return ColdStart(**dict.fromkeys(ColdStart.model_fields, Measured(value=seconds)))


def stored(transfer: float = 0.0) -> StorageProfile:
    slow = TransferTime(network="slow", bytes_per_second=1.0, modelled_seconds=Measured(value=transfer))
    fast = TransferTime(network="fast", bytes_per_second=9.0, modelled_seconds=Measured(value=transfer / 9))
    return StorageProfile(
        raw_bytes=1,
        stored_bytes=Measured(value=1),
        read_seconds=NONE,
        decode_seconds=NONE,
        decode_bytes_per_second=NONE,
        transfers=[slow, fast],
    )


def used(joules: Figure = NONE) -> EnergyProfile:
    return EnergyProfile(
        cpu_joules_per_request=joules, memory_joules_per_request=NONE, gpu_joules_per_request=NONE, idle_watts=NONE
    )


def closed(batch_size: int, per_second: float) -> LatencyProfile:
    seconds = batch_size / per_second
    return LatencyProfile(
        batch_size=batch_size,
        calls=10,
        p50_seconds=seconds,
        p99_seconds=seconds,
        throughput_per_second=per_second,
        mean_seconds=seconds,
        percentiles_seconds=[seconds] * 101,
    )


def judged(operators: list[Operator], config: ProfileConfig | None = None, **around: object) -> verdict.ProfileVerdict:
    config = config or ProfileConfig()
    whole = sum(one.seconds or 0.0 for one in operators)
    ran = Ran(operators, whole, whole, None)
    placed = roofline.place_operators(ran, machine())
    energy = around.get("energy", used())
    assert isinstance(energy, EnergyProfile)
    return verdict.judge(
        config,
        placed,
        roofline.total(ran, placed),
        around.get("storage", stored()),  # type: ignore[arg-type]
        around.get("start", start()),  # type: ignore[arg-type]
        energy,
        verdict.costs(config, [closed(1, 10.0), closed(32, 100.0)], energy),
    )


COMPUTING = operator(10**9, 10**6, 0.2, name="computing")
MOVING = operator(10**6, 10**9, 0.3, name="moving")
SHORT = operator(10, 10, 0.4, name="short")


def test_the_resource_with_most_of_the_time_binds() -> None:
    assert judged([COMPUTING]).binds == "compute"
    assert judged([COMPUTING, MOVING]).binds == "memory-bandwidth"
    found = judged([COMPUTING, MOVING, SHORT])
    assert found.binds == "latency"
    assert [row.resource for row in found.resources] == [
        *("latency", "memory-bandwidth", "compute", "storage-transfer", "energy-cost")
    ]
    shares = [row.share.value for row in found.resources if isinstance(row.share, Measured)]
    assert sum(shares) == pytest.approx(1.0)
    assert "44%" in found.reason


def test_what_happens_once_is_shared_by_all_requests_of_a_start() -> None:
    often = ProfileConfig(requests_per_start=10)
    assert judged([COMPUTING], often, storage=stored(transfer=90.0)).binds == "storage-transfer"
    assert judged([COMPUTING], storage=stored(transfer=90.0)).binds == "compute"
    assert judged([COMPUTING], often, start=start(1.0)).binds == "latency"  # four parts there, three of storage


def test_the_slowest_network_counts() -> None:
    found = judged([COMPUTING], ProfileConfig(requests_per_start=1), storage=stored(transfer=90.0))
    (row,) = [row for row in found.resources if row.resource == "storage-transfer"]
    assert row.seconds_per_request == Measured(value=90.0)
    assert "slow" in row.reason


def test_a_budget_of_energy_that_is_exceeded_binds_before_all() -> None:
    energy = used(Measured(value=3.0, by="RAPL"))
    within = judged([COMPUTING], ProfileConfig(max_joules_per_request=3.0), energy=energy)
    beyond = judged([COMPUTING], ProfileConfig(max_joules_per_request=1.5), energy=energy)
    assert (within.binds, beyond.binds) == ("compute", "energy-cost")
    assert isinstance(beyond.share, Measured)
    assert beyond.share.value == pytest.approx(2.0)
    assert "compute" in beyond.reason


def test_a_budget_of_what_nobody_measured_is_told_and_does_not_bind() -> None:
    found = judged([COMPUTING], ProfileConfig(max_joules_per_request=1e-9))
    assert found.binds == "compute"
    assert "was not measured" in found.resources[-1].reason


def test_a_million_requests_cost_what_their_hours_cost() -> None:
    config = ProfileConfig(prices={"big": 7.2, "small": 3.6}, max_cost_per_million=9.0)
    found = judged([COMPUTING], config)
    assert found.binds == "energy-cost"
    assert "10 USD on small" in found.reason  # 10 000 s at 100 a second, by the cheapest machine
    dear, cheap = verdict.costs(config, [closed(1, 10.0), closed(32, 100.0)], used())
    assert (dear.price, cheap.price) == ("big", "small")
    assert cheap.batch_size == 32
    assert cheap.total_per_million == Measured(value=10.0, by="the machine's price alone")
    assert isinstance(cheap.energy_per_million, NotMeasured)


def test_energy_that_has_a_price_and_was_not_measured_leaves_the_total_open() -> None:
    config = ProfileConfig(prices={"small": 3.6}, price_per_kilowatt_hour=0.36)
    (unknown,) = verdict.costs(config, [closed(32, 100.0)], used())
    assert isinstance(unknown.total_per_million, NotMeasured)
    (known,) = verdict.costs(config, [closed(32, 100.0)], used(Measured(value=2.0)))
    assert isinstance(known.total_per_million, Measured)
    assert known.total_per_million.value == pytest.approx(10.0 + 0.2)  # 2 MJ are 0.556 kWh


def test_without_times_of_operators_the_ceilings_speak_and_say_so() -> None:
    untimed = [operator(10**9, 10**6, None), operator(10**6, 10**8, None)]
    ran = Ran(untimed, run_seconds=0.15, watched_seconds=0.15, activations_bytes=None)
    placed = roofline.place_operators(ran, machine())
    found = verdict.judge(
        ProfileConfig(), placed, roofline.total(ran, placed), stored(), packed.no_cold_start(), used(), []
    )
    seconds = {row.resource: row.seconds_per_request for row in found.resources}
    assert found.binds == "compute"
    assert isinstance(seconds["latency"], Measured)
    assert seconds["latency"].value == pytest.approx(0.15 - 0.1 - 0.01)
    assert "modelled" in found.reason
    assert isinstance(seconds["storage-transfer"], NotMeasured)
