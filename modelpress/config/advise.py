"""The config of advice: what is wanted, what it may cost, and on what it will run."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from modelpress.config.base import Config, PackName
from modelpress.config.judge import EvaluateConfig
from modelpress.config.pack import CompressConfig
from modelpress.config.quantize import ExportConfig
from modelpress.config.workload import WorkloadConfig

Objective = Literal["bytes", "latency", "throughput", "cold-start", "cost"]
Technique = Literal[
    "lossless",
    "dynamic",
    "static",
    "weight-only",
    "codebook",
    "plan",
    "structured-pruning",
    "unstructured-pruning",
    "distill",
]
"""What changes the model or its bytes, and is tried in small."""


class HardwareConfig(Config):
    """The machine that will serve."""

    cores: int = Field(default=0, ge=0)
    """Cores of it that one server may use; 0: those that this process may use."""
    memory_bytes: int = Field(default=0, ge=0)
    """Memory of one device, which the tensors and activations must fit; 0 does not ask."""
    devices: int = Field(default=1, ge=1, le=1024)
    """Such machines, or devices, that could share the work."""
    bandwidth_bits_per_second: float = Field(default=1e9, gt=0)
    """Of the way from the store to the server."""
    price_per_hour: float = Field(default=0.0, ge=0)
    """What one of them costs an hour; 0: not known, and no cost is foretold."""


class BudgetConfig(Config):
    """What the advised model may cost at most."""

    max_quality_drop: float = Field(default=0.01, ge=0)
    """In the metric's own units, against the source model."""
    max_bytes: int = Field(default=0, ge=0)
    """Of the published pack; 0 does not ask."""
    max_latency_seconds: float = Field(default=0.0, ge=0)
    """Of a call with one sample; 0 does not ask."""
    min_throughput_per_second: float = Field(default=0.0, ge=0)
    """Samples per second at `advise.batch_size`; 0 does not ask."""


class AdviseConfig(Config):
    """What is asked of an advice."""

    objective: Objective | None = None
    """What is to be least (`throughput`: most); absent: what the profile says binds."""
    batch_size: int = Field(default=32, ge=2)
    """Samples of the larger call, beside calls with one."""
    budget: BudgetConfig = BudgetConfig()
    """What must be kept."""
    hardware: HardwareConfig = HardwareConfig()
    """What it will run on."""
    techniques: list[Technique] = list(get_args(Technique))
    """What may be tried; `lossless` always is."""
    train_epochs: int = Field(default=0, ge=0, le=10_000)
    """Epochs of students and of recovery after pruning, in the trial and in the advised recipe alike; 0: nothing is
    trained, no student is tried, and pruning is repaired alone."""
    students: list[dict[str, int | float | str | bool | list[int]]] = []
    """For `distill`: architectures of students, as in `distill.architecture`."""
    kernel_seconds: float = Field(default=0.5, gt=0, le=60)
    """Time spent on measuring each class of products with each kernel; what was measured is kept for this machine."""
    caution: float = Field(default=0.0, ge=0, le=1)
    """What must keep the budget: 0 takes the foretold value, 1 the worse end of its interval, and a number between
    them a point between."""

    @model_validator(mode="after")
    def _check(self) -> AdviseConfig:
        if len(set(self.techniques)) != len(self.techniques):
            raise ValueError("advise.techniques must not repeat")
        if self.objective == "cost" and not self.hardware.price_per_hour:
            raise ValueError("advise.objective 'cost' needs advise.hardware.price_per_hour")
        if self.students and not ("distill" in self.techniques and self.train_epochs):
            raise ValueError("advise.students needs 'distill' among advise.techniques, and advise.train_epochs")
        return self


class AdviseRecipe(Config):
    """One run of `modelpress advise`: source → profile → techniques in small → ranking and a recipe to run."""

    name: PackName
    """Name of the advised recipe, and of its files."""
    workload: WorkloadConfig
    """The model, the data and the metric."""
    export: ExportConfig = ExportConfig()
    """The ONNX graph that will be served."""
    compress: CompressConfig = CompressConfig()
    """The codecs whose bytes are counted."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How the advised recipe measures; threads and latencies of the advice are its own as well."""
    advise: AdviseConfig = AdviseConfig()
    """What is wanted, and what it may cost."""

    @model_validator(mode="after")
    def _check(self) -> AdviseRecipe:
        if self.compress.base is not None:
            raise ValueError("compress.base must be absent: an advice counts packs that stand alone")
        return self
