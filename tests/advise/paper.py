"""A transformer and a machine on paper: what the ranking makes of it is arithmetic, and hangs on no real machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from modelpress.advise import others, rank
from modelpress.advise.outlook import Errors, Found, Known, outlook
from modelpress.advise.work import Kernel, Roofline, Work, activations, total
from modelpress.config import AdviseConfig
from modelpress.reports import Advised, Outlook, Predicted

ERRORS = Errors(latency_seconds=0.2, batch_seconds=0.2, cold_start_seconds=0.2)
MACHINE = Roofline(
    copy_bytes_per_second=10e9, float_flops_per_second=100e9, int8_flops_per_second=400e9, call_seconds=1e-7
)


@dataclass(frozen=True)
class Paper:
    """A stack of feed-forward layers."""

    width: int = 512
    layers: int = 6
    length: int = 32
    batch: int = 64

    def plan(self, batch: int, kernel: Kernel, inner: float = 1.0) -> list[tuple[Work, Kernel]]:
        width, hidden = self.width, round(4 * self.width * inner)
        shape = (batch, self.length)
        up = Work("MatMul", (width, hidden), (*shape, width))
        down = Work("MatMul", (hidden, width), (*shape, hidden))
        return [(up, kernel), (down, kernel)] * self.layers

    def plans(self, kernel: Kernel, inner: float = 1.0) -> dict[int, list[tuple[Work, Kernel]]]:
        return {batch: self.plan(batch, kernel, inner) for batch in (1, self.batch)}

    @property
    def parameters(self) -> int:
        return sum(work.elements for work, _ in self.plan(1, "float"))

    def known(self) -> Known:
        seconds = {}
        for batch in (1, self.batch):
            found = total(self.plan(batch, "float"), MACHINE)
            assert isinstance(found, Predicted)
            seconds[batch] = 1.1 * found.value  # a tenth of what is no product
        plans = self.plans("float")
        return Known(seconds, seconds, plans, session_seconds=1e-4, activations_bytes=None, cores=2)

    def found(self, kernel: Kernel, bits: float, drop: float, inner: float = 1.0) -> Found:
        """A form of the model: its kernel, and the bits that a weight takes in a pack."""
        plans = self.plans(kernel, inner)
        weights = sum(work.elements for work, _ in plans[1])
        in_memory = {"float": 4.0, "nbits-4": 0.5}.get(kernel, 1.0) * weights
        return Found(
            plans=plans,
            published_bytes=near(weights * bits / 8),
            weights_bytes=in_memory,
            decode_seconds=weights * bits / 8 / 1e10,
            quality_drop=Predicted(value=drop, low=drop - 0.01, high=drop + 0.01),
        )


def near(value: float) -> Predicted:
    return Predicted(value=value, low=0.95 * value, high=1.05 * value)


FORMS: dict[str, tuple[Kernel, float, float]] = {
    "lossless": ("float", 27.0, 1.0),
    "weight-only": ("nbits-4", 4.5, 1.0),
    "dynamic": ("dynamic", 7.5, 1.0),
    "static": ("static", 7.5, 1.0),
    "codebook": ("float", 4.8, 1.0),
    "unstructured-pruning": ("float", 16.0, 1.0),
    "structured-pruning": ("float", 27.0, 0.5),
}
"""By technique: kernel, bits of a weight in a pack, share of the inner width that is left."""


def ranking(
    paper: Paper, config: AdviseConfig, drops: Sequence[float] = (0.0,) * len(FORMS), machine: Roofline = MACHINE
) -> tuple[Outlook, list[Advised]]:
    """What the library's own arithmetic makes of the forms."""
    assert config.objective is not None
    known = paper.known()
    now = outlook(paper.found("float", 32.0, 0.0), known, config.hardware, machine, ERRORS)
    every = []
    for (technique, (kernel, bits, inner)), drop in zip(FORMS.items(), drops, strict=True):
        then = outlook(paper.found(kernel, bits, drop, inner), known, config.hardware, machine, ERRORS)
        broken = rank.obstacles(then, config.budget, config.hardware, config.caution)
        every.append(
            Advised(
                technique=technique,
                label=technique,
                in_recipe=True,
                outlook=then,
                gain=rank.gain(now, then, config.objective),
                fits=not broken,
                obstacles=broken,
            )
        )
    every += others.others(now, known, config, config.objective)
    return now, rank.ranked(every, config.objective)


def compute_binds(paper: Paper) -> bool:
    """Whether arithmetic takes longer than moving bytes, in float and in int8, at the larger batch."""
    return all(
        work.flops / 400e9 > work.moved_bytes("float") / 10e9 and math.prod(work.output) for work, _ in plan_of(paper)
    )


def plan_of(paper: Paper) -> list[tuple[Work, Kernel]]:
    found = paper.plan(paper.batch, "float")
    assert activations(found)
    return found
