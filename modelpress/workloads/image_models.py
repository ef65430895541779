"""Image models by the name that an installed library has for them: `timm:NAME`, `torchvision:NAME`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from modelpress.errors import SetupError, WorkloadError

LIBRARIES = ("timm", "torchvision")
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet: what the libraries' models expect to be taken off."""


class NamedImageModel(nn.Module):
    """A library's model behind the input that this workload has.

    Takes `image`, (batch, 1 or 3, height, width) float32 from 0 to 1; returns logits, (batch, classes) float32.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a batch of images; grey ones become three equal colours."""
        logits: Tensor = self.model((image - self.mean) / self.deviation)
        return logits


def is_named(model: str) -> bool:
    """Whether this is the name of a library's model."""
    return model.partition(":")[0] in LIBRARIES and ":" in model


def build_named(model: str, classes: int) -> nn.Module:
    """The library's model with random weights; nothing is downloaded.

    Raises:
        SetupError: the library is not installed.
        WorkloadError: it has no such model.
    """
    library, _, name = model.partition(":")
    try:
        module: Any = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    except (ImportError, RuntimeError) as error:  # a torchvision that was built for another torch says so at import
        raise SetupError(
            f"building {model}",
            found=f"a {library} that cannot be imported: {error}",
            expected="the library, in the version for the installed torch",
            fix=f"pip install {library}",
        ) from error
    try:
        if library == "timm":
            built: nn.Module = module.create_model(name, pretrained=False, num_classes=classes)
        else:
            built = module.get_model(name, weights=None, num_classes=classes)
    except (RuntimeError, ValueError, TypeError) as error:
        raise WorkloadError(
            f"building {model}", found=str(error)[:200], expected=f"the name of an image classifier of {library}"
        ) from error
    return NamedImageModel(built)


def load_weights(module: nn.Module, path: Path, model: str) -> None:
    """Fill a library's model from a .safetensors of its state dict.

    Raises:
        WorkloadError: no such file, or other tensors than the model has.
    """
    assert isinstance(module, NamedImageModel)
    try:
        module.model.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise WorkloadError(
            f"loading workload.weights {path} into {model}",
            found=str(error)[:300],
            expected="a .safetensors with the model's state dict, trained on as many classes as the data has",
        ) from error
