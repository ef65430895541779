"""What stages measured: frozen pydantic models, `metrics()` gives flat floats for any tracker.

Bytes end in ``_bytes``, times in ``_seconds``. A value that was not measured is ``None``, never 0. This module
imports neither torch nor numpy.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Stage = Literal["source", "distill", "prune", "export", "quantize", "compress", "shard", "upload", "register", "gate"]


class Report(BaseModel):
    """Base of all reports."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def metrics(self) -> dict[str, float]:
        """Every number of this report, nested reports flattened to ``path.to.field``; lists are left out."""
        flat: dict[str, float] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, bool) or value is None:
                continue
            if isinstance(value, int | float):
                flat[name] = float(value)
            elif isinstance(value, Report):
                flat |= {f"{name}.{key}": number for key, number in value.metrics().items()}
        return flat


class ArtifactRef(Report):
    """A finished output: what crosses the boundary between tasks."""

    uri: str
    """Where it lies: the store's URI, a slash, the key."""
    sha256: str
    """Digest of its bytes, hex."""
    size_bytes: int
    """Its length."""


class QualityReport(Report):
    """A metric on held-out data, paired with the source model's on the same samples."""

    metric: str
    """Name, such as `accuracy` or `mrr`; higher is better."""
    samples: int
    """Number of evaluation samples."""
    value: float
    """Mean over the samples."""
    low: float
    """Lower end of its confidence interval."""
    high: float
    """Upper end of its confidence interval."""
    baseline: float | None = None
    """The source model's value."""
    difference: float | None = None
    """value − baseline; negative is a loss."""
    difference_low: float | None = None
    """Lower end of the paired difference's interval."""
    difference_high: float | None = None
    """Upper end of the paired difference's interval."""
    confidence: float = 0.95
    """Two-sided confidence of both intervals."""
    shown: dict[str, float] = Field(default_factory=dict)
    """The value in units that people know, such as `perplexity`."""

    def metrics(self) -> dict[str, float]:
        """Adds what is shown to the base's."""
        return {**super().metrics(), **self.shown}


class LatencyReport(Report):
    """Measured time of one batch size."""

    batch_size: int
    """Samples per call."""
    calls: int
    """Calls measured, after the warm-up."""
    p50_seconds: float
    """Median time of a call."""
    p99_seconds: float
    """99th percentile of the time of a call."""
    throughput_per_second: float
    """Samples per second."""


class AttributionReport(Report):
    """How alike the reasons for a model's answers are to the original's."""

    method: Literal["integrated-gradients", "occlusion"]
    """How attributions were found: torch modules have gradients, graphs have not."""
    samples: int
    """Samples compared."""
    agreement: float
    """Mean rank correlation, −1 to 1."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end of its interval."""
    confidence: float = 0.95
    """Two-sided confidence of the interval."""


class EvaluationReport(Report):
    """What a model is worth after a stage."""

    stage: Stage
    """The stage whose output was measured."""
    runtime: str
    """`torch` or `onnxruntime`."""
    provider: str | None = None
    """ONNX Runtime execution provider in use."""
    quality: QualityReport
    """On the evaluation split."""
    further: list[QualityReport] = Field(default_factory=list)
    """Further metrics of the same samples, judged by nobody."""
    size_bytes: int
    """Bytes of the artifact on disk."""
    latency: list[LatencyReport]
    """One per batch size."""
    peak_memory_bytes: int | None = None
    """Peak resident memory of the evaluation above what stood before it."""
    attribution: AttributionReport | None = None
    """Against the source model; absent where none was asked for."""

    def metrics(self) -> dict[str, float]:
        """Adds ``further.<metric>.*`` and ``latency.b<batch>.*`` to the base's."""
        flat = super().metrics()
        for one in self.further:
            flat |= {f"further.{one.metric}.{key}": value for key, value in one.metrics().items()}
        for row in self.latency:
            flat |= {f"latency.b{row.batch_size}.{key}": value for key, value in row.metrics().items()}
        return flat


class TensorChange(Report):
    """What happened to one tensor or module."""

    name: str
    """Its name in the model."""
    before: list[int]
    """Shape before."""
    after: list[int]
    """Shape after."""
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


class SourceReport(Report):
    """The model as the user gave it."""

    parameters: int
    """Number of parameters."""
    size_bytes: int
    """Bytes of its checkpoint."""
    trained: bool
    """Whether it was trained in the run."""


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


class ExportReport(Report):
    """The ONNX graph."""

    opset: int
    """Operator set."""
    nodes: int
    """Nodes in the graph."""
    max_difference: float
    """Largest absolute difference to the torch module on the example inputs."""


class SensitivityRow(Report):
    """How much one layer suffers from quantization."""

    node: str
    """ONNX node name."""
    disagreement: float
    """1 − agreement with the float graph, with this node alone quantized (or alone left in float)."""
    kept_float: bool
    """Whether the method left it out to keep the budget: it computes in float (its weight may be stored as integers
    all the same), or beside 4-bit weights has one of 8 bits."""


class SharedTensor(Report):
    """One weight tensor with few values."""

    name: str
    """Its name in the model."""
    shape: list[int]
    """Shape."""
    values: int
    """Distinct values, 0 among them where it occurs."""
    zeros: int
    """Zero elements."""
    relative_error: float
    """Root-mean-square of the change by clustering ÷ that of the weights, before values were trained."""


class CodebookReport(Report):
    """What weight sharing did to a module."""

    num_bits: int
    """Bits of an index."""
    eligible_weights: int
    """Weights in the layers that can be shared."""
    shared_weights: int
    """Weights in the layers that are."""
    tensors: list[SharedTensor]
    """Each of them."""
    recovery: TrainReport | None = None
    """The training of the values."""


class QuantizeReport(Report):
    """What quantization did."""

    method: str
    """The method."""
    eligible_weights: int
    """Weights in the operators that the method can quantize."""
    quantized_weights: int
    """Weights that are integers now."""
    coverage: float
    """quantized ÷ eligible."""
    agreement: float
    """Agreement with the float graph on calibration data (mean cosine of the outputs)."""
    sensitivity: list[SensitivityRow] = Field(default_factory=list)
    """Layers by falling sensitivity."""
    codebook: CodebookReport | None = None
    """For `codebook`: the values that the weights share."""
    recovery: TrainReport | None = None
    """For int8: the training with rounded weights and activations that came before."""


class PlanOutline(Report):
    """A weight that a plan would look at."""

    name: str
    """Of the weight."""
    nodes: list[str]
    """Nodes that read it."""
    shape: list[int]
    """Its shape."""
    candidates: list[str]
    """What it may become beside staying in float."""
    least_measurements: int
    """Measurements that it takes, where disagreement grows with the square of the rounding error; else there are more,
    at most one for each candidate."""


class PlannedTensor(Report):
    """What a plan chose for one weight."""

    name: str
    """Of the weight in the float graph."""
    nodes: list[str]
    """Nodes that read it."""
    shape: list[int]
    """Its shape."""
    num_bits: int | None
    """Bits of its codes; None: it stays in float."""
    scale: Literal["tensor", "channel"] | int | None
    """What shares a scale; None: it stays in float."""
    coded_bytes: int
    """Its codes and scales, losslessly coded."""
    inline_bytes: int
    """Those of them that are so small that they stay in the graph's file."""
    disagreement: float
    """Of the graph with this weight alone changed."""
    is_measured: bool
    """Or foretold from a coarser candidate's."""
    measurements: int
    """How many of its candidates were measured."""
    law_holds: bool
    """Whether disagreement was found to grow with the square of the rounding error, for one sharing of scales at
    least; where it was not, every candidate was measured."""


class PlanPoint(Report):
    """Bytes against disagreement of one choice for all weights."""

    label: str
    """What was chosen."""
    coded_bytes: int
    """All tensors, losslessly coded."""
    disagreement: float
    """On calibration data, measured."""
    predicted_disagreement: float | None
    """What the single weights' add up to; None: not asked."""


class PlanReport(Report):
    """A plan: what was chosen, what was foretold of it and what was measured."""

    divergence: Literal["kl", "cosine"]
    """What disagreement means: mean Kullback-Leibler divergence in nats, or 1 − mean cosine."""
    max_disagreement: float
    """The budget."""
    calibration_samples: int
    """Samples that it was measured on."""
    predicted_disagreement: float
    """What the single weights' disagreements add up to."""
    disagreement: float
    """Of the planned graph, on calibration data."""
    predicted_bytes: int
    """What the single weights' coded bytes, and those of all other tensors, add up to."""
    coded_bytes: int
    """All tensors of the planned checkpoint, losslessly coded."""
    file_bytes: int
    """The planned graph's file, as a pack stores it."""
    float_bytes: int
    """All tensors of the float checkpoint, losslessly coded."""
    measurements: int
    """Single weights measured."""
    tensors: list[PlannedTensor]
    """Each weight."""
    front: list[PlanPoint]
    """Other plans, each built, measured and coded."""
    uniform: list[PlanPoint]
    """The same bits and scales for all weights."""
    held_out_disagreement: float
    """Of the planned graph, on evaluation data."""
    quality: QualityReport
    """The workload's metric on evaluation data, paired with the float graph's."""


class CodedTensor(Report):
    """How one tensor is stored."""

    name: str
    """Tensor name."""
    dtype: str
    """safetensors dtype name."""
    shape: list[int]
    """Shape."""
    codec: str
    """Codec that won."""
    raw_bytes: int
    """Bytes before."""
    stored_bytes: int
    """Bytes after."""
    entropy_bound_bytes: float
    """Order-0 entropy bound of the planes, in bytes."""
    decode_seconds: float | None = None
    """CPU time of decoding, measured when the result was proved; None: stored raw. It stays out of the manifest."""
    candidates: dict[str, int] = Field(default_factory=dict)
    """Bytes in a shard, the description's among them, by codec that was tried, and of `raw`."""
    too_slow: list[str] = Field(default_factory=list)
    """Codecs left out because they decode more slowly than `min_decode_bytes_per_second`."""
    not_tried: list[str] = Field(default_factory=list)
    """Codecs left out at a look: too few zeros, nothing that repeats."""


class CompressReport(Report):
    """What lossless coding reached."""

    raw_bytes: int
    """All tensors before."""
    stored_bytes: int
    """All tensors after."""
    compression_ratio: float
    """raw ÷ stored."""
    coded_share: float
    """Share of the raw bytes that a codec other than `raw` won."""
    tensors: list[CodedTensor]
    """Per tensor."""


class ShardReport(Report):
    """What sharding made."""

    shards: int
    """Number of shards."""
    total_bytes: int
    """Bytes of all shards."""
    largest_bytes: int
    """The largest shard."""


class UploadReport(Report):
    """What publishing sent."""

    pack: str
    """Digest of the manifest: the pack's identity."""
    uri: str
    """Where the manifest lies."""
    objects: int
    """Blobs of the pack."""
    sent_objects: int
    """Blobs that were not there already."""
    sent_bytes: int
    """Bytes sent."""
    published_bytes: int
    """All bytes of the pack: shards, files and manifest."""
    source_bytes: int
    """The source model's checkpoint."""
    compression_ratio: float
    """source ÷ published."""
    seconds: float
    """Wall time."""


class VerifyReport(Report):
    """What a verification read and found in order."""

    pack: str
    """Digest of the manifest."""
    uri: str
    """Where the manifest lies."""
    shards: int
    """Shards read."""
    tensors: int
    """Tensors decoded, each equal to its digest."""
    files: int
    """Files read, each equal to its digest."""
    read_bytes: int
    """Bytes of all blobs and of the manifest."""
    seconds: float
    """Wall time."""
