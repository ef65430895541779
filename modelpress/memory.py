"""Memory that ran out: how it is known, what was asked, and what was there.

Each library says it in its own way: torch by an exception of its own on a GPU and a bare `RuntimeError` on the CPU,
numpy by a `MemoryError`, ONNX Runtime by its arena's message. A process that the kernel kills for memory says nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from modelpress.errors import OutOfMemoryError

_SIGNS = re.compile(
    r"out of memory|can't allocate memory|Cannot allocate memory|Failed to allocate memory|bad_alloc", re.IGNORECASE
)
_ASKED = re.compile(r"(?:allocate|buffer of size) ([\d.]+) ?(bytes|[KMGT]iB)?", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_CGROUP = Path("/sys/fs/cgroup")


def ran_out(error: BaseException) -> bool:
    """Whether an error of torch, numpy, ONNX Runtime or Python says that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    theirs = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
    return theirs and _SIGNS.search(str(error)) is not None


def asked_bytes(error: BaseException) -> int | None:
    """What the error says was asked for; None where it does not."""
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[(found[2] or "bytes").lower()]) if found else None


def described(error: BaseException) -> str:
    """What was asked and what was there, of the device that it was asked of."""
    asked = asked_bytes(error)
    what = f"{show(asked)} asked for" if asked is not None else f"no memory ({str(error)[:200] or 'no size said'})"
    return f"{what}; {_on_gpu() if 'cuda' in str(error).lower() else _on_host()}"


def show(size: int) -> str:
    """Bytes in the largest binary unit that leaves a whole part."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


@contextmanager
def named(doing: str, fix: str) -> Iterator[None]:
    """Memory that runs out in this block becomes an `OutOfMemoryError` that says what was being done.

    One that says so already comes out with `doing` before its own words.
    """
    try:
        yield
    except OutOfMemoryError as error:
        whole = OutOfMemoryError(f"{doing}: {error.doing}", found=error.found, expected=error.expected, fix=error.fix)
        raise whole from error
    except BaseException as error:  # ONNX Runtime's have no base of their own; all but memory's go on
        if not ran_out(error):
            raise
        raise OutOfMemoryError(doing, found=described(error), fix=fix) from error


def _on_gpu() -> str:
    import torch

    free, total = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved()
    return f"{show(free)} of {show(total)} free on {torch.cuda.get_device_name()}, {show(held)} held by this process"


def _on_host() -> str:
    """Free memory, and every limit on this process that is nearer."""
    parts = [f"{show(psutil.virtual_memory().available)} of {show(psutil.virtual_memory().total)} free here"]
    if sys.platform != "win32":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            left = max(0, limit - psutil.Process().memory_info().vms)
            parts.append(f"{show(left)} left of this process's limit of {show(limit)} (RLIMIT_AS)")
    if (group := _cgroup()) is not None:
        parts.append(f"{show(group[0])} left of the container's {show(group[1])}")
    return ", ".join(parts)


def _cgroup() -> tuple[int, int] | None:
    """What is left of the control group's memory, and its limit; None where there is none."""
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no group, or "max"
        return None
    return max(0, limit - used), limit
