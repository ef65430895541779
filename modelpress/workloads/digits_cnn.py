"""A small convolutional classifier whose widths are free: teacher and students of the digits recipe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modelpress.errors import WorkloadError

TEACHER_CHANNELS = (64, 128, 128)
TEACHER_HIDDEN = 896


class DigitsCNN(nn.Module):
    """3×3 convolutions with batch normalisation, halving the image after every second one, then two linear layers.

    Takes `image`, (batch, colours, height, width) float32; returns logits, (batch, classes) float32.

    Args:
        image_shape: colours, height, width.
        classes: number of classes.
        channels: output channels of each convolution.
        hidden: width of the hidden linear layer.

    Raises:
        WorkloadError: no convolution, a width below 1, or an image too small to be halved that often.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        channels: Sequence[int] = TEACHER_CHANNELS,
        hidden: int = TEACHER_HIDDEN,
    ) -> None:
        super().__init__()
        colours, height, width = image_shape
        halvings = (len(channels) + 1) // 2
        if not channels or min(*channels, hidden) < 1 or min(height, width) < 2**halvings:
            raise WorkloadError(
                "building a DigitsCNN",
                found=f"channels {list(channels)}, hidden {hidden}, images of {height}×{width}",
                expected="at least one convolution, widths from 1 up, and images of at least 2 pixels for every second "
                "convolution's halving",
            )
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(zip([colours, *channels], channels, strict=False)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            if index % 2 == 0:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        flat = channels[-1] * (height >> halvings) * (width >> halvings)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return torch.as_tensor(self.classifier(self.features(image)))
