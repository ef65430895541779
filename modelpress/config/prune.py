"""The config of pruning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from modelpress.config.base import Config, refuse_unread
from modelpress.config.train import TrainConfig


class PruneConfig(Config):
    """Remove weights: as zeros, or as whole channels, neurons, heads and layers that physically disappear."""

    method: Literal["magnitude", "wanda", "sparsegpt", "structured"] = "structured"
    """Zeros: `magnitude` takes the smallest weights, `wanda` those that move the outputs least on calibration data, and
    `sparsegpt` also updates the weights that stay. `structured` removes channels, neurons, heads or layers."""
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"
    """For zeros: anywhere, or in exactly 2 of each 4 (4 of each 8) neighbours that an output reads."""
    scope: Literal["layer", "global"] = "layer"
    """For `magnitude`: the threshold is found per tensor (exact sparsity in each), or over all of them."""
    structures: list[Literal["channels", "neurons", "heads", "layers"]] = ["channels", "neurons"]
    """For `structured`: what may be removed. `layers` are whole blocks, the elements of the model's largest ModuleList;
    it stands alone, as removing blocks renumbers what `targets` and `ignore` name."""
    importance: Literal["magnitude", "activation", "taylor"] = "activation"
    """For `structured`: what a structure is worth. `magnitude`: the size of its weights. `activation`: what it changes
    in what reads it, on calibration data; of a layer, how far its outputs point from its inputs. `taylor`: what the
    loss loses without it, to first order, on calibration data (of embeddings: how far they move). With `repair` the
    default keeps most."""
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    """Fraction of zeros, or of the structures removed in each layer, or of the layers (`structured`)."""
    targets: list[str] = []
    """Module names or globs (`*.layer.0.intermediate.dense`); a name also takes what is below it. Empty takes all."""
    ignore: list[str] = []
    """Module names or globs that stay untouched."""
    repair: bool = True
    """For `structured`: re-fit what reads the removed structures by least squares on calibration data; of `layers`, the
    last linear layer of the block before each gap."""
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
    def _check_structures(self) -> PruneConfig:
        if not self.structures:
            raise ValueError("prune.structures names nothing to remove")
        if "layers" in self.structures:
            if len(self.structures) > 1:
                raise ValueError(f"prune.structures 'layers' stands alone (found {', '.join(self.structures)})")
            if self.importance == "magnitude":
                raise ValueError("prune.structures 'layers' needs prune.importance 'activation' or 'taylor'")
        return self

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
        unread: dict[str, str] = {}
        if self.method != "structured":
            unread |= dict.fromkeys(("structures", "importance", "repair"), "prune.method 'structured'")
        if self.method != "sparsegpt":
            unread["damping"] = "prune.method 'sparsegpt'"
        fsdp = self.recovery is not None and self.recovery.parallel.strategy == "fsdp"
        if fsdp and self.method != "structured":
            raise ValueError(
                "prune.recovery.parallel.strategy 'fsdp' needs prune.method 'structured': zeros are held on whole "
                "weights, of which each process has a part"
            )
        if self.recovery is None:
            unread["recovery_hidden_weight"] = "prune.recovery"
        refuse_unread(self, "prune", unread)
        return self
