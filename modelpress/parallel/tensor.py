"""Tensor parallelism: each rank has some heads of every attention and some neurons of every feed-forward part.

The way of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053), by DTensor: layers whose outputs are the structures are
cut by output rows ("column" parallel, as they write it), layers that read them by input columns ("row"), so that one
all-reduce in each direction pays for a pair. Which layers these are a model says itself (transformers' `tp_plan`), or
its trace does: what structured pruning may take out together is what ranks may share among them
(`modelpress.prune.dependencies`).
"""

from __future__ import annotations

import fnmatch
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from modelpress.errors import ConfigError, CoverageError
from modelpress.prune.dependencies import Group, find_groups

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Style = Literal["column", "row", "gathered", "summed"]
"""`column`: output rows are shared among the ranks; `row`: input columns are; `gathered`: output rows are, and the
outputs are put together again; `summed`: whole on each rank, and its gradients are the sum over the ranks, each of
which sees its own heads."""

TensorPlan = dict[str, Style]
"""By module name."""

DECLARED: dict[str, Style | None] = {
    "colwise": "column",
    "rowwise": "row",
    "colwise_gather_output": "gathered",
    "colwise_rep": "gathered",
    "replicated_with_grad_allreduce": "summed",
    "embedding_rowwise": None,
    "replicate": None,
}
"""transformers' words for the styles; None stays whole."""


def plan_tensors(module: nn.Module, ranks: int, example: Mapping[str, Tensor] | None = None) -> TensorPlan:
    """Which layers are cut, and how.

    Args:
        module: whole, in eval mode.
        ranks: how many share each layer.
        example: inputs of at least two samples, for models that declare no plan of their own; they are traced.

    Raises:
        ConfigError: heads, neurons or rows that the ranks do not divide, or a declared style that is not known; the
            layer is named.
        CoverageError: nothing can be cut.
        ExportError: the model cannot be traced.
    """
    if ranks < 1:
        raise ConfigError("planning tensor parallelism", found=f"{ranks} ranks", expected="at least one")
    plan = _declared(module)
    if plan:
        _check_declared(module, plan, ranks)
        return plan
    if example is not None:
        groups, refused = find_groups(module, dict(example))
        plan = _traced(module, groups, ranks)
        found = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    else:
        found = "no declared plan (tp_plan), and no example to trace it with"
    if not plan:
        raise CoverageError(
            f"planning tensor parallelism of {type(module).__name__}",
            found=found or "no linear layers that share heads or neurons",
            expected="at least one pair of linear layers",
            fix="split it by layers: modelpress.parallel.pipeline",
        )
    return plan


def parallelize_(module: nn.Module, mesh: DeviceMesh, plan: TensorPlan, *, from_local: bool = False) -> None:
    """Cut a module's layers over a mesh of one dimension, in place: its cut parameters become DTensors.

    Layers of the plan that the module does not have, as another stage has them, are left out.

    Args:
        module: the same on all ranks: rank 0's tensors are sent to the others.
        mesh: the dimension of the ranks that share layers.
        plan: what `plan_tensors` made for as many ranks.
        from_local: take each rank's own tensors without sending any: they are equal, or meta tensors.
    """
    styles: dict[str, ParallelStyle] = {}
    for name, style in plan.items():
        if style != "summed" and isinstance(_child(module, name), nn.Linear):
            styles[name] = _style(style)
    if not styles:
        return
    for readers in _siblings(styles).values():
        once = _Once(mesh, len(readers))  # its hooks come first: those of the styles then find a DTensor
        for name in readers:
            module.get_submodule(name).register_forward_pre_hook(once)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a name that is not found is a fault of ours
        parallelize_module(module, mesh, styles, src_data_rank=None if from_local else 0)


def axis_of(name: str, plan: TensorPlan) -> int | None:
    """The axis along which a parameter is cut, by its name in the model; None where each rank has all of it."""
    owner, _, kind = name.rpartition(".")
    style = plan.get(owner)
    if style in ("column", "gathered"):
        return 0
    return 1 if style == "row" and kind == "weight" else None


def slice_of(tensor: Tensor, axis: int, rank: int, ranks: int) -> Tensor:
    """A rank's share of a tensor, a view: the ranks divide the axis (see `plan_tensors`)."""
    size = tensor.shape[axis] // ranks
    return tensor.narrow(axis, rank * size, size)


def whole(tensor: Tensor) -> Tensor:
    """A parameter or a gradient as it is without the cut; all ranks of its mesh must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class _Once:
    """One replicated DTensor for all layers that read the same tensor: what they send back to it is added up here, and
    summed over the ranks once, and not layer by layer."""

    def __init__(self, mesh: DeviceMesh, readers: int) -> None:
        self._mesh, self._readers = mesh, readers
        self._left = 0
        self._given: Tensor | None = None
        self._shared: Tensor | None = None

    def __call__(self, _layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What a layer is given in place of its inputs; None: these."""
        given = inputs[0]
        if isinstance(given, DTensor):
            return None
        if self._given is not given:
            self._given, self._left = given, self._readers
            self._shared = DTensor.from_local(given, self._mesh, [Replicate()], run_check=False)
        shared, self._left = self._shared, self._left - 1
        if not self._left:
            self._given = self._shared = None  # no activation is kept for it
        return (shared, *inputs[1:])


def _siblings(styles: Mapping[str, ParallelStyle]) -> dict[str, list[str]]:
    """The layers cut by output rows, by the module that they stand in: most often they read the same."""
    found: dict[str, list[str]] = {}
    for name, style in styles.items():
        if isinstance(style, ColwiseParallel):
            found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def _style(style: Style) -> ParallelStyle:
    if style == "row":
        return RowwiseParallel()
    return ColwiseParallel(output_layouts=Replicate()) if style == "gathered" else ColwiseParallel()


def _child(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _declared(module: nn.Module) -> TensorPlan:
    """The plan of the outermost part of the model that has one, by names in the whole; empty where none has."""
    for prefix, child in module.named_modules():
        declared: Any = getattr(child, "_tp_plan", None)
        if isinstance(declared, dict) and declared:
            return _resolved(module, f"{prefix}." if prefix else "", declared)
    return {}


def _resolved(module: nn.Module, prefix: str, declared: Mapping[str, str]) -> TensorPlan:
    tied = _tied(module)
    plan: TensorPlan = {}
    for pattern, word in declared.items():
        if word not in DECLARED:
            raise ConfigError(
                f"reading the tensor-parallel plan of {type(module).__name__}",
                found=f"{pattern}: {word!r}",
                expected=f"one of {', '.join(DECLARED)}",
                fix="split it by layers: modelpress.parallel.pipeline",
            )
        style = DECLARED[word]
        if style is None:
            continue
        for name, child in module.named_modules():
            if not fnmatch.fnmatchcase(name, prefix + pattern):
                continue
            if style == "gathered" and id(getattr(child, "weight", None)) in tied:
                continue  # tied to the embedding, which stays whole
            plan[name] = style
    return plan


def _tied(module: nn.Module) -> set[int]:
    """Ids of the parameters that stand under more than one name."""
    counts = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in counts.items() if count > 1}


def _check_declared(module: nn.Module, plan: TensorPlan, ranks: int) -> None:
    for name, style in plan.items():
        layer = module.get_submodule(name)
        if style == "summed":
            continue
        if not isinstance(layer, nn.Linear):
            raise ConfigError(
                f"cutting {name} for {ranks} tensor-parallel ranks",
                found=type(layer).__name__,
                expected="a linear layer",
                fix="split it by layers: modelpress.parallel.pipeline",
            )
        size = layer.in_features if style == "row" else layer.out_features
        width = getattr(module.get_submodule(name.rpartition(".")[0]), "head_dim", 1) if style != "gathered" else 1
        _check_divisible(name, size // width, "rows" if width == 1 else "heads", ranks)


def _traced(module: nn.Module, groups: list[Group], ranks: int) -> TensorPlan:
    plan: TensorPlan = {}
    for group in groups:
        readers = [reader.name for reader in group.readers]
        layers = [module.get_submodule(name) for name in (*group.producers, *readers)]
        if group.followers or not all(isinstance(layer, nn.Linear) for layer in layers):
            continue
        if plan.keys() & {*group.producers, *readers}:
            continue  # a layer is cut one way: it stays with the group that comes first
        for name in group.producers:
            _check_divisible(name, group.size, group.kind, ranks)
        column: Style = "column"
        row: Style = "row"
        plan |= {**dict.fromkeys(group.producers, column), **dict.fromkeys(readers, row)}
    return plan


def _check_divisible(name: str, size: int, what: str, ranks: int) -> None:
    if size % ranks:
        raise ConfigError(
            f"cutting {name} for {ranks} tensor-parallel ranks",
            found=f"{size} {what}",
            expected=f"a multiple of {ranks}: each rank has as many as the others",
            fix="take a number of ranks that divides it, or split the model by layers",
        )
