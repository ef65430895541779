"""The two networks that pruning and weight sharing have been measured on since Han et al. 2015 (arXiv:1506.02626).

After LeCun et al. 1998 (doi:10.1109/5.726791), in Caffe's widths; both take images of any size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modelpress.errors import WorkloadError

KERNEL = 5


class LeNet300(nn.Module):
    """LeNet-300-100: linear layers with ReLU between them; 266,610 parameters on 28×28 images and ten classes.

    Takes `image`, (batch, colours, height, width) float32; returns logits, (batch, classes) float32.

    Args:
        image_shape: colours, height, width.
        classes: number of classes.
        hidden: widths of the hidden layers.

    Raises:
        WorkloadError: a width below 1.
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: int, hidden: Sequence[int] = (300, 100)) -> None:
        super().__init__()
        if min(hidden, default=1) < 1:
            raise WorkloadError("building a LeNet-300-100", found=f"hidden {list(hidden)}", expected="widths from 1 up")
        colours, height, width = image_shape
        widths = [colours * height * width, *hidden, classes]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return torch.as_tensor(self.layers(image))


class LeNet5(nn.Module):
    """LeNet-5 as Caffe has it: two 5×5 convolutions, each halved by pooling, then two linear layers; 431,080
    parameters on 28×28 images and ten classes.

    Takes `image`, (batch, colours, height, width) float32; returns logits, (batch, classes) float32.

    Args:
        image_shape: colours, height, width.
        classes: number of classes.
        channels: output channels of the two convolutions.
        hidden: width of the hidden linear layer.

    Raises:
        WorkloadError: not two convolutions, a width below 1, or an image too small for them.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        channels: Sequence[int] = (20, 50),
        hidden: int = 500,
    ) -> None:
        super().__init__()
        colours, height, width = image_shape
        for _ in channels:
            height, width = (height - KERNEL + 1) // 2, (width - KERNEL + 1) // 2
        if len(channels) != 2 or min(*channels, hidden, height, width) < 1:
            raise WorkloadError(
                "building a LeNet-5",
                found=f"channels {list(channels)}, hidden {hidden}, images of {image_shape[1]}×{image_shape[2]}",
                expected="two convolutions, widths from 1 up, and images of 16×16 or more",
            )
        first, second = channels
        self.features = nn.Sequential(
            *(nn.Conv2d(colours, first, KERNEL), nn.MaxPool2d(2)),
            *(nn.Conv2d(first, second, KERNEL), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Sequential(
            *(nn.Flatten(), nn.Linear(second * height * width, hidden), nn.ReLU(), nn.Linear(hidden, classes)),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return torch.as_tensor(self.classifier(self.features(image)))
