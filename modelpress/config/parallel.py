"""How a training is spread over processes."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from modelpress.config.base import Config, refuse_unread


class ParallelConfig(Config):
    """How a training is spread over processes: what it makes is the same but for rounding, and for dropout's noise.

    So none of this is part of a stage's cache key: a training that was cut off goes on with another number of
    processes, and one that is finished is not repeated for it.
    """

    decides: ClassVar[bool] = False

    processes: int = Field(default=1, ge=1, le=4096)
    """Processes that share the samples of each update; 1: this one alone."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """With several processes. `ddp`: each holds the whole model. `fsdp`: each holds a part of the weights, gradients
    and optimizer state, and sends half as much again."""
    gradient_accumulation: int = Field(default=1, ge=1, le=4096)
    """Parts in which each process takes its samples of an update, one after another: less memory, the same update."""
    data: Literal["slice", "stream"] = "slice"
    """With several processes. `slice`: each reads all data and takes its part. `stream`: the first reads, and sends
    each its part."""
    backend: Literal["gloo", "nccl", "xla"] = "gloo"
    """With several processes: `gloo` on CPUs, `nccl` on CUDA and ROCm devices, one each, `xla` on TPUs (never run)."""
    where: Literal["here", "elsewhere"] = "here"
    """With several processes: started on this machine by the stage, or by somebody else (a Kubernetes job on several
    machines), for whom the stage waits."""
    restarts: int = Field(default=3, ge=0, le=1000)
    """With several processes: how often all are started again, from the state that is kept, when one dies."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """With several processes: how long one waits for the others before the training fails, and ranks elsewhere for a
    word of the stage that waits for them."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.processes == 1:
            names = ("strategy", "data", "backend", "where", "restarts", "timeout_seconds")
            refuse_unread(self, "parallel", dict.fromkeys(names, "parallel.processes above 1"))
        return self
