"""What a run of the line did, stage by stage: what its page is drawn from, kept beside the pack that it made."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from modelpress.reports.base import Report
from modelpress.reports.quality import EvaluationReport


class RunStage(Report):
    """One stage of a run."""

    stage: str
    """The stage; `source (onnx)` is the source model as ONNX Runtime runs it, what speed is compared with."""
    seconds: float | None = None
    """Time that it took when it ran, its evaluation included."""
    reused: bool = False
    """Whether finished outputs were taken instead of running."""
    size_bytes: int | None = None
    """Bytes of its output."""
    evaluation: EvaluationReport | None = None
    """What its output is worth; None where the stage is lossless."""
    report: dict[str, Any] = Field(default_factory=dict)
    """The stage's own report, as JSON: pages of later releases may show more of it."""


class RunReport(Report):
    """One run of the line, whether it published or was stopped."""

    name: str
    """Name of the pack."""
    pack: str | None = None
    """Digest of the pack that it published; None where it did not come so far."""
    source_bytes: int | None = None
    """The source model's checkpoint."""
    stages: list[RunStage]
    """In the order of the line."""
    served: str | None = None
    """The stage whose output is served."""
    compared: str | None = None
    """The stage that speed is compared with."""
    stopped: str | None = None
    """Why it went no further; None where it published."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The recipe."""
    links: dict[str, str] = Field(default_factory=dict)
    """Addresses by name: the run in MLflow, the flow run."""

    def stage(self, name: str | None) -> RunStage | None:
        """The stage of this name; None where there is none."""
        return next((stage for stage in self.stages if stage.stage == name), None)
