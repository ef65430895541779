"""What a student may learn from inside the teacher: hidden states, feature maps, attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from modelpress.blocks import layer_list
from modelpress.config import DistillConfig
from modelpress.distill.hooks import recorded
from modelpress.distill.losses import attention_loss, feature_map_loss, hidden_loss
from modelpress.errors import StageError
from modelpress.workload import Workload

Maps = dict[tuple[int, int], Tensor]


@dataclass
class Matching:
    """What the hooks of `matched` see of the latest forward pass of teacher and student."""

    config: DistillConfig
    hidden: tuple[list[Tensor], list[Tensor]] | None = None
    maps: tuple[Maps, Maps] | None = None
    attention: tuple[list[Tensor], list[Tensor]] | None = None
    projections: nn.ModuleList = field(default_factory=nn.ModuleList)
    """From the student's width to the teacher's, learned with the student and then thrown away (TinyBERT, Jiao et al.
    2019, arXiv:1909.10351, equation 8)."""

    def loss(self, mask: Tensor | None) -> Tensor:
        """hidden_weight · (hidden states or feature maps) + attention_weight · (attention)."""
        total = torch.zeros(())
        if self.hidden is not None:
            taught, learned = self.hidden
            if len(self.projections):
                learned = [project(state) for project, state in zip(self.projections, learned, strict=True)]
            total = self.config.hidden_weight * hidden_loss(taught, learned, mask)
        if self.maps is not None:
            total = self.config.hidden_weight * feature_map_loss(*self.maps)
        if self.attention is not None:
            (taught_attention,), (learned_attention,) = self.attention
            total = total + self.config.attention_weight * attention_loss(taught_attention, learned_attention, mask)
        return total


@contextlib.contextmanager
def matched(
    teacher: nn.Module, student: nn.Module, workload: Workload, config: DistillConfig
) -> Iterator[Matching | None]:
    """Hooks on both models for what the config weighs; None where it weighs nothing.

    Layers of a list are matched by their hidden states: those that were kept, or evenly spread ones of the teacher.
    A model without one, a CNN, is matched by its last feature map of each size.

    Raises:
        StageError: nothing in the one that fits something in the other.
    """
    if not (config.hidden_weight or config.attention_weight):
        yield None
        return
    found = Matching(config)
    with contextlib.ExitStack() as stack:
        if config.hidden_weight and any(isinstance(child, nn.ModuleList) and len(child) for child in teacher.modules()):
            pairs = _layer_pairs(teacher, student, config)
            found.hidden = (
                stack.enter_context(recorded([taught for taught, _ in pairs])),
                stack.enter_context(recorded([learned for _, learned in pairs])),
            )
        elif config.hidden_weight:
            found.maps = stack.enter_context(_feature_maps(teacher)), stack.enter_context(_feature_maps(student))
        if config.attention_weight:
            found.attention = (
                stack.enter_context(_last_attention(teacher, workload)),
                stack.enter_context(_last_attention(student, workload)),
            )
        _fit(found, teacher, student, workload)
        yield found


def _layer_pairs(teacher: nn.Module, student: nn.Module, config: DistillConfig) -> list[tuple[nn.Module, nn.Module]]:
    """Each layer of the student with the teacher's that it learns from; the last with the last."""
    taught, learned = list(layer_list(teacher)), list(layer_list(student))
    kept = config.keep_layers or [round((index + 1) * len(taught) / len(learned)) - 1 for index in range(len(learned))]
    return [(taught[index], layer) for index, layer in zip(kept, learned, strict=True)]


def _fit(found: Matching, teacher: nn.Module, student: nn.Module, workload: Workload) -> None:
    """Run both once, compare what the hooks saw, and make the projections that are needed."""
    example = workload.example(2)
    with torch.no_grad():
        for module in (teacher, student):
            device = next(module.parameters()).device
            mode = module.training
            module.eval()(**{name: tensor.to(device) for name, tensor in example.items()})
            module.train(mode)
    if found.maps is not None and not found.maps[0].keys() & found.maps[1].keys():
        raise StageError(
            "matching feature maps",
            found=f"sizes {sorted(found.maps[1])} in the student, {sorted(found.maps[0])} in the teacher",
            expected="a height and width that both have",
            fix="set distill.hidden_weight to 0, or give the student the teacher's strides",
        )
    if found.attention is not None and found.attention[0][0].shape != found.attention[1][0].shape:
        raise StageError(
            "matching the last layer's attention",
            found=f"{found.attention[1][0].shape[1]} heads, the teacher has {found.attention[0][0].shape[1]}",
            expected="as many heads in the student's last layer",
            fix="keep the number of heads in distill.architecture, or set distill.attention_weight to 0",
        )
    if found.hidden is not None:
        widths = [(learned.shape[-1], taught.shape[-1]) for taught, learned in zip(*found.hidden, strict=True)]
        if any(own != wanted for own, wanted in widths):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(found.config.train.seed)
                device = next(student.parameters()).device
                found.projections.extend(nn.Linear(own, wanted, bias=False).to(device) for own, wanted in widths)


@contextlib.contextmanager
def _feature_maps(module: nn.Module) -> Iterator[Maps]:
    """The last output of each size, (batch, channels, height, width), of the modules without children."""
    maps: Maps = {}

    def keep(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] * output.shape[3] > 1:
            maps[output.shape[2], output.shape[3]] = output

    handles = [child.register_forward_hook(keep) for child in module.modules() if not any(child.children())]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _last_attention(module: nn.Module, workload: Workload) -> Iterator[list[Tensor]]:
    """A list that holds the last self-attention's distributions, (batch, heads, length, length)."""
    seen: list[nn.Module] = []

    def look(child: nn.Module, _inputs: object, output: object) -> None:
        if _distributions(output) is not None and not any(one in seen for one in child.modules()):
            seen.append(child)

    handles = [child.register_forward_hook(look) for child in module.modules()]
    device = next(module.parameters()).device
    try:
        with torch.no_grad():
            module(**{name: tensor.to(device) for name, tensor in workload.example(2).items()})
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise StageError(
            f"looking for the attention of {type(module).__name__}",
            found="no module that returns its attention weights",
            expected="eager attention: a module whose second output is (batch, heads, length, length)",
            fix="set distill.attention_weight to 0",
        )
    states: list[Tensor] = [torch.empty(0)]

    def keep(_module: nn.Module, _inputs: object, output: object) -> None:
        found = _distributions(output)
        assert found is not None
        states[0] = found

    handle = seen[-1].register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()


def _distributions(output: object) -> Tensor | None:
    if isinstance(output, tuple) and len(output) > 1:
        weights = output[1]
        if isinstance(weights, Tensor) and weights.dim() == 4 and weights.shape[2] == weights.shape[3]:
            return weights
    return None
