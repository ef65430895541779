"""The device that a thread computes on: one GPU of several, and how much of it.

`CUDA_VISIBLE_DEVICES` would be the plain way to pin a process to a device, and comes too late: CUDA reads it once, when
it starts in the process, and the stages of one run may hold one device after another. So a place is a block of code. In
it, torch's current device is the place's, what says "cuda" means it, ONNX Runtime is told its number, and both
allocators stop at the memory that was asked for. The memory is given back at the end; the driver's context, some
hundred MiB, stays until the process ends. What opens CUDA on its own and names a number is not held by this.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn

from modelpress.providers import CPU, PROVIDERS, check_options, on_gpu
from modelpress.settings import read_settings


@dataclass(frozen=True)
class Place:
    """A device, and what may be taken of it."""

    device: torch.device
    memory_bytes: int | None = None
    """None: all of it."""


_current: ContextVar[Place | None] = ContextVar("modelpress_place", default=None)


def current() -> Place | None:
    """Where this thread computes; None is the CPU, or wherever a module already is."""
    return _current.get()


@contextmanager
def pinned(place: Place) -> Iterator[None]:
    """Compute there, and nowhere else, while this is open."""
    token = _current.set(place)
    try:
        with _cuda(place) if place.device.type == "cuda" else ExitStack():
            yield
    finally:
        _current.reset(token)


@contextmanager
def _cuda(place: Place) -> Iterator[None]:
    total = torch.cuda.get_device_properties(place.device).total_memory
    share = min(1.0, (place.memory_bytes or total) / total)
    torch.cuda.set_per_process_memory_fraction(share, place.device)
    try:
        with torch.cuda.device(place.device):
            yield
    finally:
        gc.collect()  # a module in a cycle would keep its memory, which the next holder counts on
        with torch.cuda.device(place.device):
            torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, place.device)


@contextmanager
def resident(*modules: nn.Module) -> Iterator[None]:
    """The modules are on the current place's device while this is open, and then where they were; without a place,
    they stay."""
    place = current()
    if place is None:
        yield
        return
    homes = [next((tensor.device for tensor in module.parameters()), None) for module in modules]
    try:
        for module in modules:
            module.to(place.device)
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            if home is not None:
                module.to(home)


def provider_options(provider: str) -> dict[str, str]:
    """What an execution provider of ONNX Runtime is told: what the machine's setting has for it, and what keeps it on
    the current place; nothing for the CPU's.

    Raises:
        ConfigError: MODELPRESS_PROVIDER_OPTIONS is not legal.
        SetupError: see `check_options`.
    """
    if provider == CPU or provider not in PROVIDERS:
        return {}
    options = read_settings().options_of(provider)
    check_options(provider, options)
    place = current()
    if place is None or place.device.type != "cuda" or not on_gpu(provider):  # torch's ROCm build says "cuda" as well
        return options
    options["device_id"] = str(place.device.index or 0)
    limit = PROVIDERS[provider].memory_option  # TensorRT has none: its engine takes what it takes
    if limit and place.memory_bytes is not None:
        options[limit] = str(place.memory_bytes)
    return options
