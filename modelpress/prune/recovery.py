"""Fine-tune after pruning, towards what the unpruned model answered and held in its blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from modelpress.config import TrainConfig
from modelpress.distill import (
    RECOVERY_LOSS,
    distillation_loss,
    frozen,
    hidden_loss,
    layer_list,
    recorded,
    without_dropout,
)
from modelpress.errors import WorkloadError
from modelpress.progress import Progress
from modelpress.prune.layers import last_filled
from modelpress.prune.outcome import nothing
from modelpress.reports import TrainReport
from modelpress.train import train_
from modelpress.workload import Batch, Workload


def recover_(
    module: nn.Module,
    unpruned: nn.Module,
    workload: Workload,
    config: TrainConfig,
    hidden_weight: float,
    hold: Callable[[], None],
    progress: Progress,
    kept_layers: Sequence[int] = (),
    trained: nn.Module | None = None,
) -> tuple[TrainReport, int]:
    """Train `module` on the unpruned model's outputs and hidden states, in place and without dropout.

    Args:
        module: the pruned model.
        unpruned: the teacher.
        workload: gives the training batches.
        config: the training.
        hidden_weight: of the hidden states' relative squared difference (their mean) beside the outputs' loss.
        hold: restores the zeros, after each update.
        progress: called once per update.
        kept_layers: the blocks that stayed, by their numbers before; none means all.
        trained: what runs `module` and is trained in its place, such as one that rounds its weights.

    Returns:
        How it went, and how many hidden states were matched: those of the blocks whose outputs kept their shape.

    Raises:
        StageError: see `train_`.
    """
    after = None if hold is nothing else hold
    with frozen(unpruned), without_dropout(module), contextlib.ExitStack() as stack:
        answers = distillation_loss(unpruned, workload, RECOVERY_LOSS)
        pairs = _matched_blocks(unpruned, module, workload, kept_layers) if hidden_weight else []
        if not pairs:
            return train_(trained or module, answers, workload, config, progress, after), 0
        taught = stack.enter_context(recorded([block for block, _ in pairs]))
        learned = stack.enter_context(recorded([block for _, block in pairs]))

        def loss(student: nn.Module, batch: Batch) -> Tensor:
            output = answers(student, batch)  # runs both models, and so fills both lists
            return output + hidden_weight * hidden_loss(
                taught, learned, batch.inputs.get("attention_mask"), relative=True
            )

        return train_(trained or module, loss, workload, config, progress, after), len(pairs)


def _matched_blocks(
    unpruned: nn.Module, module: nn.Module, workload: Workload, kept_layers: Sequence[int]
) -> list[tuple[nn.Module, nn.Module]]:
    """Blocks of both models that give a tensor of the same shape on an example.

    A block before a gap has to give what the last of the removed ones gave.
    """
    try:
        blocks = layer_list(unpruned)
    except WorkloadError:  # a model without blocks
        return []
    name = next(name for name, child in unpruned.named_modules() if child is blocks)
    last = last_filled(list(kept_layers or range(len(blocks))), len(blocks))
    pairs = list(zip([blocks[index] for index in last.values()], module.get_submodule(name).children(), strict=True))
    device = next(module.parameters()).device
    example = {name: tensor.to(device) for name, tensor in workload.example(2).items()}
    with torch.no_grad(), frozen(module), recorded([block for pair in pairs for block in pair]) as states:
        unpruned(**example)
        module(**example)
    shapes = zip(states[::2], states[1::2], strict=True)
    return [pair for pair, (a, b) in zip(pairs, shapes, strict=True) if a.shape == b.shape and a.numel()]
