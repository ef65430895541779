"""How far a student is from its teacher: soft labels, embeddings, hidden states, attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from modelpress.errors import StageError
from modelpress.parallel.turn import partial_mean, whole_mean
from modelpress.workload import Outputs

Divergence = Literal["forward-kl", "reverse-kl"]


def imitation_loss(
    output: Tensor,
    target: Tensor,
    outputs: Outputs,
    temperature: float = 1.0,
    divergence: Divergence = "forward-kl",
    mask: Tensor | None = None,
) -> Tensor:
    """How far a student's outputs are from its teacher's, averaged over the batch; for language models, its tokens.

    Logits, (batch, classes) or (batch, length, vocabulary), with p = softmax(target/T) and q = softmax(output/T):
    `forward-kl` T² · KL(p ‖ q) (Hinton et al. 2015, arXiv:1503.02531), `reverse-kl` T² · KL(q ‖ p), which a student
    too small for all of p meets by its likeliest part (Gu et al. 2023, arXiv:2306.08543; here token by token on the
    training texts). T² keeps the gradient's size when T changes. Embeddings, (batch, dim): 1 − cosine.

    Args:
        output: the student's.
        target: the teacher's, of the same shape.
        outputs: what they are.
        temperature: T, for logits.
        divergence: for logits.
        mask: (batch, length), 1 where a token counts; None counts all.

    Raises:
        StageError: the two differ in shape.
    """
    if output.shape != target.shape:
        raise StageError(
            "comparing the student's outputs with the teacher's",
            found=f"shape {list(output.shape)}, the teacher's {list(target.shape)}",
            expected=f"equal shapes: {outputs} of the same width",
            fix="leave the width of the output (such as hidden_size) out of distill.architecture, or learn without the "
            "teacher: distill.alpha 0",
        )
    if outputs == "embeddings":
        return (1 - nn.functional.cosine_similarity(output, target, dim=-1)).mean()
    student = counted(nn.functional.log_softmax(output / temperature, dim=-1), mask)
    taught = counted(nn.functional.log_softmax(target / temperature, dim=-1), mask)
    masked = mask is not None and mask.shape == output.shape[:-1]
    return temperature**2 * divergence_of(student, taught, divergence, masked=masked)


def divergence_of(student: Tensor, taught: Tensor, divergence: Divergence, *, masked: bool = False) -> Tensor:
    """KL between rows of log-probabilities, (rows, classes), the mean over the rows.

    `masked`: samples have different numbers of rows; the mean is over those of the whole batch, wherever they are.
    """
    first, second = (student, taught) if divergence == "forward-kl" else (taught, student)
    if masked:
        total = nn.functional.kl_div(first, second, reduction="sum", log_target=True)
        return partial_mean(total, torch.tensor(len(student)))
    return nn.functional.kl_div(first, second, reduction="batchmean", log_target=True)


def counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, …, dim) as rows, (rows, dim), without those that a mask of the same leading axes leaves out."""
    rows = values.flatten(0, -2)
    if mask is None or mask.shape != values.shape[:-1]:
        return rows
    return rows[mask.flatten().bool()]


def hidden_loss(
    taught: list[Tensor], learned: list[Tensor], mask: Tensor | None = None, *, relative: bool = False
) -> Tensor:
    """Mean squared difference of matched hidden states, (batch, …, dim).

    Args:
        taught: the teacher's.
        learned: the student's.
        mask: (batch, length), omits padding.
        relative: divide each state's by the teacher's mean square, so that states of any size count alike.
    """
    total = learned[0].new_zeros(())
    for target, state in zip(taught, learned, strict=True):
        squares, count = _squares(state - target, mask)
        difference = squares.mean() if mask is None else partial_mean(squares.sum(), count)
        scale = torch.ones_like(difference)
        if relative:
            squares, count = _squares(target, mask)
            scale = whole_mean(squares.sum(), count)
        total = total + difference / torch.where(scale > 0, scale, 1.0)  # zeros have no size to compare with
    return total / len(learned)


def _squares(state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The squares, with zeros where the mask leaves out, and how many it leaves."""
    squares = state.square()
    if mask is None:
        return squares, torch.tensor(squares.numel())
    weight = mask.unsqueeze(-1).to(squares.dtype)
    return squares * weight, weight.sum() * squares.shape[-1]


def attention_loss(taught: Tensor, learned: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(teacher ‖ student) of attention distributions, the mean over heads and positions.

    The last layer's self-attention, as MiniLM matches it (Wang et al. 2020, arXiv:2002.10957, equation 4).

    Args:
        taught: (batch, heads, length, length), rows sum to 1; zeros where nothing is looked at.
        learned: the student's, of the same shape.
        mask: (batch, length), 1 where a position counts.
    """
    tiny = torch.finfo(taught.dtype).tiny
    rows = (taught * (taught.clamp_min(tiny).log() - learned.clamp_min(tiny).log())).sum(dim=-1).mean(dim=1)
    if mask is None:
        return rows.mean()
    weight = mask.to(rows.dtype)
    return partial_mean((rows * weight).sum(), weight.sum())


def feature_map_loss(taught: Mapping[tuple[int, int], Tensor], learned: Mapping[tuple[int, int], Tensor]) -> Tensor:
    """Attention transfer (Zagoruyko and Komodakis 2017, arXiv:1612.03928, equation 2), squared.

    Where a network looks: the mean over the channels of the squared activations, of length 1. It needs no projection
    where teacher and student have different numbers of channels.

    Args:
        taught: feature maps, (batch, channels, height, width), by (height, width).
        learned: the student's, of which those of sizes in both are matched.
    """
    sizes = [size for size in learned if size in taught]
    total = next(iter(learned.values())).new_zeros(())
    for size in sizes:
        total = total + (_looks(learned[size]) - _looks(taught[size])).square().sum(dim=1).mean()
    return total / len(sizes)


def _looks(maps: Tensor) -> Tensor:
    return nn.functional.normalize(maps.square().mean(dim=1).flatten(1), dim=1)
