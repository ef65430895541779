"""Report of a profile: where a model's time, bytes, joules and money go on one machine, and which resource binds.

Whatever can fail to be measured is a `Figure`: a number, or the reason why there is none. What is computed on paper
from measured numbers says so in its name (`modelled_...`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from modelpress.reports.measured import Figure, Part
from modelpress.reports.quality import LatencyReport

Bound = Literal["compute", "memory", "latency"]
"""What an operator's time is spent on: arithmetic, moving bytes, or being called at all."""
Resource = Literal["compute", "memory-bandwidth", "storage-transfer", "latency", "energy-cost"]


class OperatorProfile(Part):
    """One operator of the model in one run."""

    name: str
    """Name of the node in the graph, or of the module."""
    op_type: str
    """What it is: an ONNX operator (`MatMul`, `FusedConv`), or a module's class (`Linear`)."""
    dtype: str
    """Type that it computes in, such as `float32` or `int8`."""
    weights: list[str] = Field(default_factory=list)
    """Names of the model's tensors that it reads; the optimiser of a runtime has names of its own for what it folds."""
    weight_bytes: int
    """Bytes of all constant tensors among its inputs, folded ones as well."""
    flops: Figure
    """Floating-point or integer operations; a multiplication and an addition are two."""
    read_bytes: Figure
    """Bytes of all its inputs, weights as well; of a gather, those that it picks."""
    written_bytes: Figure
    """Bytes of its outputs."""
    intensity: Figure
    """flops ÷ (read + written bytes): operations per byte."""
    seconds: Figure
    """Time of it in one run: the mean of the middle half of the runs, without what watching adds."""
    share: Figure
    """Of the time of all operators, 0 to 1."""
    modelled_seconds: Figure
    """The least that the machine's ceilings allow: the larger of flops ÷ matrix rate and bytes ÷ copy bandwidth."""
    bound: Bound | None
    """Its class in the roofline by the measured ceilings: `latency` where both terms of `modelled_seconds` together are
    less than what a call to an operator costs on this machine. None: flops, bytes or a ceiling are not known."""


class OperatorTotals(Part):
    """All operators of one run together."""

    flops: Figure
    """Operations of one run; of the operators that could be counted."""
    moved_bytes: Figure
    """Bytes read and written by all operators."""
    uncounted: int
    """Operators whose operations could not be counted."""
    operator_seconds: Figure
    """Sum of the operators' times."""
    run_seconds: Figure
    """Time of a whole run without any profiling: the mean of the middle half."""
    outside_seconds: Figure
    """`run_seconds` less `operator_seconds`, at least 0: what the runtime itself takes."""
    watched_overhead: Figure
    """Time of a watched run ÷ that of one that is not, less 1."""
    overhead: Figure
    """What watching some of the runs adds to the time of all, as a share of what they take without it."""


class MatrixRate(Part):
    """Measured rate of matrix products."""

    dtype: str
    """Of the factors: `float32`, `bfloat16`, `float16` or `int8`."""
    flops_per_second: Figure
    """Operations per second, multiplications and additions; the best of several runs of a large product."""


class DeviceKind(Part):
    """A kind of processor that a model could run on, and whether it can here."""

    kind: Literal["cpu", "cuda", "rocm", "tpu", "fpga"]
    """The kind."""
    usable: bool
    """Whether this machine and this environment can run a model on it."""
    by: list[str] = Field(default_factory=list)
    """What it would run by: `torch`, or ONNX Runtime execution providers."""
    found: str
    """What the check found: the device's name, or what is missing."""


class MachineProfile(Part):
    """The machine and its ceilings, measured."""

    cpu: str
    """Model of the processor."""
    cores: int
    """Cores that this process may use."""
    memory_bytes: int
    """Main memory that this process may use."""
    device: Literal["cpu", "cuda"]
    """Where the ceilings were measured, which is where the model ran."""
    gpu: str | None
    """Name of the GPU, where there is one."""
    gpu_memory_bytes: Figure
    """Its memory."""
    threads: int
    """Threads that one operator may use."""
    copy_bytes_per_second: Figure
    """Bandwidth of main (or of the device's) memory: bytes read and written per second by a large copy."""
    matrix_rates: list[MatrixRate]
    """One per type."""
    call_seconds: Figure
    """What a call to an operator costs when there is nothing to compute."""
    kinds: list[DeviceKind] = Field(default_factory=list)
    """Kinds of processors, and which of them could run a model here."""


class MemoryPoint(Part):
    """Resident memory at one time."""

    seconds: float
    """Since the first point."""
    resident_bytes: int
    """Resident memory of the process."""
    mark: str = ""
    """What began here, such as `session` or `batch 32`."""


class MemoryProfile(Part):
    """Memory of one run."""

    weights_bytes: int
    """Bytes of the model's tensors as they lie in memory."""
    activations_bytes: Figure
    """Most bytes of values that are alive at once, by the operators' order and shapes; without weights."""
    peak_resident_bytes: Figure
    """Most resident memory of a process that loads and runs the model."""
    rise_resident_bytes: Figure
    """Of that, what came with the model: above the process before it was loaded."""
    device_bytes: Figure
    """Most memory of the GPU."""
    timeline: list[MemoryPoint] = Field(default_factory=list)
    """Resident memory over time, from before the model is loaded on."""


class LatencyProfile(LatencyReport):
    """Time of one batch size in a closed loop: the next call begins when the one before it has ended."""

    mean_seconds: float
    """Mean time of a call."""
    percentiles_seconds: list[float] = Field(min_length=101, max_length=101)
    """Time of a call at the percentiles 0, 1, … 100."""


class LoadProfile(Part):
    """Requests that arrive by a Poisson process, whether or not the one before has been answered.

    Latency counts from the time that a request was meant to arrive, so that waiting in the queue is in it
    (Schroeder, Wierman, Harchol-Balter, "Open Versus Closed", NSDI 2006; no coordinated omission).
    """

    rate_per_second: float
    """Requests that were meant to arrive per second."""
    utilisation: float
    """`rate_per_second` × the mean service time: 1 and above cannot be kept up with."""
    requests: int
    """Requests sent."""
    answered_per_second: float
    """Requests answered per second, to the last answer."""
    mean_seconds: float
    """Mean latency."""
    p50_seconds: float
    """Median latency."""
    p90_seconds: float
    """90th percentile of it."""
    p99_seconds: float
    """99th percentile of it."""
    max_seconds: float
    """Longest latency."""
    service_mean_seconds: float
    """Mean time of a call itself, without waiting."""
    longest_queue: int
    """Most requests that had arrived and waited."""
    modelled_mean_seconds: Figure
    """Mean latency of an M/G/1 queue with these service times (Pollaczek–Khinchine); there is none at a utilisation
    of 1 and above."""
    percentiles_seconds: list[float] = Field(min_length=101, max_length=101)
    """Latency at the percentiles 0, 1, … 100."""


class TransferTime(Part):
    """A pack's way over one network."""

    network: str
    """Its name in the config."""
    bytes_per_second: float
    """Its bandwidth, as the config states it."""
    modelled_seconds: Figure
    """Stored bytes ÷ bandwidth; latency and protocol come on top."""


class StorageProfile(Part):
    """Bytes at rest, and what it takes to have them in memory."""

    raw_bytes: int
    """Bytes of the tensors and files before coding."""
    stored_bytes: Figure
    """Bytes of the pack's shards and manifest on disk."""
    read_seconds: Figure
    """Time to read the stored bytes from disk, with the page cache dropped for them where the kernel allows it."""
    decode_seconds: Figure
    """Time to decode and verify them."""
    decode_bytes_per_second: Figure
    """`raw_bytes` ÷ `decode_seconds`."""
    transfers: list[TransferTime] = Field(default_factory=list)
    """The stored bytes over the networks of the config."""


class ColdStart(Part):
    """From the start of a new process to its first answer, split in its parts; the parts follow one another."""

    interpreter_seconds: Figure
    """From the fork to the first line of Python."""
    import_seconds: Figure
    """Imports of the library and of the runtime."""
    fetch_seconds: Figure
    """Reading the manifest and the shards: of a recipe from a folder on this machine, of a pack from its store."""
    verify_seconds: Figure
    """Digests of the shards and of the manifest."""
    decode_seconds: Figure
    """From coded streams to tensors, each with its own digest checked; loads the decoder's compiled loops as well."""
    session_seconds: Figure
    """Making the runtime's session."""
    first_answer_seconds: Figure
    """The first call."""
    total_seconds: Figure
    """All parts together."""


class EnergyProfile(Part):
    """Energy of one request, measured while the model runs at the largest batch size."""

    cpu_joules_per_request: Figure
    """Processor packages, by RAPL."""
    memory_joules_per_request: Figure
    """Memory, by RAPL."""
    gpu_joules_per_request: Figure
    """GPU, by NVML."""
    idle_watts: Figure
    """What the same counters say while nothing runs; it is part of the joules above."""


class Cost(Part):
    """What a million requests cost on a machine of the price table, at the measured throughput."""

    price: str
    """Its name in the config."""
    per_hour: float
    """Price of an hour of the machine."""
    currency: str
    """Of both."""
    batch_size: int
    """Batch size of the throughput; a request is one sample."""
    machine_per_million: Figure
    """Hours of the machine for a million requests."""
    energy_per_million: Figure
    """Joules of a million requests, at the config's price of a kilowatt-hour."""
    total_per_million: Figure
    """Both."""


class ResourceShare(Part):
    """What one resource takes of a request."""

    resource: Resource
    """The resource."""
    seconds_per_request: Figure
    """Time of a request that it takes; of what happens once per start, the share of one request."""
    share: Figure
    """Of the time of all resources, 0 to 1."""
    reason: str
    """The numbers behind it, in words."""


class ProfileVerdict(Part):
    """Which resource binds: what has to give before the model can be cheaper or faster here."""

    binds: Resource
    """The resource."""
    share: Figure
    """Its share of a request's time; for `energy-cost`, how many times over its budget it is."""
    reason: str
    """Why, in one sentence with its numbers."""
    resources: list[ResourceShare]
    """All of them, the largest first."""


class ProfileReport(Part):
    """Where a model's time, bytes, joules and money go on one machine."""

    subject: str
    """What was profiled: the name of a recipe, or of a pack with its digest."""
    runtime: Literal["torch", "onnxruntime"]
    """What ran it."""
    provider: str | None
    """ONNX Runtime execution provider in use."""
    hardware: str | None = None
    """Class of the machine, as MODELPRESS_HARDWARE there has it; None where it has none."""
    batch_size: int
    """Samples of a run whose operators were profiled."""
    machine: MachineProfile
    """The machine and its ceilings."""
    operators: list[OperatorProfile]
    """Each operator, in the order in which they run."""
    totals: OperatorTotals
    """All operators together."""
    memory: MemoryProfile
    """Memory."""
    latency: list[LatencyProfile]
    """One per batch size, in a closed loop."""
    load: list[LoadProfile]
    """One per rate, in an open loop with batches of one; the lowest rate first."""
    storage: StorageProfile
    """Bytes at rest."""
    cold_start: ColdStart
    """From nothing to the first answer."""
    energy: EnergyProfile
    """Joules."""
    costs: list[Cost]
    """One per machine of the price table; empty where the config has none."""
    verdict: ProfileVerdict
    """Which resource binds."""

    def metrics(self) -> dict[str, float]:
        """Adds ``latency.b<batch>.*``, ``load.<utilisation>_percent.*``, ``cost.<price>.*`` and
        ``matrix.<dtype>_flops_per_second`` to the base's."""
        flat = super().metrics()
        for row in self.latency:
            flat |= {f"latency.b{row.batch_size}.{key}": value for key, value in row.metrics().items()}
        for load in self.load:
            flat |= {f"load.{load.utilisation * 100:.0f}_percent.{key}": value for key, value in load.metrics().items()}
        for cost in self.costs:
            flat |= {f"cost.{cost.price}.{key}": value for key, value in cost.metrics().items()}
        for rate in self.machine.matrix_rates:
            flat |= {f"matrix.{rate.dtype}_{key}": value for key, value in rate.metrics().items()}
        return flat
