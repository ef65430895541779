"""Whole runs, and how they are read from YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from modelpress.config.advise import AdviseRecipe
from modelpress.config.base import Bytes, Config, PackName
from modelpress.config.canary import CanaryConfig
from modelpress.config.distill import DistillConfig
from modelpress.config.gpu import GpuConfig
from modelpress.config.judge import EvaluateConfig, GateConfig
from modelpress.config.pack import CompressConfig, ShardConfig, UploadConfig
from modelpress.config.plan import PlanConfig
from modelpress.config.profile import ProfileConfig
from modelpress.config.prune import PruneConfig
from modelpress.config.quantize import ExportConfig, QuantizeConfig
from modelpress.config.variants import VariantsConfig
from modelpress.config.workers import WorkersConfig
from modelpress.config.workload import WorkloadConfig
from modelpress.errors import ConfigError
from modelpress.providers import CPU

Checked = TypeVar("Checked", bound=Config)
Part = Literal["source", "distill", "prune", "export", "quantize", "plan"]
"""A stage that makes or changes the model."""


class OptimizeConfig(Config):
    """One run of the line: source → profile → distill → prune → export → quantize or plan → compress → shard → upload →
    register."""

    name: PackName
    """Name of the published pack and of the registered model."""
    workload: WorkloadConfig
    """The model, the data and the metric."""
    profile: ProfileConfig | None = None
    """Absent: nobody measures which resource the source model is bound by."""
    distill: DistillConfig | None = None
    """Absent: no distillation."""
    prune: PruneConfig | None = None
    """Absent: no pruning."""
    export: ExportConfig = ExportConfig()
    """The ONNX graph that is served."""
    quantize: QuantizeConfig | None = None
    """Absent: the graph stays in float."""
    plan: PlanConfig | None = None
    """Absent: no weight has a form of its own. Not beside `quantize`: a plan takes a float graph."""
    compress: CompressConfig | None = CompressConfig()
    """Null: every tensor is stored raw, and the pack is a plain safetensors checkpoint."""
    shard: ShardConfig = ShardConfig()
    """How the coded tensors are cut into objects."""
    upload: UploadConfig = UploadConfig()
    """How shards travel."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured after each stage."""
    gate: GateConfig = GateConfig()
    """Who may become champion."""
    promote: bool = True
    """Judge the new version at the end, and move the alias if it passes."""
    gpu: GpuConfig | None = None
    """Absent: everything is computed on the CPU, but graphs whose `evaluate.provider` is a GPU's: those take a whole
    device."""
    workers: WorkersConfig | None = None
    """Absent: evaluations and plans run in one process."""

    @property
    def parts(self) -> list[Part]:
        """The stages of this recipe that make and change the model, in order."""
        switched: dict[Part, object] = {
            "source": True,
            "distill": self.distill,
            "prune": self.prune,
            "export": True,
            "quantize": self.quantize,
            "plan": self.plan,
        }
        return [part for part, present in switched.items() if present]

    @model_validator(mode="after")
    def _check(self) -> OptimizeConfig:
        if self.plan and self.quantize:
            raise ValueError("plan and quantize exclude each other: a plan takes the float graph; leave one out")
        if self.gate.min_attribution_agreement and not self.evaluate.attribution_samples:
            raise ValueError("gate.min_attribution_agreement needs evaluate.attribution_samples")
        sliced = self.workload.kind == "custom" or self.workload.slice_by_class
        if (self.gate.slice_margin or self.gate.slice_floors) and not sliced:
            raise ValueError(
                "gate.slice_margin and gate.slice_floors need workload.slice_by_class, or a workload of yours"
            )
        self._check_spread()
        if self.shard.by == "rank":
            raise ValueError("shard.by 'rank' is for checkpoints that were cut for ranks; a recipe publishes a graph")
        if self.gate.provider not in (None, self.evaluate.provider):
            raise ValueError(f"gate.provider needs evaluate.provider {self.gate.provider}: it is what is measured on")
        if self.workers and self.evaluate.provider != CPU:
            raise ValueError("workers share cores, not a device: leave them out, or set evaluate.provider to the CPU's")
        return self

    def _check_spread(self) -> None:
        spread = {
            "distill.train": self.distill.train if self.distill else None,
            "prune.recovery": self.prune.recovery if self.prune else None,
        }
        alone = {
            "quantize.recovery": self.quantize.recovery if self.quantize else None,
            "plan.recovery": self.plan.recovery if self.plan else None,
        }
        for name, training in alone.items():
            if training is not None and training.parallel.processes > 1:
                raise ValueError(f"{name}.parallel.processes must be 1: only {' and '.join(spread)} are spread")
        for name, training in spread.items():
            if training is not None and training.parallel.processes > 1 and self.gpu is not None:
                raise ValueError(
                    f"{name}.parallel with several processes excludes gpu, which holds one device: with "
                    "parallel.backend 'nccl' each process takes one of those that the worker shows it"
                )


class PlanRecipe(Config):
    """One run of `modelpress plan`: source → export → plan."""

    name: PackName
    """Name of the plan's files."""
    workload: WorkloadConfig
    """The model, the data and the metric."""
    export: ExportConfig = ExportConfig()
    """The ONNX graph that is planned."""
    plan: PlanConfig = PlanConfig()
    """The budget, and what a weight may become."""
    compress: CompressConfig = CompressConfig()
    """The codecs whose bytes are counted."""


class ExportRecipe(Config):
    """One run of `modelpress export`: source → StableHLO."""

    workload: WorkloadConfig
    """The model, and the data whose shapes it is traced with."""
    export: ExportConfig = ExportConfig()
    """Its `tolerance`; `opset` is of ONNX graphs."""


class QuantizeRecipe(Config):
    """One run of `modelpress quantize`: source → quantize → a Hugging Face folder."""

    workload: WorkloadConfig
    """The model, the data and the metric."""
    quantize: QuantizeConfig
    """Of method `weight-only`. `targets` and `ignore` are names or globs of the model's linear layers."""
    max_shard_size: Bytes = 5_000_000_000
    """Bytes of one safetensors file; a tensor that is larger has a file of its own."""


class BlockwiseRecipe(Config):
    """One run of `modelpress blockwise`: a Hugging Face folder, pruned or quantized one block at a time."""

    workload: WorkloadConfig
    """The model, a folder, and the calibration data."""
    prune: PruneConfig | None = None
    """Weights to zeros: `magnitude`, `wanda` or `sparsegpt`, without `recovery`."""
    quantize: QuantizeConfig | None = None
    """`weight-only` by `rtn`, `gptq` or `fp8`; `targets` and `ignore` are names or globs of the Hugging Face model's
    linear layers."""
    scratch_on_disk: bool = False
    """Keep what the calibration data give, activations between two blocks and second moments, in files beside the new
    folder and not in memory."""

    @model_validator(mode="after")
    def _check(self) -> BlockwiseRecipe:
        if (self.prune is None) == (self.quantize is None):
            raise ValueError("give one of prune and quantize; for both, quantize the folder that pruning made")
        return self


def load_config(path: str | Path) -> OptimizeConfig:
    """Read an `OptimizeConfig` from a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds an unknown or illegal value; every offending field is
            named with what it may hold.
    """
    return parse_config(_read_yaml(path), origin=str(path))


def load_advise_recipe(path: str | Path) -> AdviseRecipe:
    """Read an `AdviseRecipe` from a YAML file.

    Raises:
        ConfigError: see `load_config`.
    """
    return _checked(AdviseRecipe, _read_yaml(path), str(path))


def load_plan_recipe(path: str | Path) -> PlanRecipe:
    """Read a `PlanRecipe` from a YAML file.

    Raises:
        ConfigError: see `load_config`.
    """
    return _checked(PlanRecipe, _read_yaml(path), str(path))


def load_export_recipe(path: str | Path) -> ExportRecipe:
    """Read an `ExportRecipe` from a YAML file.

    Raises:
        ConfigError: see `load_config`.
    """
    return _checked(ExportRecipe, _read_yaml(path), str(path))


def load_quantize_recipe(path: str | Path) -> QuantizeRecipe:
    """Read a `QuantizeRecipe` from a YAML file.

    Raises:
        ConfigError: see `load_config`.
    """
    return _checked(QuantizeRecipe, _read_yaml(path), str(path))


def load_blockwise_recipe(path: str | Path) -> BlockwiseRecipe:
    """Read a `BlockwiseRecipe` from a YAML file.

    Raises:
        ConfigError: see `load_config`.
    """
    return _checked(BlockwiseRecipe, _read_yaml(path), str(path))


def load_gate(path: str | Path) -> GateConfig:
    """Read a `GateConfig` from a YAML file.

    Raises:
        ConfigError: see `load_config`.
    """
    return _checked(GateConfig, _read_yaml(path), str(path))


def load_canary(path: str | Path) -> CanaryConfig:
    """Read a `CanaryConfig` from a YAML file.

    Raises:
        ConfigError: see `load_config`.
    """
    return _checked(CanaryConfig, _read_yaml(path), str(path))


def load_variants(path: str | Path) -> VariantsConfig:
    """Read a `VariantsConfig` from a YAML file.

    Raises:
        ConfigError: see `load_config`.
    """
    return parse_variants(_read_yaml(path), origin=str(path))


def _read_yaml(path: str | Path) -> Any:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"reading config {path}", found=str(error), fix="give the path of a YAML recipe") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"parsing config {path}", found=str(error), expected="a YAML mapping") from error


def parse_config(document: Any, *, origin: str = "config") -> OptimizeConfig:
    """Validate a plain mapping, naming each wrong field.

    Raises:
        ConfigError: see `load_config`.
    """
    return _checked(OptimizeConfig, document, origin)


def parse_variants(document: Any, *, origin: str = "variants") -> VariantsConfig:
    """Validate a plain mapping, naming each wrong field.

    Raises:
        ConfigError: see `load_config`.
    """
    return _checked(VariantsConfig, document, origin)


def _checked(kind: type[Checked], document: Any, origin: str) -> Checked:
    if not isinstance(document, dict):
        raise ConfigError(f"parsing {origin}", found=type(document).__name__, expected="a mapping")
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        problems = [_describe(problem, kind) for problem in error.errors(include_url=False)]
        raise ConfigError(f"checking {origin}", found="\n    ".join(["", *problems]).strip("\n")) from error


def _describe(problem: Any, kind: type[Config]) -> str:
    """One line for one pydantic error: the field, what is wrong, and the legal keys for an unknown one."""
    location = [part for part in problem["loc"] if isinstance(part, str)]
    where = ".".join(str(part) for part in problem["loc"]) or "config"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown field; legal here: {', '.join(_legal_keys(kind, location[:-1]))}"
    if problem["type"] == "missing":
        return f"{where}: missing"
    return f"{where}: {problem['msg']} (found {problem['input']!r})"


def _legal_keys(kind: type[Config], path: list[str]) -> list[str]:
    model: type[BaseModel] = kind
    for name in path:
        annotation = model.model_fields[name].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(model.model_fields)
