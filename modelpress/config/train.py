"""How weights are updated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from modelpress.config.base import Config
from modelpress.config.parallel import ParallelConfig


class TrainConfig(Config):
    """How weights are updated: used by distillation and by recovery after pruning."""

    epochs: int = Field(default=10, ge=1, le=10_000)
    """Passes over the training data."""
    batch_size: int = Field(default=64, ge=1)
    """Samples per update."""
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    """Update rule."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of `sgd`; β₁ of `adam` and `adamw`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay: L2 for `sgd` and `adam`, decoupled for `adamw`."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Learning rate over the updates, after the warm-up."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the updates with a linear warm-up."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this global norm; 0 switches clipping off."""
    early_stop_epochs: int = Field(default=0, ge=0)
    """Stop after this many epochs without a better calibration loss, and keep the best weights; 0 never stops."""
    out_of_memory: Literal["fail", "halve"] = "fail"
    """When an update finds too little memory: stop, or cut each batch into twice as many parts from there on. Their
    gradients are added, so that an update still takes `batch_size` samples; the report says so."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of the data and of dropout."""
    parallel: ParallelConfig = ParallelConfig()
    """How it is spread over processes; the default is this one alone."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.parallel.processes > 1 and self.out_of_memory == "halve":
            raise ValueError(
                "out_of_memory 'halve' is for one process, which alone knows its memory: with parallel.processes above "
                "1 set parallel.gradient_accumulation"
            )
        return self
