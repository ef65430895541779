"""The model, the data and the metric."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from modelpress.config.base import Config, refuse_unread


class WorkloadConfig(Config):
    """What is optimised and how it is judged: the model, the data and the metric."""

    kind: Literal["image-classification", "text-classification", "sentence-embedding", "causal-lm", "custom"]
    """Built-in workload, or `custom` for a class of your own."""
    model: str = ""
    """The model: `digits-cnn`, `lenet-300-100`, `lenet-5` or `tiny-decoder` (trained in the run), `timm:NAME` or
    `torchvision:NAME`, or a Hugging Face folder (safetensors + config + tokenizer) as a path, as
    `package://PACKAGE/FOLDER`, as `hf://OWNER/NAME@REVISION` (a commit, fetched once), or from MLflow as
    `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `runs:/ID/PATH`."""
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
    slice_by_class: bool = False
    """For `image-classification` and `text-classification`: the evaluation samples of each class are a slice, `class
    NAME`, for `gate.slice_margin` and `gate.slice_floors`."""
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
        unread: dict[str, str] = {}
        if self.kind != "custom":
            unread["options"] = "workload.kind 'custom'"
        if self.kind not in ("image-classification", "custom"):
            unread["image_size"] = "workload.kind 'image-classification'"
        if self.kind not in ("causal-lm", "text-classification", "custom"):
            unread["length"] = "workload.kind 'causal-lm' or 'text-classification'"
        if self.kind not in ("image-classification", "text-classification"):
            unread["slice_by_class"] = "workload.kind 'image-classification' or 'text-classification'"
        refuse_unread(self, "workload", unread)
        if self.kind != "custom" and not (self.model and self.data):
            raise ValueError(f"workload.model and workload.data are needed when workload.kind is {self.kind!r}")
        return self
