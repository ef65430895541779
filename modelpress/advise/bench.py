"""Measured speeds of single products, kept for this machine: nothing is measured twice.

The file holds one entry per machine, runtime, threads, product and kernel. It is written whole or not at all; of two
processes that write at once one may lose what it measured, and measures it again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime

from modelpress import graph
from modelpress.advise import micro
from modelpress.advise.work import KERNELS, Kernel, Work
from modelpress.agreement import Inputs
from modelpress.checkpoint import Checkpoint
from modelpress.cores import usable_cores
from modelpress.errors import ConfigError, ModelpressError
from modelpress.plan.latency import in_turns
from modelpress.reports import KernelSpeed, NotPredicted, Predicted, Prediction
from modelpress.store.local import local_errors

LAYOUT = 2
"""Of the file, and of how a product is measured: another one's entries are not read."""


@functools.cache
def machine() -> str:
    """Processor, cores that this process may use, and the runtime: what a measured speed holds for."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        model = found[1]
    return f"{model}, {usable_cores()} cores, onnxruntime {onnxruntime.__version__}"


@dataclass
class Bench:
    """Measures products, and keeps what it measured.

    Args:
        path: of the file; None keeps nothing beyond this object.
        budget_seconds: spent on each class of products, over all kernels.
        chained: whether static int8 has neighbours in integers, as in networks of convolutions.
    """

    path: Path | None
    budget_seconds: float
    chained: bool
    used: dict[str, KernelSpeed] = field(default_factory=dict)
    """What was asked for, by key."""
    measured: int = 0
    """Classes of products that were measured now, and not found in the file."""
    _known: dict[str, list[float] | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            self._known = _read(self.path)

    def seconds(self, work: Work, kernel: Kernel, alike: int = 1) -> Prediction:
        """Of one product: the faster of two measurements; both are the ends of the interval."""
        if not work.takes(kernel):
            return NotPredicted(not_predicted=f"{work.op_type} has no kernel {kernel}")
        count = micro.copies(work, alike)
        key = self._key(work, kernel, count)
        if key not in self._known:
            self._measure(work, count)
        found = self._known[key]
        said: Prediction
        if isinstance(found, str):
            said = NotPredicted(not_predicted=f"{work} by {kernel}: {found}")
        else:
            said = Predicted(value=min(found), low=min(found), high=max(found), by="measured by itself")
        self.used[key] = KernelSpeed(shape=str(work), kernel=kernel, seconds=said)
        return said

    def _measure(self, work: Work, count: int) -> None:
        """All kernels that a product takes, in turns, twice."""
        self.measured += 1
        checkpoints: dict[Kernel, Checkpoint] = {}
        idle, inputs = micro.empty(work)
        given = dict(inputs)
        for kernel in KERNELS:
            if not work.takes(kernel):
                continue
            try:
                checkpoint, inputs = micro.products(work, kernel, count, chained=self.chained)
                graph.run(graph.session(checkpoint), inputs)
            except ModelpressError as error:
                self._known[self._key(work, kernel, count)] = error.found or error.doing
                continue
            checkpoints[kernel] = checkpoint
            given |= inputs
        rounds = [self._round([idle, *checkpoints.values()], given) for _ in range(2)]
        for place, kernel in enumerate(checkpoints, start=1):
            found = [max(times[place] - times[0], 1e-9) / count for times in rounds]
            self._known[self._key(work, kernel, count)] = found
        if self.path is not None:
            _write(self.path, self._known)

    def _round(self, checkpoints: list[Checkpoint], inputs: Inputs) -> list[float]:
        return in_turns(checkpoints, inputs, self.budget_seconds / 2)

    def _key(self, work: Work, kernel: Kernel, count: int) -> str:
        facts = [LAYOUT, machine(), repr(work), kernel, count, self.chained and kernel == "static"]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _read(path: Path) -> dict[str, list[float] | str]:
    """What the file holds; one that is none of ours is an error, as it stands where ours should.

    Raises:
        ConfigError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(map(_is_entry, found.values())):
            raise ValueError("no mapping of keys to two times or a reason")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"reading measured speeds from {path}", found=str(error), fix="delete it: it is measured anew"
        ) from error
    return found


def _is_entry(value: object) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and len(value) == 2 and all(isinstance(one, float) and one > 0 for one in value)


def _write(path: Path, known: dict[str, list[float] | str]) -> None:
    with local_errors(f"keeping measured speeds in {path}", writing=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".speeds-", delete=False) as partial:
            partial.write(json.dumps(known, sort_keys=True, indent=0))
        os.replace(partial.name, path)
