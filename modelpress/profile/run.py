"""A whole profile, from a checkpoint to the report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import CompressConfig, ProfileConfig
from modelpress.errors import ConfigError
from modelpress.profile import energy, graphs, loops, machine, modules, packed, roofline, verdict
from modelpress.profile.ran import Ran
from modelpress.progress import Progress, silent
from modelpress.providers import CPU, on_gpu
from modelpress.reports.measured import Figure, Measured, NotMeasured
from modelpress.reports.profile import ColdStart, LoadProfile, MemoryProfile, ProfileReport, StorageProfile

Example = Callable[[int], dict[str, Tensor]]
"""Inputs of so many samples, as `Workload.example` gives them."""


@dataclass(frozen=True)
class Subject:
    """What is profiled."""

    name: str
    """Of the recipe, or of the pack with its digest."""
    checkpoint: Checkpoint
    """Of kind `onnx`; the graph that is, or would be, served. With a `module`, its state dict."""
    example: Example
    """Inputs."""
    module: nn.Module | None = None
    """For runtime `torch`: the module."""
    placed: packed.Placed | None = None
    """The pack, where there is one already."""


def profile(
    subject: Subject,
    config: ProfileConfig,
    compression: CompressConfig | None = None,
    progress: Progress = silent,
) -> ProfileReport:
    """Measure where time, bytes, joules and money of a model go on this machine.

    Args:
        subject: the model and its inputs.
        config: what is measured and how long.
        compression: how the pack would be coded, where there is none yet; None stores tensors raw.
        progress: told of each part.

    Raises:
        ConfigError: the runtime is `torch` and there is no module, or the other way round.
        SetupError: the execution provider is not in use.
        StageError: a new process could not load and run the model.
    """
    if (config.runtime == "torch") != (subject.module is not None):
        raise ConfigError(
            f"profiling {subject.name}",
            found=f"profile.runtime {config.runtime!r} and a {subject.checkpoint.kind} checkpoint",
            expected="'torch' with a torch module, 'onnxruntime' with a graph",
        )
    with machine.torch_threads(config.threads):
        return _profile(subject, config, compression, _Steps(progress))


def _profile(
    subject: Subject, config: ProfileConfig, compression: CompressConfig | None, steps: _Steps
) -> ProfileReport:
    steps("ceilings of the machine")
    ceilings = machine.measure(config.runtime, config.provider, config.threads, config.seconds / 4)
    steps("operators")
    ran, call = _ran(subject, config, ceilings.threads)
    operators = roofline.place_operators(ran, ceilings)
    totals = roofline.total(ran, operators)
    steps("latency")
    latency = [
        loops.closed_loop(_bound(call, subject.example(size)), size, config.seconds)
        for size in sorted(config.batch_sizes)
    ]
    steps("load")
    load = _load(_bound(call, subject.example(1)), config)
    steps("energy")
    largest = max(config.batch_sizes)
    joules = energy.measure(
        _bound(call, subject.example(largest)),
        largest,
        config.seconds,
        uses_gpu=on_gpu(config.provider),
    )
    steps("storage and start")
    storage, start, memory = _around(subject, config, compression, ran)
    prices = verdict.costs(config, latency, joules)
    steps("verdict")
    return ProfileReport(
        subject=subject.name,
        runtime=config.runtime,
        provider=config.provider if config.runtime == "onnxruntime" else None,
        batch_size=config.batch_size,
        machine=ceilings,
        operators=operators,
        totals=totals,
        memory=memory,
        latency=latency,
        load=load,
        storage=storage,
        cold_start=start,
        energy=joules,
        costs=prices,
        verdict=verdict.judge(config, operators, totals, storage, start, joules, prices),
    )


class _Steps:
    """Counts the parts of a profile."""

    TOTAL = 7

    def __init__(self, progress: Progress) -> None:
        self._progress, self._done = progress, 0

    def __call__(self, what: str) -> None:
        self._progress(self._done, self.TOTAL, what)
        self._done += 1


Run = Callable[[Mapping[str, Tensor]], object]


def _ran(subject: Subject, config: ProfileConfig, threads: int) -> tuple[Ran, Run]:
    """The profiled runs, and what runs the model without being watched."""
    inputs = subject.example(config.batch_size)
    if subject.module is not None:
        module = subject.module.eval()
        ran = modules.run_watched(module, inputs, config.seconds)

        def call(batch: Mapping[str, Tensor]) -> object:
            with torch.inference_mode():
                return module(**batch)

        return ran, call
    ran = graphs.run_watched(subject.checkpoint, inputs, config.provider, threads, config.seconds)
    session = graph.session(subject.checkpoint, config.provider, threads)
    return ran, lambda batch: graph.run(session, batch)


def _bound(call: Run, batch: Mapping[str, Tensor]) -> Callable[[], object]:
    return lambda: call(batch)


def _load(call: Callable[[], object], config: ProfileConfig) -> list[LoadProfile]:
    """Open loops at the config's shares of what a closed loop of single requests answers."""
    if not config.loads:
        return []
    service = loops.closed_loop(call, 1, config.seconds / 2).mean_seconds
    found = []
    for number, share in enumerate(sorted(config.loads)):
        rate = share / service
        due = loops.arrivals(rate, config.seconds, config.seed + number)
        found.append(loops.load_profile(loops.open_loop(call, due), rate, service))
    return found


def _around(
    subject: Subject, config: ProfileConfig, compression: CompressConfig | None, ran: Ran
) -> tuple[StorageProfile, ColdStart, MemoryProfile]:
    """Storage, start and memory, each by a new process; of a torch module, what is known of it here."""
    weights = sum(tensor.nbytes for tensor in subject.checkpoint.tensors.values())
    device = _device_memory(config.provider)
    if subject.module is not None:
        none = NotMeasured(not_measured=packed.NO_PACK)
        memory = MemoryProfile(
            weights_bytes=weights,
            activations_bytes=_activations(ran),
            peak_resident_bytes=none,
            rise_resident_bytes=none,
            device_bytes=device,
        )
        return packed.no_storage(subject.checkpoint), packed.no_cold_start(), memory
    with tempfile.TemporaryDirectory(prefix="modelpress-profile-") as name:
        folder = Path(name)
        placed = subject.placed or packed.put_away(subject.checkpoint, "profiled", compression, folder)
        batches = [subject.example(size) for size in (1, *sorted(config.batch_sizes))]
        found = packed.start_anew(placed, config.provider, config.threads, batches[:1], folder, watch=False)
        watched = packed.start_anew(placed, config.provider, config.threads, batches, folder, watch=True)
        start = packed.cold_start(found)
        stored = packed.storage(placed, config.bandwidths, start)
    return stored, start, packed.memory_profile(watched, weights, _activations(ran), device)


def _activations(ran: Ran) -> Figure:
    if ran.activations_bytes is None:
        return NotMeasured(not_measured="the shape of a value is not known")
    return Measured(value=ran.activations_bytes, by="values alive at once, by shapes and order of the operators")


def _device_memory(provider: str) -> Figure:
    """Most memory of the GPU that anybody holds now, which is the model's where nobody else computes there."""
    if not on_gpu(provider):
        where = "on a GPU" if provider == CPU else "on a device that anything here could ask"
        return NotMeasured(not_measured=f"the model does not compute {where}")
    if not torch.cuda.is_available():
        return NotMeasured(not_measured=f"{provider} computes on a device that this build of torch cannot ask")
    free, whole = torch.cuda.mem_get_info()
    return Measured(value=whole - free, by="what is taken of the device while the model's session is open")
