"""Reports of other commands that a page shows as well: a profile and an advice."""

from __future__ import annotations

from modelpress.reports import (
    AdviceCheck,
    CheckRow,
    Measured,
    NotMeasured,
    ParallelReport,
    ProfileReport,
    TrafficReport,
    TrainReport,
)
from modelpress.reports.advice import AdviceReport, Advised, NotPredicted, Outlook, Predicted
from modelpress.reports.profile import (
    ColdStart,
    Cost,
    EnergyProfile,
    LatencyProfile,
    LoadProfile,
    MachineProfile,
    MatrixRate,
    MemoryPoint,
    MemoryProfile,
    OperatorProfile,
    OperatorTotals,
    ProfileVerdict,
    ResourceShare,
    StorageProfile,
)


def figure(value: float) -> Measured:
    return Measured(value=value)


def profile(word: str = "") -> ProfileReport:
    missing = NotMeasured(not_measured=f"no counter here{word}")
    some = figure(0.5)
    percentiles = [0.001 * (1 + place) for place in range(101)]
    operators = [
        OperatorProfile(
            name=f"/layer.{number}/MatMul{word}",
            op_type="MatMul",
            dtype="float32",
            weight_bytes=1000,
            flops=figure(2000.0 * number + 1),
            read_bytes=figure(500.0),
            written_bytes=figure(100.0),
            intensity=figure(3.0 * number + 1),
            seconds=figure(1e-5 * (number + 1)),
            share=figure(0.1),
            modelled_seconds=missing,
            bound=("compute", "memory", "latency", None)[number % 4],
        )
        for number in range(8)
    ]
    parts = dict.fromkeys(ColdStart.model_fields, some)
    totals = {name: some for name in OperatorTotals.model_fields if name != "uncounted"}
    return ProfileReport(
        subject=f"digits{word}",
        runtime="onnxruntime",
        provider="CPUExecutionProvider",
        batch_size=32,
        machine=MachineProfile(
            cpu=f"a processor{word}",
            cores=2,
            memory_bytes=8_000_000_000,
            device="cpu",
            gpu=None,
            gpu_memory_bytes=missing,
            threads=2,
            copy_bytes_per_second=figure(1e10),
            matrix_rates=[MatrixRate(dtype="float32", flops_per_second=figure(1e11))],
            call_seconds=figure(1e-6),
        ),
        operators=operators,
        totals=OperatorTotals(uncounted=0, **totals),
        memory=MemoryProfile(
            weights_bytes=1000,
            activations_bytes=some,
            peak_resident_bytes=figure(9e7),
            rise_resident_bytes=figure(1e7),
            device_bytes=missing,
            timeline=[
                MemoryPoint(seconds=0.1 * at, resident_bytes=50_000_000 + at * 1000, mark=word if at == 5 else "")
                for at in range(400)
            ],
        ),
        latency=[
            LatencyProfile(
                batch_size=batch,
                calls=100,
                p50_seconds=0.05,
                p99_seconds=0.1,
                throughput_per_second=300.0,
                mean_seconds=0.05,
                percentiles_seconds=percentiles,
            )
            for batch in (1, 32)
        ],
        load=[
            LoadProfile(
                rate_per_second=200.0 * share,
                utilisation=share,
                requests=1000,
                answered_per_second=199.0 * share,
                mean_seconds=0.05,
                p50_seconds=0.05,
                p90_seconds=0.09,
                p99_seconds=0.1,
                max_seconds=0.101,
                service_mean_seconds=0.04,
                longest_queue=3,
                modelled_mean_seconds=missing,
                percentiles_seconds=percentiles,
            )
            for share in (0.5, 0.9)
        ],
        storage=StorageProfile(
            raw_bytes=10, stored_bytes=some, read_seconds=some, decode_seconds=some, decode_bytes_per_second=some
        ),
        cold_start=ColdStart(**parts),
        energy=EnergyProfile(
            cpu_joules_per_request=figure(0.02),
            memory_joules_per_request=missing,
            gpu_joules_per_request=missing,
            idle_watts=figure(30.0),
        ),
        costs=[
            Cost(
                price=f"c7i{word}",
                per_hour=0.2,
                currency="EUR",
                batch_size=32,
                machine_per_million=figure(0.185),
                energy_per_million=missing,
                total_per_million=figure(0.2),
            )
        ],
        verdict=ProfileVerdict(
            binds="memory-bandwidth",
            share=figure(0.7),
            reason=f"most operators wait for memory{word}",
            resources=[
                ResourceShare(resource="latency", seconds_per_request=missing, share=figure(0.3), reason=f"calls{word}")
            ],
        ),
    )


def checks(word: str = "", name: str = "digits") -> tuple[AdviceCheck, ...]:
    """Two checks of an advice: one that came as foretold, and one that did not."""

    def check(ratio: float) -> AdviceCheck:
        near = Predicted(value=100_000.0, low=90_000.0, high=110_000.0)
        rows = [
            CheckRow(metric="published_bytes", predicted=near, measured=1e5 * ratio, ratio=ratio, inside=ratio < 1.1),
            CheckRow(
                metric="quality_drop",
                predicted=NotPredicted(not_predicted="nobody knows"),
                measured=0.01,
                ratio=None,
                inside=None,
            ),
            CheckRow(metric="cold_start_seconds", predicted=near, measured=None, ratio=None, inside=None),
        ]
        return AdviceCheck(
            name=name, machine=f"a processor{word}", technique="static", label=f"int8, static{word}", rows=rows
        )

    return check(1.0), check(1.25)


def training(word: str = "", processes: int = 2) -> TrainReport:
    """A training over processes."""
    losses = [2.0 / epoch for epoch in range(1, 31)]
    spread = ParallelReport(
        processes=processes,
        strategy="ddp",
        backend="gloo",
        gradient_accumulation=1,
        weights_agree=True,
        restarts=1,
        updates=60,
        traffic=TrafficReport(data_bytes=0, parameters_bytes=1_234_567, control_bytes=4_321),
        least_update_bytes=20_000.0,
        needed_update_bytes=20_500.0,
        wire_update_bytes=21_000.0,
    )
    return TrainReport(
        epochs=30,
        updates=60,
        first_loss=losses[0],
        final_loss=losses[-1],
        losses=losses,
        batch_parts=2,
        memory_errors=[f"no memory{word}"],
        parallel=spread,
    )


def outlook(size: float) -> Outlook:
    def near(value: float) -> Predicted:
        return Predicted(value=value, low=value * 0.9, high=value * 1.1)

    given = {name: NotPredicted(not_predicted="another machine") for name in Outlook.model_fields}
    return Outlook.model_validate(given | {"published_bytes": near(size), "latency_seconds": near(0.00025)})


def advice(word: str = "") -> AdviceReport:
    ranked = [
        Advised(
            technique="static",
            label=f"{label}{word}",
            in_recipe=True,
            outlook=outlook(103_000.0 * number) if number < 3 else None,
            gain=Predicted(value=4.0 / number, low=3.0 / number, high=5.0 / number)
            if number < 3
            else NotPredicted(not_predicted="no such kernel"),
            fits=number == 1,
            evidence=[f"measured{word}"],
            counter_evidence=[f"slower on others{word}"],
        )
        for number, label in enumerate(("int8, static", "int4", "fp8"), 1)
    ]
    return AdviceReport(
        name=f"digits{word}",
        machine="here",
        objective="bytes",
        binding=f"asked{word}",
        batch_size=32,
        budget={"max_quality_drop": 0.01, "max_bytes": 0.0},
        hardware={},
        now=outlook(120_000.0),
        ranked=ranked,
        chosen=f"int8, static{word}",
        config=None,
        kernels=[],
        checks=[],
        seconds=3.0,
    )
