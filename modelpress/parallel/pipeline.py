"""A model as stages of a pipeline, one process each, by `torch.distributed.pipelining`.

A stage is the model itself: its own forward pass, in which the blocks and ends that other stages have are missing.
What it got from the stage before takes the place of its first block's input, and the pass ends with its last block. So
masks, positions and whatever else a model makes of its inputs are made where they are needed, and nothing but the
hidden state crosses from process to process. No model needs to be rewritten; what cannot be cut so is refused by
`prove`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelpress.blocks import sketch
from modelpress.errors import ConfigError, StageError
from modelpress.parallel.outline import Outline
from modelpress.survey import first_output


class Stage(nn.Module):
    """One part of a model: the names of its parameters are those of the whole model.

    The first stage takes the model's inputs, by position in the order of `names` or by name; any other one the hidden
    state as its one positional argument, and the model's inputs by name. All but the last give the hidden state.

    Args:
        module: the whole model; its tensors are shared with it, and it is not changed.
        outlined: its outline.
        bounds: of the parts, see `partition.Partition`.
        index: which part this is.
        names: the model's inputs.

    Raises:
        ConfigError: no such part.
    """

    def __init__(
        self, module: nn.Module, outlined: Outline, bounds: Sequence[int], index: int, names: Sequence[str]
    ) -> None:
        super().__init__()
        bounds = tuple(bounds)
        blocks = len(outlined.blocks)
        legal = bounds[:1] == (0,) and bounds[-1:] == (blocks,) and list(bounds) == sorted(set(bounds))
        if not (legal and 0 <= index < len(bounds) - 1):
            raise ConfigError(
                f"cutting part {index} of {type(module).__name__}",
                found=f"bounds {list(bounds)} of {blocks} blocks",
                expected=f"ascending bounds from 0 to {blocks}, and a part of them",
            )
        self.body = sketch(module)
        self.names = tuple(names)
        self.is_first, self.is_last = index == 0, index == len(bounds) - 2
        self._slot = outlined.slot
        self._received: Tensor | None = None
        self._asked = False
        for name in outlined.foreign(bounds, index):
            gone = self.body.get_submodule(name)
            if name in outlined.blocks:
                self.body.set_submodule(name, _Passing(outlined.slot, outlined.gives), strict=True)
            else:
                self.body.set_submodule(name, _blank(gone, outlined.shapes.get(name)), strict=True)
        entry = self.body.get_submodule(outlined.blocks[bounds[index]])
        entry.register_forward_pre_hook(self._enter, with_kwargs=True)
        if not self.is_last:
            self.body.get_submodule(outlined.blocks[bounds[index + 1] - 1]).register_forward_hook(_leave)

    def forward(self, *args: Tensor, **inputs: Tensor) -> Tensor:
        """Hidden state, or what the model gives."""
        if self.is_first:
            inputs = dict(zip(self.names, args, strict=False)) | inputs
        else:
            (self._received,) = args
        try:
            output = self.body(**inputs)
        except _LeftError as left:
            return left.hidden.contiguous()  # as it is sent
        finally:
            self._received = None
        if not self.is_last or not isinstance(output, Tensor):
            raise StageError(
                f"running a part of {type(self.body).__name__}",
                found=f"an output of type {type(output).__name__}" if self.is_last else "a pass that missed its block",
                expected="one tensor",
                fix="wrap the model in a module that returns its logits or embeddings alone",
            )
        return output

    def hidden(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """A hidden state of the shape and dtype that these inputs lead to; what it holds is of no meaning."""
        self._asked = True
        try:
            with torch.no_grad():
                self.body(**inputs)
        except _LeftError as left:
            return left.hidden
        finally:
            self._asked = False
        raise StageError(f"running a part of {type(self.body).__name__}", found="a pass that missed its first block")

    def _enter(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if self._asked:
            raise _LeftError(args[self._slot] if isinstance(self._slot, int) else kwargs[self._slot])
        if self.is_first:
            return None
        if isinstance(self._slot, int):
            return (*args[: self._slot], self._received, *args[self._slot + 1 :]), kwargs
        return args, kwargs | {self._slot: self._received}


def prove(module: nn.Module, outlined: Outline, bounds: Sequence[int], inputs: Mapping[str, Tensor]) -> None:
    """Run all stages one after the other in this process: together they must answer what the model answers, bit by bit.

    Args:
        module: whole, with its weights.
        outlined: its outline.
        bounds: of the parts.
        inputs: an example.

    Raises:
        StageError: they do not, or a stage does not run.
    """
    doing = f"comparing {len(bounds) - 1} stages of {type(module).__name__} with the whole model"
    fix = "split it elsewhere, or into fewer parts; a model whose ends share more than the hidden state cannot be cut"
    with torch.no_grad():
        expected = module(**inputs)
        found: Tensor | None = None
        for index in range(len(bounds) - 1):
            stage = Stage(module, outlined, bounds, index, list(inputs))
            try:
                found = stage(**inputs) if found is None else stage(found, **inputs)
            except (RuntimeError, AttributeError, TypeError, ValueError, IndexError) as error:
                found_text = f"stage {index}: {type(error).__name__}: {str(error).splitlines()[0]}"
                raise StageError(doing, found=found_text, expected="stages that run", fix=fix) from error
    if found is None or not torch.equal(found, first_output(expected)):
        raise StageError(doing, found="another answer", expected="the same bits", fix=fix)


class _LeftError(Exception):
    """Ends a forward pass behind the last block of a stage."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _leave(_block: nn.Module, _args: object, output: Any) -> None:
    raise _LeftError(first_output(output))


class _Passing(nn.Module):
    """Stands for a block of another stage: what it takes is what it gives."""

    def __init__(self, slot: int | str, gives: int | None) -> None:
        super().__init__()
        self._slot, self._gives = slot, gives

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden state, whatever it holds here, in the form in which blocks give it."""
        hidden = args[self._slot] if isinstance(self._slot, int) else kwargs[self._slot]
        return hidden if self._gives is None else (hidden, *[None] * (self._gives - 1))


class _Blank(nn.Module):
    """Stands for a module of another stage in front of the blocks: zeros of its output's shape, which nobody reads."""

    def __init__(self, shape: tuple[int, ...] | None, dtype: torch.dtype, width: int | None) -> None:
        super().__init__()
        self._shape, self._dtype, self._width = shape, dtype, width

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros; a float input is given on where it has the shape."""
        first = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(first, Tensor):
            return torch.zeros(self._shape or (), dtype=self._dtype)
        if self._width is not None:  # an embedding
            return torch.zeros((*first.shape, self._width), dtype=self._dtype, device=first.device)
        free = 2 if first.ndim == 3 else 1  # (batch, length, width): of any length
        if self._shape is None or (first.is_floating_point() and first.shape[free:] == self._shape[free:]):
            return first
        return torch.zeros((len(first), *self._shape[1:]), dtype=self._dtype, device=first.device)


def _blank(gone: nn.Module, shape: tuple[int, ...] | None) -> nn.Module:
    dtype = next(gone.parameters()).dtype
    return _Blank(shape, dtype, gone.embedding_dim if isinstance(gone, nn.Embedding) else None)
