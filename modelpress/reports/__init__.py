"""What stages measured: frozen pydantic models, `metrics()` gives flat floats for any tracker.

Bytes end in ``_bytes``, times in ``_seconds``. A value that was not measured is ``None``, never 0. This module
imports neither torch nor numpy.
"""

from __future__ import annotations

from modelpress.reports.advice import (
    AdviceCheck,
    AdviceReport,
    Advised,
    CheckRow,
    KernelSpeed,
    NotPredicted,
    Outlook,
    Predicted,
    Prediction,
)
from modelpress.reports.base import ArtifactRef, Report, Stage
from modelpress.reports.folder import FolderReport
from modelpress.reports.gate import Check, Decision, Override, Verdict
from modelpress.reports.graph import (
    CodebookReport,
    ExportReport,
    FrozenReport,
    FrozenWeight,
    LayersReport,
    QuantizeReport,
    RoundedLayer,
    SensitivityRow,
    SharedTensor,
    StableHloReport,
)
from modelpress.reports.housekeeping import (
    CollectReport,
    Counted,
    Garbage,
    GarbageItem,
    RetainedPack,
    RetainReport,
    UsageReport,
    VersionUsage,
)
from modelpress.reports.measured import Figure, Measured, NotMeasured
from modelpress.reports.module import (
    DistillReport,
    PruneReport,
    PruneStep,
    SourceReport,
    TensorChange,
    TrainReport,
    trainings,
)
from modelpress.reports.pack import CodedTensor, CompressReport, DeltaReport, ShardReport, UploadReport, VerifyReport
from modelpress.reports.parallel import ParallelReport, TrafficReport
from modelpress.reports.partition import PartitionReport, PartReport, RankLoadReport
from modelpress.reports.plan import PlannedTensor, PlanOutline, PlanPoint, PlanReport
from modelpress.reports.profile import ProfileReport
from modelpress.reports.quality import (
    AttributionExample,
    AttributionReport,
    EvaluationReport,
    LatencyReport,
    QualityReport,
)
from modelpress.reports.run import RunReport, RunStage
from modelpress.reports.variants import TriedVariant, VariantBudgets, VariantsReport

__all__ = [
    "AdviceCheck",
    "AdviceReport",
    "Advised",
    "ArtifactRef",
    "AttributionExample",
    "AttributionReport",
    "Check",
    "CheckRow",
    "CodebookReport",
    "CodedTensor",
    "CollectReport",
    "CompressReport",
    "Counted",
    "Decision",
    "DeltaReport",
    "DistillReport",
    "EvaluationReport",
    "ExportReport",
    "Figure",
    "FolderReport",
    "FrozenReport",
    "FrozenWeight",
    "Garbage",
    "GarbageItem",
    "KernelSpeed",
    "LatencyReport",
    "LayersReport",
    "Measured",
    "NotMeasured",
    "NotPredicted",
    "Outlook",
    "Override",
    "ParallelReport",
    "PartReport",
    "PartitionReport",
    "PlanOutline",
    "PlanPoint",
    "PlanReport",
    "PlannedTensor",
    "Predicted",
    "Prediction",
    "ProfileReport",
    "PruneReport",
    "PruneStep",
    "QualityReport",
    "QuantizeReport",
    "RankLoadReport",
    "Report",
    "RetainReport",
    "RetainedPack",
    "RoundedLayer",
    "RunReport",
    "RunStage",
    "SensitivityRow",
    "ShardReport",
    "SharedTensor",
    "SourceReport",
    "StableHloReport",
    "Stage",
    "TensorChange",
    "TrafficReport",
    "TrainReport",
    "TriedVariant",
    "UploadReport",
    "UsageReport",
    "VariantBudgets",
    "VariantsReport",
    "Verdict",
    "VerifyReport",
    "VersionUsage",
    "trainings",
]
