"""Structured pruning: channels, neurons and heads disappear from every tensor that holds them; or whole layers do."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from modelpress.checkpoint import sync_sizes
from modelpress.config import PruneConfig
from modelpress.errors import ConfigError, CoverageError, StageError
from modelpress.moments import Moments, flat_weight
from modelpress.progress import Progress
from modelpress.prune.dependencies import Group, find_groups
from modelpress.prune.importance import magnitudes, taylor
from modelpress.prune.layers import prune_layers_
from modelpress.prune.masks import Masks
from modelpress.prune.outcome import Outcome
from modelpress.prune.proof import unequal
from modelpress.prune.repair import collect, damped, plain_costs, repaired_costs, without
from modelpress.prune.select import matches, select
from modelpress.reports import TensorChange
from modelpress.residence import IN_MEMORY, Residence
from modelpress.workload import Workload

TRACE_BATCH = 3
"""Samples of the traced example: a size that a model's own sizes are seldom equal to."""

ROUNDS = 4
"""Structures of a layer are removed in this many rounds, their costs computed anew before each."""


@dataclass(frozen=True)
class _Reading:
    """A reading layer's weights, the bias as last column where it has one, and H and H⁻¹ of its inputs; float64."""

    layer: nn.Module
    block: int
    weight: Tensor
    moments: Tensor
    inverse: Tensor


def prune_structured_(
    module: nn.Module,
    workload: Workload,
    config: PruneConfig,
    progress: Progress,
    held: Masks,  # noqa: ARG001
    residence: Residence = IN_MEMORY,  # noqa: ARG001 - `prune_` lets no other through
) -> Outcome:
    """Remove round(sparsity · n) of the n structures of each chosen group, in place; the module is left in eval mode.

    The cost of a structure is `config.importance`: by `activation` what its loss changes in the outputs of the layers
    that read it, on calibration data. With `repair` these layers' other weights make up for it (see
    `modelpress.prune.repair`); without, they stay. For whole layers see `modelpress.prune.layers`.

    Raises:
        ConfigError, CoverageError, StageError, ExportError: see `prune_`.
    """
    if "layers" in config.structures:
        return prune_layers_(module, workload, config, progress)
    module.eval()
    with torch.no_grad():
        groups, refused = find_groups(module, workload.example(TRACE_BATCH))
        eligible = [group for group in groups if group.kind in config.structures]
        chosen = _choose(eligible, refused, config)
        readers = list(dict.fromkeys(reader.name for group in chosen for reader in group.readers))
        judged = config.repair or config.importance == "activation"
        moments = collect(module, readers, workload, progress) if judged else {}
        worth = _worth(module, chosen, workload, config, progress)
        before = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
        keeps: list[list[int]] = []
        for index, group in enumerate(chosen):
            progress(index, len(chosen), f"removing {group.kind} of {group.producers[0]}")
            keeps.append(_decide_and_mask(module, group, moments, worth[index], config))
        example = workload.example(TRACE_BATCH)
        masked = module(**example)
        for group, keep in zip(chosen, keeps, strict=True):
            _shrink(module, group, keep)
        _check_equal(module, example, masked)
    kept = {f"{name}.weight": keep for group, keep in zip(chosen, keeps, strict=True) for name in group.producers}
    return _outcome(module, before, kept, eligible)


def _choose(eligible: list[Group], refused: dict[str, str], config: PruneConfig) -> list[Group]:
    """Groups that the config means and that lose something.

    Raises:
        ConfigError: a pattern matches nothing, with the reason where it names a layer that cannot be pruned.
        CoverageError: no group at all, or one that would become empty.
    """
    names = [name for group in eligible for name in group.producers]
    if not names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:5])
        raise CoverageError(
            f"looking for {', '.join(config.structures)} to prune",
            found=f"none that can be removed ({reasons or 'no linear or convolution layer'})",
            expected="a layer whose output only other layers read",
            fix="name other prune.structures, or use prune.method 'magnitude'",
        )
    for pattern in config.targets:
        known = [name for name in refused if matches(name, pattern)]
        if known and not any(matches(name, pattern) for name in names):
            raise ConfigError(
                "choosing modules by prune.targets",
                found=f"{pattern!r}: {known[0]} cannot lose {' or '.join(config.structures)}: {refused[known[0]]}",
                expected=f"some of {', '.join(names[:10])}",
            )
    wanted = select(names, config.targets, [])
    ignored = set(names) - set(select(names, [], config.ignore))
    chosen = [g for g in eligible if any(n in wanted for n in g.producers) and not ignored & set(g.producers)]
    for group in chosen:
        if group.size - _count(group, config) < 1:
            raise CoverageError(
                f"pruning {group.producers[0]}",
                found=f"all {group.size} {group.kind} would go at sparsity {config.sparsity:g}",
                expected="at least one left",
                fix="lower prune.sparsity or name the module in prune.ignore",
            )
    return [group for group in chosen if _count(group, config)]


def _count(group: Group, config: PruneConfig) -> int:
    return round(config.sparsity * group.size)


def _worth(
    module: nn.Module, groups: list[Group], workload: Workload, config: PruneConfig, progress: Progress
) -> list[Tensor | None]:
    """What each group's structures are worth by themselves; None where it follows from what reads them."""
    if config.importance == "magnitude":
        return list(magnitudes(module, groups))
    return list(taylor(module, groups, workload, progress)) if config.importance == "taylor" else [None] * len(groups)


def _decide_and_mask(
    module: nn.Module, group: Group, moments: dict[str, Moments], worth: Tensor | None, config: PruneConfig
) -> list[int]:
    """Indices of the structures that stay. The readers' columns of the others become zero, and the rest is repaired
    if the config says so."""
    readings = [
        _reading(module.get_submodule(reader.name), reader.block, moments[reader.name])
        for reader in group.readers
        if moments
    ]
    alive = torch.ones(group.size, dtype=torch.bool)
    count = _count(group, config)
    rounds = ROUNDS if worth is None else 1
    for step in range(1, rounds + 1):
        goal = round(step / rounds * count)
        batch = goal - int((~alive).sum())
        if not batch:
            continue
        costs = torch.full((group.size,), torch.inf, dtype=torch.float64)
        found = sum(_costs(reading, alive, config.repair) for reading in readings) if worth is None else worth[alive]
        costs[alive] = torch.as_tensor(found)
        if not torch.isfinite(costs[alive]).all():
            raise StageError(
                f"pruning {group.producers[0]}", found="costs that are NaN or infinite", expected="finite weights"
            )
        removed = torch.argsort(costs, stable=True)[:batch]
        alive[removed] = False
        if config.repair:
            readings = [_remove(reading, removed) for reading in readings]
    if config.repair:
        for reading in readings:
            _store(reading)
    gone = (~alive).nonzero().flatten()
    for reader in group.readers:
        _mask(module.get_submodule(reader.name), _features(gone, reader.block))
    return alive.nonzero().flatten().tolist()


def _reading(layer: nn.Module, block: int, moments: Moments) -> _Reading:
    """`block` counts input channels; a convolution sees each through its whole kernel."""
    weight = flat_weight(layer).double()
    h = damped(moments)
    kernel = weight.shape[1] // torch.as_tensor(layer.weight).shape[1]
    if layer.bias is None:  # nothing can take up the mean
        h = h[:-1, :-1]
    else:
        weight = torch.cat([weight, torch.as_tensor(layer.bias).detach().double()[:, None]], dim=1)
    return _Reading(layer, block * kernel, weight, h, torch.linalg.inv(h))


def _features(structures: Tensor, block: int) -> Tensor:
    return (structures[:, None] * block + torch.arange(block)).flatten()


def _costs(reading: _Reading, alive: Tensor, repair: bool) -> Tensor:
    features = _features(alive.nonzero().flatten(), reading.block)
    weight = reading.weight[:, features]
    if repair:
        return repaired_costs(weight, reading.inverse[features][:, features], reading.block)
    return plain_costs(weight, reading.moments[features][:, features], reading.block)


def _remove(reading: _Reading, structures: Tensor) -> _Reading:
    weight, inverse = without(reading.weight, reading.inverse, _features(structures, reading.block))
    return replace(reading, weight=weight, inverse=inverse)


def _store(reading: _Reading) -> None:
    weight, bias = torch.as_tensor(reading.layer.weight), reading.layer.bias
    columns = weight[0].numel()
    weight.copy_(reading.weight[:, :columns].view_as(weight))
    if isinstance(bias, Tensor):
        bias.copy_(reading.weight[:, columns])


def _mask(layer: nn.Module, inputs: Tensor) -> None:
    """Zeros in the columns of these inputs (of a convolution: channels)."""
    torch.as_tensor(layer.weight).index_fill_(1, inputs, 0.0)


def _shrink(module: nn.Module, group: Group, keep: list[int]) -> None:
    """Take the rows and columns of all but the kept structures out of every layer of the group."""
    structures = torch.tensor(keep)
    rows = _features(structures, group.width)
    for name in group.producers:
        _take(module.get_submodule(name), rows, axis=0)
    for name in group.followers:
        _take(module.get_submodule(name), structures, axis=0)
    for reader in group.readers:
        _take(module.get_submodule(reader.name), _features(structures, reader.block), axis=1)


def _check_equal(module: nn.Module, example: dict[str, Tensor], masked: Tensor) -> None:
    """Prove that removing was the same as masking.

    Raises:
        StageError: it was not: the module's forward pass holds a size of its own, such as a number of heads.
    """
    found = unequal(module, example, masked)
    if found:
        raise StageError(
            "comparing the pruned model with the masked one",
            found=found,
            expected="equal outputs: a forward pass that takes its sizes from the shapes",
            fix="leave the structure out of prune.structures (most often: heads), or name its layers in prune.ignore",
        )


def _take(layer: nn.Module, index: Tensor, axis: int) -> None:
    """Keep these rows (axis 0) of all the layer's tensors, or these columns (axis 1) of its weight."""
    for key, parameter in list(layer.named_parameters(recurse=False)):
        if parameter.dim() > axis:
            smaller = parameter.detach().index_select(axis, index).contiguous()
            setattr(layer, key, nn.Parameter(smaller, requires_grad=parameter.requires_grad))
    for key, buffer in list(layer.named_buffers(recurse=False)):
        if buffer.dim() > axis:
            setattr(layer, key, buffer.index_select(axis, index).contiguous())
    sync_sizes(layer)


def _outcome(
    module: nn.Module, before: dict[str, list[int]], kept: dict[str, list[int]], eligible: list[Group]
) -> Outcome:
    after = module.state_dict()
    layers = {name for g in eligible for name in [*g.producers, *g.followers, *(reader.name for reader in g.readers)]}
    changes = [
        TensorChange(
            name=name,
            before=before[name],
            after=list(tensor.shape),
            zeros=int((tensor == 0).sum()),
            kept=kept.get(name),
        )
        for name, tensor in after.items()
        if list(tensor.shape) != before[name]
    ]
    sizes = {name: torch.Size(shape).numel() for name, shape in before.items()}
    return Outcome(
        eligible_parameters=sum(size for name, size in sizes.items() if name.rpartition(".")[0] in layers),
        touched_parameters=sum(sizes[change.name] for change in changes),
        tensors=changes,
    )
