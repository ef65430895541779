"""Reports of variants of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from modelpress.reports.base import ArtifactRef, Report
from modelpress.reports.quality import LatencyReport, QualityReport


class TriedVariant(Report):
    """What a variant came to; nothing of it was published."""

    number: int
    """In the order of the grid, from 0 on."""
    label: str
    """What it sets, in words."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What it sets, by dotted name."""
    stopped: str | None = None
    """Why it came to no end: a budget, or a stage that refuses it. None: it did."""
    quality: QualityReport | None = None
    """Of the graph that would be served, paired with the source model's; None where it came to no end."""
    size_bytes: int | None = None
    """Graph and coded tensors; a pack adds its manifest and scores, and files of the workload."""
    artifact: ArtifactRef | None = None
    """These bytes, in the work store."""
    graph: ArtifactRef | None = None
    """The graph before coding."""
    source_graph: ArtifactRef | None = None
    """The source model's graph, which speed is compared with."""
    latency: list[LatencyReport] = Field(default_factory=list)
    """One per batch size, measured alone on the machine when all variants had ended; empty: not measured."""
    seconds: float | None = None
    """Time that its run took, without what it shares with others."""
    mlflow_run: str | None = None
    """Id of its run in MLflow."""
    flow_run: str | None = None
    """Id of its flow run in Prefect."""


class VariantBudgets(Report):
    """What is asked of the best variant."""

    objective: Literal["bytes", "quality", "latency"]
    """What it has the best of."""
    max_quality_drop: float
    """What it may lose against the source model, by the whole interval."""
    max_bytes: int | None
    """Most bytes; None: not asked."""
    max_latency_seconds: float | None
    """Longest median of a call at the smallest measured batch; None: not asked."""


class VariantsReport(Report):
    """All variants of a recipe, each once."""

    name: str
    """Name of the recipe."""
    asked: VariantBudgets
    """Of the best."""
    variants: list[TriedVariant]
    """By number."""
    lost: dict[int, str] = Field(default_factory=dict)
    """By number, why nothing is known of it: its workers died. Started again, the run takes the others' stages."""
    source_bytes: int | None = None
    """The source model's graph; None where no variant came so far."""
    source_latency: list[LatencyReport] = Field(default_factory=list)
    """Of the source model's graph, measured as the variants were."""
    by_bytes: list[int] = Field(default_factory=list)
    """Numbers of those that no other beats in bytes and quality, the smallest first."""
    by_latency: list[int] = Field(default_factory=list)
    """Numbers of those that no other beats in latency and quality, the fastest first; latencies vary a little."""
    best: int | None = None
    """Number of the best within the budgets; None: none is."""
    pack: str | None = None
    """Digest of the pack that the best was published as; None: nothing was published."""
    mlflow_url: str = ""
    """Page of the run in MLflow, which the variants' runs are below."""

    def variant(self, number: int) -> TriedVariant:
        """The one of this number.

        Raises:
            KeyError: nothing is known of it.
        """
        return {one.number: one for one in self.variants}[number]
