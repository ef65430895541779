"""The config of distillation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from modelpress.config.base import Config
from modelpress.config.train import TrainConfig


class DistillConfig(Config):
    """Train a smaller student on the teacher's answers (Hinton et al. 2015, arXiv:1503.02531)."""

    student: Literal["layer-drop", "width-slice", "architecture"] = "architecture"
    """`layer-drop` copies chosen layers of the teacher, `width-slice` the most important neurons, heads and channels of
    all of them; `architecture` starts from the workload's own smaller model."""
    keep_layers: list[Annotated[int, Field(ge=0)]] = []
    """For `layer-drop`: teacher layers that the student keeps, in order, counted from 0."""
    keep_width: float = Field(default=0.0, ge=0, lt=1)
    """For `width-slice`: share of each layer's neurons, heads and channels that the student keeps."""
    architecture: dict[str, int | float | str | bool | list[int]] = {}
    """For `architecture`: what the workload's `skeleton` takes (for `digits-cnn`: channels, hidden; for decoders,
    keys of their config.json)."""
    temperature: float = Field(default=2.0, gt=0)
    """T: teacher and student logits are divided by it; the loss carries T²."""
    alpha: float = Field(default=0.7, ge=0, le=1)
    """Weight of the teacher's soft labels; the rest is the workload's own loss (cross-entropy)."""
    divergence: Literal["forward-kl", "reverse-kl"] = "forward-kl"
    """Between soft labels: `forward-kl` spreads the student over all that the teacher finds likely, `reverse-kl` keeps
    it to the likeliest."""
    cache_top_k: int = Field(default=0, ge=0)
    """Run the teacher once and keep its k likeliest classes of each sample or token for all epochs; 0 runs it in each.
    Needs training inputs that are the same in each epoch."""
    hidden_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean squared error between matched hidden states (of CNNs: between where they look)."""
    attention_weight: float = Field(default=0.0, ge=0)
    """Weight of the divergence between the last layers' attention, for transformers with as many heads."""
    train: TrainConfig = TrainConfig()
    """The student's training."""

    @model_validator(mode="after")
    def _check(self) -> DistillConfig:
        if self.student == "layer-drop" and not self.keep_layers:
            raise ValueError("distill.keep_layers is needed when distill.student is 'layer-drop'")
        if self.student != "architecture" and self.architecture:
            raise ValueError("distill.architecture needs distill.student 'architecture'")
        if self.student != "layer-drop" and self.keep_layers:
            raise ValueError("distill.keep_layers needs distill.student 'layer-drop'")
        if (self.student == "width-slice") != (self.keep_width > 0):
            raise ValueError("distill.keep_width is needed when distill.student is 'width-slice', and only then")
        if self.cache_top_k and not self.alpha:
            raise ValueError("distill.cache_top_k caches what distill.alpha weighs: it needs an alpha above 0")
        if self.cache_top_k and (self.hidden_weight or self.attention_weight):
            raise ValueError("distill.cache_top_k keeps outputs alone: hidden_weight and attention_weight must be 0")
        if len(set(self.keep_layers)) != len(self.keep_layers) or sorted(self.keep_layers) != list(self.keep_layers):
            raise ValueError("distill.keep_layers must rise and not repeat")
        return self
