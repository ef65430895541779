"""Techniques that change no model: what whoever serves it can do, and how packs are stored."""

from __future__ import annotations

from collections.abc import Sequence

from modelpress.advise import rank
from modelpress.advise.outlook import Known
from modelpress.config import AdviseConfig
from modelpress.config.advise import Objective
from modelpress.reports import Advised, NotPredicted, Outlook, Predicted, Prediction


def others(now: Outlook, known: Known, config: AdviseConfig, objective: Objective) -> list[Advised]:
    """All of them, for the model as it is; each can be had beside a technique that changes it."""
    return [
        _batching(now, known, config, objective),
        _data_parallel(now, config, objective),
        _model_parallel(now, config, objective),
        _sharding(now, config),
        _delta(),
    ]


def _advised(
    technique: str,
    label: str,
    found: Outlook,
    gain: Prediction,
    config: AdviseConfig,
    said: Sequence[str],
    but: list[str],
) -> Advised:
    broken = rank.obstacles(found, config.budget, config.hardware, config.caution)
    return Advised(
        technique=technique,
        label=label,
        in_recipe=False,
        outlook=found,
        gain=gain,
        fits=not broken,
        obstacles=broken,
        evidence=list(said),
        counter_evidence=but,
    )


def _batching(now: Outlook, known: Known, config: AdviseConfig, objective: Objective) -> Advised:
    one, many, size = known.seconds[1], known.seconds[known.batch_size], known.batch_size
    ratio = size * one / many
    value: Prediction = Predicted(value=ratio, low=ratio, high=ratio, by="measured in float, at both batch sizes")
    if objective not in ("throughput", "cost"):
        value = NotPredicted(not_predicted=f"batches are for throughput and cost, and {objective} is asked for")
    # A request that waits for others to join it is answered when all of them are.
    found = now.model_copy(update={"latency_seconds": now.batch_seconds})
    said = [f"{1 / one:,.0f}/s in calls of 1, {size / many:,.0f}/s in calls of {size}: {ratio:.2f}×"]
    but = [f"a call takes {1000 * many:.3f} ms in place of {1000 * one:.3f} ms, and waits for its batch to fill"]
    return _advised("batching", f"requests joined to batches of {size}", found, value, config, said, but)


def _data_parallel(now: Outlook, config: AdviseConfig, objective: Objective) -> Advised:
    devices = config.hardware.devices
    label = f"{devices} replicas" if devices > 1 else "replicas"
    if devices == 1:
        return _cannot("data-parallel", label, "advise.hardware.devices is 1: there is nothing to put a replica on")
    throughput = now.throughput_per_second
    if isinstance(throughput, Predicted):
        # Replicas share nothing; whoever divides the requests may, and keeps the interval's lower end from growing.
        throughput = Predicted(
            value=throughput.value * devices,
            low=throughput.low,
            high=throughput.high * devices,
            by=f"{devices} × that of one, if requests are divided evenly; not measured here",
        )
    found = now.model_copy(update={"throughput_per_second": throughput})
    but = ["a single request is answered no sooner, and a million requests cost the same"]
    said = [f"{devices} devices with a whole model each"]
    return _advised("data-parallel", label, found, rank.gain(now, found, objective), config, said, but)


def _model_parallel(now: Outlook, config: AdviseConfig, objective: Objective) -> Advised:
    hardware = config.hardware
    label = f"model split over {hardware.devices} devices" if hardware.devices > 1 else "model split over devices"
    if hardware.devices == 1:
        return _cannot("model-parallel", label, "advise.hardware.devices is 1: there is nothing to split it over")
    unknown = NotPredicted(
        not_predicted="the link between the devices is not measured, and every call crosses it: see docs/operations.md"
    )
    memory = now.memory_bytes
    if isinstance(memory, Predicted):
        memory = memory.scaled(1 / hardware.devices, by=f"{memory.by}, divided by {hardware.devices} devices")
    found = now.model_copy(
        update={
            "memory_bytes": memory,
            "latency_seconds": unknown,
            "batch_seconds": unknown,
            "throughput_per_second": unknown,
            "cold_start_seconds": unknown,
            "cost_per_million": unknown,
        }
    )
    said, but = [], ["a call takes no less than on one device that holds the model, and the link's time on top"]
    whole = now.value("memory_bytes")
    if whole is not None and hardware.memory_bytes:
        fits = "fits" if whole <= hardware.memory_bytes else "does not fit"
        said.append(f"{whole:,.0f} bytes {fits} one device of {hardware.memory_bytes:,}")
        if whole <= hardware.memory_bytes:
            but.append("it fits one device: replicas bring more")
    return _advised("model-parallel", label, found, rank.gain(now, found, objective), config, said, but)


def _sharding(now: Outlook, config: AdviseConfig) -> Advised:
    return _advised(
        "sharding",
        "smaller shards (shard.max_shard_size)",
        now,
        NotPredicted(not_predicted="how fast one connection is on that network is not measured; several may be faster"),
        config,
        ["a load needs at most one shard and one tensor beyond the model; a transfer that was cut goes on from there"],
        ["never fewer bytes: each shard adds a header, and the same codes are in it"],
    )


def _delta() -> Advised:
    why = "no earlier pack was named: what a difference takes hangs on how far the weights have moved"
    return _cannot("delta", "difference to a published version (compress.base)", why)


def _cannot(technique: str, label: str, why: str) -> Advised:
    return Advised(
        technique=technique,
        label=label,
        in_recipe=False,
        outlook=None,
        gain=NotPredicted(not_predicted=why),
        fits=False,
        obstacles=[why],
    )
