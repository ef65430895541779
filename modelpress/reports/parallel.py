"""What a training over several processes sent."""

from __future__ import annotations

from typing import Literal

from modelpress.reports.base import Report


class TrafficReport(Report):
    """Bytes that the first rank had to send, as a ring needs them, since the training's last start."""

    data_bytes: int
    """Samples, to ranks that read none."""
    parameters_bytes: int
    """Weights at the start, gradients, and with `fsdp` the weights of each pass."""
    control_bytes: int
    """Losses, checks that the ranks have the same data, means of batch normalisation, states to go on from."""


class ParallelReport(Report):
    """How a training was spread over processes."""

    processes: int
    """That trained together, in the end."""
    strategy: Literal["ddp", "fsdp"]
    """What each held."""
    backend: Literal["gloo", "nccl", "xla"]
    """What carried the bytes."""
    gradient_accumulation: int
    """Parts in which each took its samples of an update."""
    weights_agree: bool
    """Whether all ended with the same bits; unlike machines may round differently, and drift apart."""
    restarts: int
    """How often all of them were started again."""
    updates: int
    """Since the last start: those that are measured here."""
    traffic: TrafficReport
    """By what it was."""
    least_update_bytes: float
    """That each rank has to send for an update by the least that a sum of the gradients takes: 2(N-1)/N of theirs."""
    needed_update_bytes: float | None = None
    """For weights and gradients, as a ring needs them, per update; None without an update."""
    wire_update_bytes: float | None = None
    """For the same, what the first rank's sockets sent per update; None where the backend does not say."""

    def metrics(self) -> dict[str, float]:
        """With `traffic_ratio`: what the wire carried (or else what a ring needs) over the least."""
        ratio = self.traffic_ratio
        return super().metrics() | ({"traffic_ratio": ratio} if ratio is not None else {})

    @property
    def traffic_ratio(self) -> float | None:
        """Of an update, what the wire carried (where it is not known, what a ring needs) over the least."""
        sent = self.wire_update_bytes if self.wire_update_bytes is not None else self.needed_update_bytes
        return sent / self.least_update_bytes if sent is not None and self.least_update_bytes else None
