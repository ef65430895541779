"""The configuration of a run: one set of models for the function, the flow, the form, the command line and the YAML.

Every field's docstring is its help text everywhere. Validators check and never rewrite. This module imports neither
torch nor numpy, so that a deployment's form can be built where neither is installed.
"""

from __future__ import annotations

from modelpress.config.advise import AdviseConfig, AdviseRecipe, BudgetConfig, HardwareConfig
from modelpress.config.base import Alias, Bytes, Config, PackName
from modelpress.config.canary import CanaryConfig, CanaryStep
from modelpress.config.distill import DistillConfig
from modelpress.config.gpu import GpuConfig
from modelpress.config.housekeeping import RetentionConfig
from modelpress.config.judge import EvaluateConfig, GateConfig
from modelpress.config.pack import CompressConfig, ShardConfig, UploadConfig
from modelpress.config.parallel import ParallelConfig
from modelpress.config.plan import PlanConfig, Scale
from modelpress.config.profile import ProfileConfig
from modelpress.config.prune import PruneConfig
from modelpress.config.quantize import ExportConfig, QuantizeConfig
from modelpress.config.recipes import (
    BlockwiseRecipe,
    ExportRecipe,
    OptimizeConfig,
    Part,
    PlanRecipe,
    QuantizeRecipe,
    load_advise_recipe,
    load_blockwise_recipe,
    load_canary,
    load_config,
    load_export_recipe,
    load_gate,
    load_plan_recipe,
    load_quantize_recipe,
    load_variants,
    parse_config,
    parse_variants,
)
from modelpress.config.train import TrainConfig
from modelpress.config.variants import VariantsConfig
from modelpress.config.workers import WorkersConfig
from modelpress.config.workload import WorkloadConfig

__all__ = [
    "AdviseConfig",
    "AdviseRecipe",
    "Alias",
    "BlockwiseRecipe",
    "BudgetConfig",
    "Bytes",
    "CanaryConfig",
    "CanaryStep",
    "CompressConfig",
    "Config",
    "DistillConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ExportRecipe",
    "GateConfig",
    "GpuConfig",
    "HardwareConfig",
    "OptimizeConfig",
    "PackName",
    "ParallelConfig",
    "Part",
    "PlanConfig",
    "PlanRecipe",
    "ProfileConfig",
    "PruneConfig",
    "QuantizeConfig",
    "QuantizeRecipe",
    "RetentionConfig",
    "Scale",
    "ShardConfig",
    "TrainConfig",
    "UploadConfig",
    "VariantsConfig",
    "WorkersConfig",
    "WorkloadConfig",
    "load_advise_recipe",
    "load_blockwise_recipe",
    "load_canary",
    "load_config",
    "load_export_recipe",
    "load_gate",
    "load_plan_recipe",
    "load_quantize_recipe",
    "load_variants",
    "parse_config",
    "parse_variants",
]
