"""A torch module by its parts: hooks time each module, and one counted run gives operations and bytes.

A part's time, operations and bytes are its own: those of modules inside of it are theirs. What a module computes
beside its children, such as the products of attention, stands under the module itself.

Operations of products, convolutions and attention are those of `torch.utils.flop_counter`; other operators count
as in `modelpress.profile.counts`.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from modelpress.profile.counts import attention_flops
from modelpress.profile.ran import Operator, Ran, typical
from modelpress.profile.turns import Turns, take_turns

MAX_TIMES = 1_000_000
"""Of all modules in all watched runs."""
_ADDED_SECONDS = 5e-6
"""What hooks are taken to add to a module's time until it has been measured."""
_CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
"""Not in torch's own table of formulas."""
_PER_ELEMENT = {
    "_softmax": 5,
    "_log_softmax": 5,
    "native_layer_norm": 8,
    "native_batch_norm": 2,
    "_native_batch_norm_legit_no_training": 2,
    "gelu": 5,
    "silu": 2,
}
_PER_INPUT = {"sum", "mean", "amax", "amin", "max", "min", "argmax", "var", "cumsum", "norm", "linalg_vector_norm"}
_NOTHING = {
    *("embedding", "index", "index_select", "gather", "cat", "stack", "copy_", "_to_copy", "clone", "arange", "full"),
    *("constant_pad_nd", "zeros", "ones", "empty", "scalar_tensor", "index_put_", "_unsafe_index", "fill_", "zero_"),
    *("lift_fresh", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "tril", "triu"),
    *("repeat", "flip", "roll", "scatter", "_local_scalar_dense", "eye", "empty_like", "new_empty"),
}


@dataclass
class Part:
    """What one module does itself in one run."""

    flops: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    uncounted: set[str] = field(default_factory=set)
    """Operators without a formula."""


def run_watched(module: nn.Module, inputs: Mapping[str, Tensor], seconds: float) -> Ran:
    """Run a module, in eval mode and on the CPU, for about `seconds`, some runs with hooks on, others without.

    Args:
        module: takes `inputs` as keyword arguments.
        inputs: of one run.
        seconds: time for all runs together.
    """
    with torch.inference_mode():
        parts, most_alive = count(module, inputs)
        turns, own = _take_turns(module, inputs, seconds)
    named = dict(module.named_modules())
    operators = [_operator(name, named[name], parts[name], own[name]) for name in own if name in parts]
    return Ran(operators, typical(turns.plain), typical(turns.watched), most_alive, turns.watched_share)


def count(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Part], int]:
    """Operations and bytes of each module's own operators in one run, and the most bytes of values alive at once.

    Names are those of `named_modules`; the whole module's is empty.
    """
    counter = _Counter(module)
    with ExitStack() as stack:
        for name, one in module.named_modules():
            stack.enter_context(_hooked(one, functools.partial(counter.enter, name), counter.leave))
        stack.enter_context(counter)
        module(**inputs)
    return counter.parts, counter.most_alive


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts each operator for the innermost module that runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts: dict[str, Part] = {}
        self.most_alive = 0
        self._inside = [""]
        self._alive = 0
        self._known: set[int] = {
            tensor.untyped_storage()._cdata for tensor in [*module.parameters(), *module.buffers()]
        }

    def enter(self, name: str) -> None:
        """A module begins."""
        self._inside.append(name)

    def leave(self) -> None:
        """It ends."""
        self._inside.pop()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry:
            with self:  # in inference mode, operators come whole: linear as linear, attention as one
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        made = func(*args, **kwargs)
        part = self.parts.setdefault(self._inside[-1], Part())
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        self._note_alive(read + written)
        if not func.is_view:
            part.read_bytes += sum(one.numel() * one.element_size() for one in read)
            part.written_bytes += sum(one.numel() * one.element_size() for one in written)
            self._count(part, func, args, kwargs, made, read, written)
        return made

    def _count(
        self, part: Part, func: Any, args: Any, kwargs: Any, made: Any, read: list[Tensor], written: list[Tensor]
    ) -> None:
        packet = func._overloadpacket
        name = packet.__name__
        if packet in flop_registry:
            part.flops += int(flop_registry[packet](*args, **kwargs, out_val=made))
        elif name == _CPU_ATTENTION:
            (batch, heads, queries, width), keys, values = read[0].shape, read[1].shape[2], read[2].shape[3]
            part.flops += attention_flops(batch, queries, keys, heads * width, heads * values)
        elif name in _PER_ELEMENT and written:
            part.flops += _PER_ELEMENT[name] * written[0].numel()
        elif torch.Tag.pointwise in func.tags:
            part.flops += sum(one.numel() for one in written)
        elif read and (name in _PER_INPUT or "pool" in name):
            part.flops += read[0].numel()
        elif name not in _NOTHING:
            part.uncounted.add(name)

    def _note_alive(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._alive += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes()).atexit = False
        self.most_alive = max(self.most_alive, self._alive)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._alive -= size


class _Clock:
    """Times of modules, each without that of the modules inside of it."""

    def __init__(self) -> None:
        self.runs: list[dict[str, float]] = []
        """Seconds of each run by module, in the order in which modules ended first."""
        self._run: dict[str, float] = {}
        self._open: list[tuple[float, float]] = []

    def enter(self) -> None:
        """A module begins."""
        self._open.append((time.perf_counter(), 0.0))

    def leave(self, name: str) -> None:
        """It ends."""
        began, inner = self._open.pop()
        taken = time.perf_counter() - began
        self._run[name] = self._run.get(name, 0.0) + taken - inner
        if self._open:
            outer, so_far = self._open[-1]
            self._open[-1] = (outer, so_far + taken)

    def end_run(self) -> None:
        """A run is over."""
        self.runs.append(self._run)
        self._run = {}


def _take_turns(
    module: nn.Module, inputs: Mapping[str, Tensor], seconds: float
) -> tuple[Turns, dict[str, list[float]]]:
    """Times of whole runs without and with hooks, and in the latter of each module, in seconds."""
    clock = _Clock()
    named = dict(module.named_modules())

    @contextmanager
    def watching() -> Iterator[None]:
        with ExitStack() as stack:
            for name, one in named.items():
                stack.enter_context(_hooked(one, clock.enter, functools.partial(clock.leave, name)))
            yield

    def watched() -> None:
        module(**inputs)
        clock.end_run()

    turns = take_turns(
        lambda: module(**inputs),
        watched,
        seconds,
        added_seconds=_ADDED_SECONDS * len(named),
        most=MAX_TIMES // len(named),
        watching=watching,
    )
    own: dict[str, list[float]] = {}
    for run, kept in zip(clock.runs, turns.kept, strict=True):
        for name, taken in run.items() if kept else ():
            own.setdefault(name, []).append(taken)
    return turns, own


@contextmanager
def _hooked(module: nn.Module, before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    """Call these before and after each call of a module while this is open."""
    handles = [
        module.register_forward_pre_hook(lambda *_: before()),
        module.register_forward_hook(lambda *_: after(), always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _operator(name: str, module: nn.Module, part: Part, seconds: list[float]) -> Operator:
    weights = dict(module.named_parameters(name, recurse=False)) | dict(module.named_buffers(name, recurse=False))
    return Operator(
        name=name or "(model)",
        op_type=type(module).__name__,
        dtype=_computes_in(weights),
        weights=list(weights),
        weight_bytes=sum(one.numel() * one.element_size() for one in weights.values()),
        flops=None if part.uncounted else part.flops,
        read_bytes=part.read_bytes,
        written_bytes=part.written_bytes,
        seconds=typical(seconds),
    )


def _computes_in(weights: Mapping[str, Tensor]) -> str:
    floats = [str(one.dtype).removeprefix("torch.") for one in weights.values() if one.is_floating_point()]
    return floats[0] if floats else "float32"
