"""The configuration of a run: one set of models for the function, the flow, the form, the command line and the YAML.

Every field's docstring is its help text everywhere. Validators check and never rewrite. This module imports neither
torch nor numpy, so that a deployment's form can be built where neither is installed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from modelpress.errors import ConfigError

PackName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")]
"""Name of a pack: lower-case letters, digits, dot, dash, underscore; it is part of object keys."""

Alias = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
"""Name of a pointer, such as ``champion``."""

Bytes = Annotated[int, Field(gt=0)]

Scale = Literal["tensor", "channel"] | Annotated[int, Field(ge=8, le=4096)]
"""What shares a scale: the whole tensor, an output channel, or so many neighbouring inputs of one."""


class Config(BaseModel):
    """Base of all configs: frozen, unknown keys refused, docstrings as help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON of this config: part of a stage's cache key."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


Checked = TypeVar("Checked", bound=Config)


class WorkloadConfig(Config):
    """What is optimised and how it is judged: the model, the data and the metric."""

    kind: Literal["image-classification", "text-classification", "sentence-embedding", "causal-lm", "custom"]
    """Built-in workload, or `custom` for a class of your own."""
    model: str = ""
    """The model: `digits-cnn`, `lenet-300-100`, `lenet-5` or `tiny-decoder` (trained in the run), `timm:NAME` or
    `torchvision:NAME`, or a Hugging Face folder (safetensors + config + tokenizer) as a path, as
    `package://PACKAGE/FOLDER` or as `hf://OWNER/NAME@REVISION` (a commit, fetched once)."""
    data: str = ""
    """The data. Images: `digits`, `digits-28` (the same at 28×28 pixels), an .npz with arrays `images` and `labels`, a
    folder with a sub-folder of PNG or JPEG files per class, a .parquet with `image` and `label`. Retrieval:
    `docstrings` (pairs made from the docstrings of installed Python sources), a .jsonl with `query` and `document`.
    Language: `python-sources` (the standard library's own files), a folder of texts, a .jsonl with `text`, a .txt of
    paragraphs. Labelled texts: `python-modules` (functions of the standard library, each labelled by its package), a
    .jsonl with `text` and `label`."""
    factory: str = ""
    """For `custom`: import path `package.module:callable` that returns a `modelpress.workload.Workload`."""
    options: dict[str, str | int | float | bool] = {}
    """For `custom`: keyword arguments of the factory."""
    architecture: dict[str, int | float | str | bool | list[int]] = {}
    """For a model that is trained in the run: its sizes, as in `distill.architecture`. Empty: its own."""
    weights: str = ""
    """For `timm:NAME` and `torchvision:NAME`: a .safetensors of the model's state dict; empty trains it in the run."""
    image_size: int = Field(default=0, ge=0, le=4096)
    """For images that are files: height and width that all are resized to; 0 takes them as they are, of one size."""
    length: int = Field(default=128, ge=2, le=65_536)
    """For `causal-lm`: tokens of a sample; for `text-classification`: the most that are read."""
    train_samples: int = Field(default=0, ge=0)
    """At most this many training samples; 0 takes all."""
    calibration_samples: int = Field(default=128, ge=1)
    """Samples held apart for calibration and sensitivity."""
    evaluation_samples: int = Field(default=0, ge=0)
    """At most this many evaluation samples; 0 takes all."""
    train_epochs: int = Field(default=30, ge=1, le=10_000)
    """Epochs for a source model that is trained in the run."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split and of the source model's training."""

    @model_validator(mode="after")
    def _check(self) -> WorkloadConfig:
        if self.kind == "custom" and ":" not in self.factory:
            raise ValueError("workload.factory must be 'package.module:callable' when workload.kind is 'custom'")
        if self.kind != "custom" and self.factory:
            raise ValueError("workload.factory is only read when workload.kind is 'custom'")
        if self.weights and not self.model.startswith(("timm:", "torchvision:")):
            raise ValueError("workload.weights needs a workload.model of 'timm:NAME' or 'torchvision:NAME'")
        if self.kind != "custom" and not (self.model and self.data):
            raise ValueError(f"workload.model and workload.data are needed when workload.kind is {self.kind!r}")
        return self


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
    seed: int = Field(default=0, ge=0)
    """Seed of the order of the data and of dropout."""


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


class PruneConfig(Config):
    """Remove weights: as zeros, or as whole channels, neurons and heads that physically disappear."""

    method: Literal["magnitude", "wanda", "sparsegpt", "structured"] = "structured"
    """Zeros: `magnitude` takes the smallest weights, `wanda` those that move the outputs least on calibration data, and
    `sparsegpt` also updates the weights that stay. `structured` removes channels, neurons and heads."""
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"
    """For zeros: anywhere, or in exactly 2 of each 4 (4 of each 8) neighbours that an output reads."""
    scope: Literal["layer", "global"] = "layer"
    """For `magnitude`: the threshold is found per tensor (exact sparsity in each), or over all of them."""
    structures: list[Literal["channels", "neurons", "heads"]] = ["channels", "neurons"]
    """For `structured`: what may be removed."""
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    """Fraction of zeros, or of the structures removed in each layer (`structured`)."""
    targets: list[str] = []
    """Module names or globs (`*.layer.0.intermediate.dense`); a name also takes what is below it. Empty takes all."""
    ignore: list[str] = []
    """Module names or globs that stay untouched."""
    repair: bool = True
    """For `structured`: re-fit the next layer by least squares on calibration data."""
    damping: float = Field(default=0.01, ge=0)
    """For `sparsegpt`: added to the diagonal of the inputs' second moments, as a share of its mean."""
    steps: int = Field(default=1, ge=1, le=1000)
    """For zeros without a pattern: reach the sparsity in this many steps (cubic schedule, Zhu & Gupta 2017,
    arXiv:1710.01878), with the epochs of `recovery` divided over them."""
    recovery: TrainConfig | None = None
    """Fine-tune after pruning, with the unpruned model as teacher; absent means none."""
    recovery_hidden_weight: float = Field(default=1.0, ge=0)
    """For `recovery`: weight of the difference between the outputs of the model's blocks (the elements of its largest
    ModuleList) and the unpruned model's, beside that of the outputs. A model without blocks has only outputs."""

    @model_validator(mode="after")
    def _check(self) -> PruneConfig:
        if self.pattern != "unstructured":
            if self.method == "structured":
                raise ValueError(f"prune.pattern {self.pattern!r} needs a method that sets weights to zero")
            if self.sparsity != 0.5:
                raise ValueError(f"prune.pattern {self.pattern!r} has a sparsity of 0.5 (found {self.sparsity:g})")
            if self.steps > 1:
                raise ValueError(f"prune.steps must be 1 with prune.pattern {self.pattern!r}, whose sparsity is fixed")
        if self.scope == "global" and (self.method != "magnitude" or self.pattern != "unstructured"):
            raise ValueError("prune.scope 'global' needs prune.method 'magnitude' and no pattern")
        if self.steps > 1:
            if self.method == "structured":
                raise ValueError("prune.steps needs a method that sets weights to zero")
            if self.recovery is None or self.recovery.epochs < self.steps:
                raise ValueError("prune.steps needs prune.recovery with an epoch for each step, at least")
        return self


class ExportConfig(Config):
    """The ONNX graph that is served."""

    opset: int = Field(default=18, ge=17, le=25)
    """ONNX operator set."""
    tolerance: float = Field(default=1e-3, gt=0)
    """Largest absolute difference allowed between the torch module's and the graph's output."""


class QuantizeConfig(Config):
    """Integer weights, and mostly integer activations, in ONNX Runtime; or weights of few values, stored as indices."""

    method: Literal["dynamic", "static", "weight-only", "codebook"] = "static"
    """`dynamic` finds the activations' range at run time, `static` from calibration data (QDQ); `weight-only` leaves
    activations in float, for size and memory bandwidth; `codebook` lets each weight tensor share 2^num_bits values,
    computes in float and is for size alone."""
    calibration: Literal["mse", "minmax", "percentile", "entropy"] = "mse"
    """For `static`: how the range is found; `mse` takes the one of least squared rounding error."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """For `static` with `percentile`: share of activation values inside the range."""
    smooth: float = Field(default=0.7, ge=0, lt=1)
    """For `dynamic` and `static`: how much of the activations' outliers moves into the weights where a normalisation
    or a linear layer stands before them (SmoothQuant's α; Xiao et al. 2022, arXiv:2211.10438); 0 moves nothing."""
    num_bits: int = Field(default=8, ge=2, le=8)
    """Bits of weights and activations (8); for `weight-only`, of weights (4 or 8); for `codebook`, of a weight's index
    (2 to 8)."""
    group_size: int = Field(default=128, ge=16, le=1024)
    """For `weight-only`: neighbouring inputs that share a scale, a power of two; a last group may have fewer."""
    symmetric: bool = True
    """For `weight-only`: no zero points; without, each group's range may lie off centre, for 4 or 8 bits a group."""
    algorithm: Literal["rtn", "gptq", "hqq"] = "gptq"
    """For `weight-only`: round to the nearest; let later weights make up for the rounding of earlier ones (Frantar et
    al. 2022, arXiv:2210.17323); or real zero points without data (Badri & Shaji 2023; 4 bits, not symmetric; slow
    on the CPU)."""
    act_order: bool = False
    """For `gptq`: round the inputs of the largest activations first."""
    per_channel: bool = True
    """One weight scale per output channel."""
    embeddings: bool = False
    """Quantize embedding tables (Gather) as well; their rows are stored as int8."""
    targets: list[str] = []
    """ONNX node names or globs; empty takes every MatMul and Gemm, and with `static` every Conv. For `codebook`, module
    names or globs."""
    ignore: list[str] = []
    """ONNX node names or globs that stay in float. For `codebook`, module names or globs."""
    max_quality_drop: float = Field(default=0.01, ge=0)
    """Budget on calibration data: the most sensitive layers stay in float (with 4 bits: take 8) until the drop,
    measured as 1 − agreement with the float graph, is within it."""
    min_coverage: float = Field(default=0.5, ge=0, le=1)
    """Least share of the eligible weights that must end as integers; less is an error."""
    recovery: TrainConfig | None = None
    """Train with the model as it was before as teacher: the shared values (`codebook`), or the weights with the
    rounding of int8 in the loop (`dynamic`, `static`; with `smooth` 0, as what smoothing changes is not in the loop);
    absent means none."""

    @property
    def needs_module(self) -> bool:
        """Whether the method works on the torch module behind the graph."""
        return self.method == "codebook" or self.recovery is not None

    @model_validator(mode="after")
    def _check(self) -> QuantizeConfig:
        allowed = {"codebook": range(2, 9), "weight-only": (4, 8)}.get(self.method, (8,))
        if self.num_bits not in allowed:
            bits = "from 2 to 8" if self.method == "codebook" else " or ".join(map(str, allowed))
            raise ValueError(f"quantize.num_bits must be {bits} when quantize.method is {self.method!r}")
        if self.method == "weight-only" and self.recovery is not None:
            raise ValueError("quantize.recovery needs quantize.method 'codebook', 'dynamic' or 'static'")
        if self.method in ("dynamic", "static") and self.recovery is not None and self.smooth:
            raise ValueError(f"quantize.recovery with method {self.method!r} needs quantize.smooth 0")
        if self.group_size & (self.group_size - 1):
            raise ValueError("quantize.group_size must be a power of two")
        if self.act_order and self.algorithm != "gptq":
            raise ValueError("quantize.act_order needs quantize.algorithm 'gptq'")
        if self.method == "weight-only" and self.algorithm == "hqq" and (self.symmetric or self.num_bits != 4):
            raise ValueError("quantize.algorithm 'hqq' needs quantize.symmetric false and quantize.num_bits 4")
        return self


class PlanConfig(Config):
    """Give each weight of a float graph its own bits and scales, so that all take the fewest coded bytes within one
    budget. The graph goes on computing in float."""

    max_disagreement: float = Field(default=0.01, gt=0)
    """Budget on calibration data, against the float graph: mean Kullback-Leibler divergence of the softmax of logits,
    in nats, or 1 − mean cosine of embeddings."""
    num_bits: list[Annotated[int, Field(ge=2, le=8)]] = Field(default=[8, 7, 6, 5, 4, 3], min_length=1)
    """Bits of codes that a weight may take."""
    scales: list[Scale] = Field(default=["tensor", "channel", 64], min_length=1)
    """What may share a scale: `tensor`, `channel` (a row of a table), or a number of neighbouring inputs; the last is
    offered where it divides them."""
    embeddings: bool = True
    """Plan embedding tables (Gather) as well."""
    targets: list[str] = []
    """ONNX node names or globs; empty takes every MatMul, Gemm, Conv and, with `embeddings`, Gather. A weight that
    several nodes share is planned if one of them is named."""
    ignore: list[str] = []
    """ONNX node names or globs whose weights stay in float."""
    sensitivity_samples: int = Field(default=32, ge=8)
    """Calibration samples on which single weights are measured; whole plans are measured on all."""
    points: int = Field(default=8, ge=0, le=64)
    """Points of the front of bytes against disagreement that are built, measured and coded; 0: none."""

    @model_validator(mode="after")
    def _check(self) -> PlanConfig:
        for name in ("num_bits", "scales"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"plan.{name} must not repeat")
        return self


class CompressConfig(Config):
    """Lossless coding of tensors, each by whichever codec is smallest."""

    codecs: list[Literal["zstd", "planes-huffman", "rle-huffman", "mask-huffman"]] = Field(
        default=["zstd", "planes-huffman", "rle-huffman", "mask-huffman"], min_length=1
    )
    """Codecs that are tried; `raw` always is."""
    zstd_level: int = Field(default=9, ge=1, le=22)
    """Level of the `zstd` codec."""
    min_decode_bytes_per_second: float = Field(default=200e6, ge=0)
    """Decode-speed floor, in raw bytes per second on one core; a codec known to be slower is not chosen. 0: none."""
    chunk_symbols: int = Field(default=131_072, ge=4_096, le=16_777_216)
    """Symbols (elements) per independently decodable chunk."""


class ShardConfig(Config):
    """How the coded tensors are cut into objects."""

    by: Literal["size", "layer"] = "size"
    """`size` fills shards in tensor order; `layer` also starts a new shard at each layer."""
    max_shard_size: Bytes = 64 * 2**20
    """Bytes; no shard is larger. A single tensor that is larger is split over several."""


class UploadConfig(Config):
    """How shards travel to the store."""

    concurrency: int = Field(default=4, ge=1, le=64)
    """Objects in flight."""


class EvaluateConfig(Config):
    """What is measured after each stage that changed the model, and when the flow stops."""

    max_quality_drop: float = Field(default=0.02, ge=0)
    """Quality budget in the metric's own units: the flow stops at a stage whose drop against the source model is
    larger, by the whole confidence interval."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence of the reported intervals."""
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(default=[1, 32], min_length=1)
    """Batch sizes at which latency and throughput are measured."""
    latency_seconds: float = Field(default=2.0, gt=0, le=600)
    """Time spent measuring each batch size."""
    threads: int = Field(default=0, ge=0)
    """Intra-operator threads; 0 takes the cores that this process may use."""
    provider: Literal["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"] = (
        "CPUExecutionProvider"
    )
    """ONNX Runtime execution provider; one that is asked for and missing is an error."""
    attribution_samples: int = Field(default=0, ge=0, le=10_000)
    """Evaluation samples on which the reasons for the answers are compared with the source model's; 0: none."""


class GateConfig(Config):
    """Who may become champion."""

    margin: float = Field(default=0.01, gt=0)
    """Non-inferiority margin in the metric's own units, against the source model and against the champion."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """One-sided confidence of the test."""
    min_compression_ratio: float = Field(default=1.0, ge=0)
    """Least source bytes ÷ published bytes."""
    min_speedup: float = Field(default=0.0, ge=0)
    """Least throughput ratio to the source model in ONNX Runtime, at the largest measured batch; 0 does not ask."""
    min_attribution_agreement: float = Field(default=0.0, ge=0, le=1)
    """Least rank correlation of the attributions with the source model's; 0 does not ask. Needs
    evaluate.attribution_samples."""
    alias: Alias = "champion"
    """The pointer that a passed gate moves."""


class OptimizeConfig(Config):
    """One run of the line: source → distill → prune → export → quantize → compress → shard → upload → register."""

    name: PackName
    """Name of the published pack and of the registered model."""
    workload: WorkloadConfig
    """The model, the data and the metric."""
    distill: DistillConfig | None = None
    """Absent: no distillation."""
    prune: PruneConfig | None = None
    """Absent: no pruning."""
    export: ExportConfig = ExportConfig()
    """The ONNX graph that is served."""
    quantize: QuantizeConfig | None = None
    """Absent: the graph stays in float."""
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

    @model_validator(mode="after")
    def _check(self) -> OptimizeConfig:
        if self.gate.min_attribution_agreement and not self.evaluate.attribution_samples:
            raise ValueError("gate.min_attribution_agreement needs evaluate.attribution_samples")
        return self


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


def load_config(path: str | Path) -> OptimizeConfig:
    """Read an `OptimizeConfig` from a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds an unknown or illegal value; every offending field is
            named with what it may hold.
    """
    return parse_config(_read_yaml(path), origin=str(path))


def load_plan_recipe(path: str | Path) -> PlanRecipe:
    """Read a `PlanRecipe` from a YAML file.

    Raises:
        ConfigError: see `load_config`.
    """
    return _checked(PlanRecipe, _read_yaml(path), str(path))


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
