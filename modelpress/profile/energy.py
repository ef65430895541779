"""Joules: counters of the processor (RAPL, through Linux' powercap) and of the GPU (NVML), read before and after.

A counter that is not there, or that this user may not read, is a reason and no number.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelpress.reports.measured import Figure, Measured, NotMeasured
from modelpress.reports.profile import EnergyProfile

POWERCAP = Path("/sys/class/powercap")
_IDLE_SECONDS = 1.0


@dataclass(frozen=True)
class Zone:
    """A RAPL counter: microjoules that wrap around."""

    name: str
    """`package-0`, `dram`, ..."""
    path: Path
    wraps_at: int

    def read(self) -> int:
        """Microjoules."""
        return int((self.path / "energy_uj").read_text(encoding="ascii"))

    def joules(self, before: int, after: int) -> float:
        """Between two readings; between them the counter wraps at most once."""
        return ((after - before) % (self.wraps_at + 1)) / 1e6


def find_zones(folder: Path = POWERCAP) -> list[Zone] | str:
    """The readable counters, or why there are none."""
    found, refused = [], ""
    for path in sorted(folder.glob("*-rapl:*")):
        try:
            zone = Zone(
                name=(path / "name").read_text(encoding="ascii").strip(),
                path=path,
                wraps_at=int((path / "max_energy_range_uj").read_text(encoding="ascii")),
            )
            zone.read()
        except (OSError, ValueError) as error:
            refused = f"{path / 'energy_uj'} cannot be read: {error}; the kernel lets root alone read it"
            continue
        found.append(zone)
    if found:
        return found
    return refused or f"no RAPL counters under {folder}: a virtual machine hides them, or the kernel lacks powercap"


def gpu_counter() -> Callable[[], float] | str:
    """What reads the joules that the first GPU has used since its driver started, or why there is nothing."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return "NVML is not here: the package nvidia-ml-py is not installed (pip install 'modelpress[gpu]')"
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError as error:
        return f"NVML finds no GPU that counts its energy: {error}"
    return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3


@dataclass(frozen=True)
class _Readings:
    zones: dict[str, int]
    gpu: float | None
    at: float


def measure(
    call: Callable[[], object], requests: int, seconds: float, *, uses_gpu: bool, folder: Path = POWERCAP
) -> EnergyProfile:
    """Joules of one request while the model runs for about `seconds`, each call answering `requests`.

    Args:
        call: one run.
        requests: samples of it.
        seconds: time spent running.
        uses_gpu: whether the model computes on a GPU.
        folder: where the kernel has its powercap zones.
    """
    zones = find_zones(folder)
    counters = {zone.path.name: zone for zone in zones} if isinstance(zones, list) else {}
    gpu = gpu_counter() if uses_gpu else "the model does not compute on a GPU"

    def read() -> _Readings:
        values = {key: zone.read() for key, zone in counters.items()}
        return _Readings(values, None if isinstance(gpu, str) else gpu(), time.perf_counter())

    nothing_counts = isinstance(zones, str) and isinstance(gpu, str)
    idle_from = read()
    if not nothing_counts:
        time.sleep(min(_IDLE_SECONDS, seconds))
    before = read()
    answered = 0
    while not nothing_counts and (answered == 0 or time.perf_counter() - before.at < seconds):
        call()
        answered += requests
    after = read()

    def used(kind: str, first: _Readings, last: _Readings) -> float | None:
        chosen = [key for key, zone in counters.items() if zone.name.startswith(kind)]
        if not chosen:
            return None
        return sum(counters[key].joules(first.zones[key], last.zones[key]) for key in chosen)

    def of_zones(kind: str, what: str) -> Figure:
        if isinstance(zones, str):
            return NotMeasured(not_measured=zones)
        total = used(kind, before, after)
        if total is None:
            return NotMeasured(not_measured=f"RAPL counts no {what} here")
        return Measured(value=total / answered, by="RAPL")

    def of_gpu() -> Figure:
        if isinstance(gpu, str):
            return NotMeasured(not_measured=gpu)
        assert before.gpu is not None
        assert after.gpu is not None
        return Measured(value=(after.gpu - before.gpu) / answered, by="NVML")

    idle = [used(kind, idle_from, before) for kind in ("package", "dram")]
    if before.gpu is not None and idle_from.gpu is not None:
        idle.append(before.gpu - idle_from.gpu)
    counted = [joules for joules in idle if joules is not None]
    return EnergyProfile(
        cpu_joules_per_request=of_zones("package", "processor packages"),
        memory_joules_per_request=of_zones("dram", "memory"),
        gpu_joules_per_request=of_gpu(),
        idle_watts=Measured(value=sum(counted) / (before.at - idle_from.at), by="the same counters")
        if counted
        else NotMeasured(not_measured="nothing counts energy here"),
    )


def joules_per_request(energy: EnergyProfile) -> Figure:
    """What all counters that are there say together."""
    parts = (energy.cpu_joules_per_request, energy.memory_joules_per_request, energy.gpu_joules_per_request)
    known = [part for part in parts if isinstance(part, Measured)]
    if not known:
        return NotMeasured(not_measured="nothing counts energy here")
    return Measured(value=sum(part.value for part in known), by=", ".join(dict.fromkeys(part.by for part in known)))
