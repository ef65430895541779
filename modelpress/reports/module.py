"""Reports of the stages that change the torch module."""

from __future__ import annotations

from pydantic import Field

from modelpress.reports.base import Report
from modelpress.reports.parallel import ParallelReport


class TensorChange(Report):
    """What happened to one tensor or module."""

    name: str
    """Its name in the model."""
    before: list[int]
    """Shape before."""
    after: list[int]
    """Shape after; [0] where it is gone as a whole."""
    zeros: int = 0
    """Zero elements after."""
    kept: list[int] | None = None
    """Indices of the structures that were kept, for structured pruning."""
    calibration_rows: int | None = None
    """Inputs (tokens, positions) of calibration data by which it was judged, where it was."""
    output_error: float | None = None
    """Squared change of the layer's outputs on them, as a share of the outputs' squares; before any recovery."""


class TrainReport(Report):
    """How a training went."""

    epochs: int
    """Epochs run."""
    updates: int
    """Optimizer steps."""
    first_loss: float
    """Mean loss of the first epoch."""
    final_loss: float
    """Mean loss of the last epoch."""
    best_validation_loss: float | None = None
    """Least calibration loss, when early stop watches it."""
    stopped_early: bool = False
    """Whether early stop ended it."""
    losses: list[float] = Field(default_factory=list)
    """Mean loss per epoch."""
    batch_parts: int | None = None
    """Into how many parts batches were cut in the end, where memory had run out; None: into none."""
    memory_errors: list[str] = Field(default_factory=list)
    """Where memory ran out, what was asked and what was there; after each, parts were half as large."""
    parallel: ParallelReport | None = None
    """How it was spread over processes; None: it was one."""

    def series(self) -> dict[str, list[float]]:
        """The loss of each epoch."""
        return {"loss": self.losses}


def trainings(report: Report) -> list[TrainReport]:
    """The trainings that a stage's report tells of, at any depth; each once."""
    if isinstance(report, TrainReport):
        return [report]
    values = [getattr(report, name) for name in type(report).model_fields]
    inside = [one for value in values for one in (value if isinstance(value, list) else [value])]
    found: list[TrainReport] = []
    for one in inside:
        if isinstance(one, Report):
            found += [training for training in trainings(one) if training not in found]
    return found


class SourceReport(Report):
    """The model as the user gave it."""

    parameters: int
    """Number of parameters."""
    size_bytes: int
    """Bytes of its checkpoint."""
    trained: bool
    """Whether it was trained in the run."""
    origin: str | None = None
    """The version or the run that MLflow keeps it in, where it does: `models:/NAME/VERSION`, `runs:/ID/PATH`."""
    origin_sha256: str | None = None
    """Digest of its files there."""


class DistillReport(Report):
    """What distillation did."""

    teacher_parameters: int
    """Parameters of the teacher."""
    student_parameters: int
    """Parameters of the student."""
    architecture: dict[str, int | float | str | bool | list[int]] = Field(default_factory=dict)
    """What the student was built from."""
    keep_layers: list[int] = Field(default_factory=list)
    """Teacher layers kept."""
    cache_bytes: int | None = None
    """Bytes of the teacher's cached answers; None: it ran in each epoch."""
    train: TrainReport
    """Its training."""


class PruneStep(Report):
    """One step of gradual pruning."""

    sparsity: float
    """Fraction of zeros that it went to."""
    zeros: int
    """Zero weights after it, in the touched tensors."""
    recovery: TrainReport | None = None
    """The fine-tune that followed."""


class PruneReport(Report):
    """What pruning removed."""

    method: str
    """The method."""
    eligible_parameters: int
    """Parameters that the method could touch."""
    touched_parameters: int
    """Parameters in the tensors that it did touch."""
    parameters_before: int
    """All parameters before."""
    parameters_after: int
    """All parameters after."""
    zeros_after: int
    """Zero weights after, in the touched tensors."""
    tensors: list[TensorChange]
    """Each tensor that changed."""
    coverage: float | None = None
    """touched ÷ eligible; None in the records of earlier versions."""
    recovery: TrainReport | None = None
    """The fine-tune that followed; of gradual pruning, the last step's."""
    matched_states: int = 0
    """Hidden states that the fine-tune matched with the unpruned model's, beside the outputs."""
    steps: list[PruneStep] = Field(default_factory=list)
    """Of gradual pruning, each step."""
    kept_layers: list[int] = Field(default_factory=list)
    """Of depth pruning, the blocks that stayed, by their numbers before; the tensors' names are those from before."""
    influences: list[float] = Field(default_factory=list)
    """Of depth pruning, what each block was worth by `prune.importance`."""
    refitted_layers: list[int] = Field(default_factory=list)
    """Of depth pruning, the kept blocks whose last linear layer was re-fitted to fill the gap behind them."""

    def series(self) -> dict[str, list[float]]:
        """The loss of each epoch of the recovery; of gradual pruning, of all steps one after the other."""
        losses = [loss for step in self.steps if step.recovery for loss in step.recovery.losses]
        return super().series() | ({"recovery.loss": losses} if losses else {})
