"""The configs of the graph and of its quantization."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from modelpress.config.base import Config, refuse_unread
from modelpress.config.train import TrainConfig


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
    algorithm: Literal["rtn", "gptq", "hqq", "fp8"] = "gptq"
    """For `weight-only`: round to the nearest; let later weights make up for the rounding of earlier ones (Frantar et
    al. 2022, arXiv:2210.17323); real zero points without data (Badri & Shaji 2023; 4 bits, not symmetric; slow
    on the CPU); or `fp8`, the nearest float8 e4m3, in a byte, without groups (Micikevicius et al. 2022,
    arXiv:2209.05433)."""
    act_order: bool = False
    """For `gptq`: round the inputs of the largest activations first."""
    scales: Literal["float", "power-of-two"] = "float"
    """For `static`: any scales, or powers of two alone, with int8 activations and every zero point 0, as the DPUs of
    FPGAs take them (AMD's VINT8); needs `per_channel` false."""
    per_channel: bool = True
    """One weight scale per output channel; without, one per weight. Not for `weight-only` in groups."""
    embeddings: bool = False
    """Quantize embedding tables (Gather) as well; their rows are stored as int8."""
    targets: list[str] = []
    """ONNX node names or globs; empty takes every MatMul and Gemm, and with `static` every Conv. For `codebook`, module
    names or globs; for `modelpress quantize`, names of the Hugging Face model's linear layers."""
    ignore: list[str] = []
    """ONNX node names or globs that stay in float. For `codebook`, module names or globs."""
    max_quality_drop: float = Field(default=0.01, ge=0)
    """Budget on calibration data: the most sensitive layers stay in float (with 4 bits: take 8) until the drop,
    measured as 1 − agreement with the float graph, is within it."""
    min_coverage: float = Field(default=0.5, ge=0, le=1)
    """Least share of the eligible weights that must end as integers; less is an error."""
    scales_from: str | None = None
    """Alias or digest of a published pack of the same name, quantized with the same options: weights are rounded on its
    scales, so that a light fine-tune changes few codes and `compress.base` sends little. A weight that has moved out of
    its range gets fresh ones; `gptq` also holds codes that are near. Not for `codebook`, `fp8` or with `recovery`."""
    max_scales_loss: float = Field(default=0.002, ge=0)
    """With `scales_from`: what those scales may cost in agreement on calibration data against fresh ones; beyond it all
    scales are fresh. The report shows both."""
    recovery: TrainConfig | None = None
    """Train with the model as it was before as teacher: the shared values (`codebook`), or the weights with the
    rounding of int8 in the loop (`dynamic`, `static`; with `smooth` 0, as what smoothing changes is not in the loop);
    absent means none."""

    @property
    def powers_of_two(self) -> bool:
        """Whether every scale is a power of two."""
        return self.scales == "power-of-two"

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
        if self.algorithm == "fp8" and self.num_bits != 8:
            raise ValueError("quantize.algorithm 'fp8' needs quantize.num_bits 8")
        if self.scales_from is not None and (self.needs_module or self.algorithm == "fp8"):
            raise ValueError("quantize.scales_from needs integer weights, and no quantize.recovery")
        self._check_scales()
        self._refuse_unread()
        return self

    def _check_scales(self) -> None:
        if not self.powers_of_two:
            return
        if self.per_channel:
            raise ValueError("quantize.scales 'power-of-two' needs quantize.per_channel false: a tensor has one scale")
        others = ("embeddings", "recovery", "scales_from")
        if given := [name for name in others if getattr(self, name)]:
            raise ValueError(f"quantize.scales 'power-of-two' excludes quantize.{given[0]}, which makes other scales")

    def _refuse_unread(self) -> None:
        int8, float8 = self.method in ("dynamic", "static"), self.algorithm == "fp8"
        unread: dict[str, str] = {}
        if self.method != "weight-only":
            names = ("group_size", "symmetric", "algorithm", "act_order")
            unread |= dict.fromkeys(names, "quantize.method 'weight-only'")
        elif float8:
            unread |= dict.fromkeys(("group_size", "symmetric"), "an integer quantize.algorithm")
        if self.scales_from is None:
            unread["max_scales_loss"] = "quantize.scales_from"
        if self.method != "static":
            unread |= dict.fromkeys(("calibration", "scales"), "quantize.method 'static'")
        if self.method != "static" or self.calibration != "percentile":
            unread["percentile"] = "quantize.method 'static' and quantize.calibration 'percentile'"
        if not int8:
            unread["smooth"] = "quantize.method 'dynamic' or 'static'"
        if not int8 and not float8:
            unread["per_channel"] = "quantize.method 'dynamic' or 'static', or quantize.algorithm 'fp8'"
        refuse_unread(self, "quantize", unread)
