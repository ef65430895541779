"""Quantization-aware fine-tuning: the module learns with its weights and activations rounded as int8 will round them.

The gradient passes through the rounding as if it were not there (Bengio et al. 2013, arXiv:1308.3432; Jacob et al.
2018, arXiv:1712.05877, section 3). The module that comes back is in float; quantizing it loses less.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modelpress.config import QuantizeConfig
from modelpress.distill import RECOVERY_LOSS, distillation_loss, frozen, without_dropout
from modelpress.errors import CoverageError, StageError
from modelpress.progress import Progress, silent
from modelpress.quantize.weights import LARGEST_CODE
from modelpress.reports import TrainReport
from modelpress.train import train_
from modelpress.workload import Workload

_BATCH = 32
_LEVELS = 255
_SMALLEST_SCALE = float(torch.finfo(torch.float32).tiny)

Range = tuple[Tensor, Tensor]
"""Least and largest value of an activation, 0 between them."""


def train_aware_(
    module: nn.Module, names: Sequence[str], workload: Workload, config: QuantizeConfig, progress: Progress = silent
) -> TrainReport:
    """Fine-tune `module` in place, on its own answers from before, with the named layers' weights and inputs rounded.

    Weights are rounded symmetrically, per output channel if `config.per_channel`; inputs to unsigned bytes, in ranges
    found on the calibration split (`static`) or in each batch (`dynamic`). Weights that are zero stay zero.

    Args:
        module: in eval mode.
        names: its linear and convolution layers that will be quantized; others are left out.
        workload: training and calibration data.
        config: `method`, `per_channel` and `recovery`.
        progress: called once per update.

    Raises:
        CoverageError: none of the names is a linear or convolution layer.
        StageError: an activation that is NaN or infinite, or a failed training.
    """
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if name in names and isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)
    }
    if not layers or config.recovery is None:
        raise CoverageError(
            "quantization-aware training",
            found=f"no linear or convolution layer among {', '.join(names) or 'nothing'}",
            expected="at least one, and a quantize.recovery",
            fix="widen quantize.targets, or leave quantize.recovery out",
        )
    teacher = copy.deepcopy(module)
    ranges = _observed(module, layers, workload) if config.method == "static" else {}
    zeros = {id(layer.weight): (layer.weight, layer.weight == 0) for layer in layers.values()}

    def hold() -> None:
        with torch.no_grad():
            for weight, mask in zeros.values():
                weight.masked_fill_(mask, 0.0)

    with frozen(teacher), without_dropout(module), _rounded_inputs(layers, ranges):
        loss = distillation_loss(teacher, workload, RECOVERY_LOSS)
        return train_(_Aware(module, layers, config.per_channel), loss, workload, config.recovery, progress, hold)


class _Aware(nn.Module):
    """A module that runs on the rounded weights of some of its layers."""

    def __init__(self, module: nn.Module, layers: Mapping[str, nn.Module], per_channel: bool) -> None:
        super().__init__()
        self.module, self.per_channel = module, per_channel
        first: dict[int, str] = {}
        for name, layer in layers.items():
            first.setdefault(id(layer.weight), f"{name}.weight")
        self.names = list(first.values())  # a weight that several layers share is rounded once

    def forward(self, **inputs: Tensor) -> Tensor:
        """What the module answers."""
        weights = {name: round_weight(self.module.get_parameter(name), self.per_channel) for name in self.names}
        return torch.as_tensor(functional_call(self.module, weights, kwargs=inputs, tie_weights=True))


def round_weight(weight: Tensor, per_channel: bool) -> Tensor:
    """The nearest of 255 levels, symmetric around 0, with one scale per index of the first axis or one in all."""
    with torch.no_grad():
        largest = weight.abs().flatten(1).amax(dim=1) if per_channel else weight.abs().amax()
        scale = (largest / LARGEST_CODE).clamp(min=_SMALLEST_SCALE)
    if per_channel:
        zero_points = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero_points, 0, -LARGEST_CODE, LARGEST_CODE)
    zero_point = torch.zeros((), dtype=torch.int32, device=weight.device)
    return torch.fake_quantize_per_tensor_affine(weight, scale, zero_point, -LARGEST_CODE, LARGEST_CODE)


def round_input(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The nearest of 256 levels between `low` and `high`, 0 among them."""
    scale = ((high - low) / _LEVELS).clamp(min=_SMALLEST_SCALE)
    zero_point = (-low / scale).round().clamp(0, _LEVELS).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(value, scale, zero_point, 0, _LEVELS)


def _range(value: Tensor) -> Range:
    zero = value.new_zeros(())
    return torch.minimum(value.detach().amin(), zero), torch.maximum(value.detach().amax(), zero)


def _observed(module: nn.Module, layers: Mapping[str, nn.Module], workload: Workload) -> dict[str, Range]:
    """Ranges of the layers' inputs on the calibration split.

    Raises:
        StageError: one is not finite.
    """
    ranges: dict[str, Range] = {}

    def observe(name: str, value: Tensor) -> Tensor:
        low, high = _range(value)
        known = ranges.get(name, (low, high))
        ranges[name] = torch.minimum(known[0], low), torch.maximum(known[1], high)
        return value

    with torch.no_grad(), _replaced_inputs(layers, observe):
        for batch in workload.batches("calibration", _BATCH):
            module(**batch.inputs)
    for name, (low, high) in ranges.items():
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise StageError(
                f"finding the range of the input of {name!r}",
                found=f"{float(low)} to {float(high)}",
                expected="finite activations on the calibration split",
                fix="look for NaN and infinity in the calibration data and in the weights",
            )
    return ranges


def _rounded_inputs(
    layers: Mapping[str, nn.Module], ranges: Mapping[str, Range]
) -> contextlib.AbstractContextManager[None]:
    return _replaced_inputs(layers, lambda name, value: round_input(value, *(ranges.get(name) or _range(value))))


@contextlib.contextmanager
def _replaced_inputs(layers: Mapping[str, nn.Module], replace: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """While open, each layer is given `replace(name, input)` for its input."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda _layer, given: (replace(name, given[0]), *given[1:])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
