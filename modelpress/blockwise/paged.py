"""A module of which only what is at work is in memory: a block, or a layer outside the blocks.

Its parameters are meta tensors. Where a block is called, or is held, they are read from the source folder, or from what
has been written since; after that they are meta tensors again. Everything that runs the module goes on as it would in
memory, and computes the same numbers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modelpress.blockwise.tensors import Stored, open_file, open_folder
from modelpress.errors import StageError, WorkloadError
from modelpress.hf_writer import FolderWriter
from modelpress.residence import Residence, blocks_of
from modelpress.store.local import local_errors

_HARMLESS = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}
"""Operations on tensors without memory that read nothing of them."""

Packed = tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Tensor]]
"""Tensors that stand for a weight in the folder, by name, and how they give the weight, float32, back."""


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules that are built while this is open have meta tensors for parameters, and real buffers.

    Buffers that are in no file, such as a decoder's rotary frequencies, are computed as ever.
    """

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # also one that is shared: it stays the same object
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    register: Any = register_module_parameter_registration_hook
    handle = register(to_meta)
    try:
        yield
    finally:
        handle.remove()


class _WatchedReads(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Refuses operations on tensors without memory: some of torch's kernels compute with them, and give anything."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _HARMLESS:
            for one in tree_leaves((args, kwargs or {})):
                if isinstance(one, Tensor) and one.is_meta:
                    raise RuntimeError(f"{func} of a meta tensor of shape {list(one.shape)}")
        return func(*args, **(kwargs or {}))


class Paged(Residence):
    """The residence of a module whose weights are in a folder.

    Args:
        module: built under `without_memory`.
        folder: Hugging Face folder.
        prefix: what the module's names have before the folder's.
        writer: takes what `held` blocks and layers become; the rest follows with `write_rest`.
        scratch_on_disk: whether `kept` puts them into files in the writer's folder.

    Raises:
        WorkloadError: a module without blocks, or the folder's tensors are not the module's.
        CorruptionError: a file is damaged or cut short.
    """

    at_once = False

    def __init__(
        self, module: nn.Module, folder: Path, prefix: str, writer: FolderWriter, *, scratch_on_disk: bool = False
    ) -> None:
        self.on_disk = scratch_on_disk
        self.module, self.folder, self.prefix, self.writer = module.eval(), folder, prefix, writer
        self.source = open_folder(folder)
        self.blocks = blocks_of(module)
        if not self.blocks:
            raise WorkloadError(
                f"taking {folder} block by block",
                found="a model without a list of blocks (torch.nn.ModuleList)",
                expected="a transformer",
                fix="use the line (modelpress run): it holds the whole model in memory",
            )
        self.names = self._match(prefix)
        """Each parameter's name in the folder."""
        self.live_bytes = self.most_live_bytes = 0
        """Bytes of the parameters in memory, now and at most."""
        self._written: dict[str, dict[str, Stored]] = {}
        self._packed: dict[str, Packed] = {}
        self._users: dict[nn.Parameter, int] = {}
        self._entered: dict[nn.Module, list[nn.Parameter]] = {}
        self._seen: set[str] = set()
        self._handles: list[Any] = []
        inside = {child for block in self.blocks for child in block.modules()}
        outside = [child for child in module.modules() if child not in inside and _own(child, recurse=False)]
        self.parts = [*self.blocks, *outside]
        self._watch: Any = None
        self._handles.append(module.register_forward_pre_hook(self._begin, prepend=True))
        self._handles.append(module.register_forward_hook(self._end, always_call=True))
        for part in self.parts:
            recurse = part in self.blocks
            self._handles.append(part.register_forward_pre_hook(self._entering(recurse), prepend=True))
            self._handles.append(part.register_forward_hook(self._left, always_call=True))

    def close(self) -> None:
        """Let the module go: while its hooks name this object and this object names it, the files stay mapped."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def held(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """See `Residence`; what was not written before is written at the end."""
        with self._holding(list(dict.fromkeys(one for module in modules for one in _own(module)))):
            yield

    def settle_(self, layer: nn.Module) -> None:
        """Round a changed weight to the dtype that it is stored in.

        Raises:
            StageError: it is NaN or infinite then.
        """
        weight = layer.get_parameter("weight")
        name = self.names[weight]
        weight.copy_(weight.to(self.source[name].dtype))
        if not torch.isfinite(weight).all():
            raise StageError(
                f"changing {name}",
                found=f"values that {self.source[name].entry.dtype} does not hold, or NaN",
                expected="finite weights",
                fix="name the layer in `ignore`",
            )

    def kept(self, scratch: Tensor) -> Tensor:
        """See `Residence`. A file without a name is gone with the tensor that is mapped from it.

        Raises:
            StoreFullError: the disk is full.
        """
        if not self.on_disk or not scratch.numel():
            return scratch
        path = self.writer.folder / "scratch"
        with local_errors(f"writing {path}", writing=True):
            if hasattr(os, "posix_fallocate"):
                with path.open("wb") as file:  # a page that finds no room when it is written ends the process (SIGBUS)
                    os.posix_fallocate(file.fileno(), 0, scratch.nbytes)
            mapped = torch.from_file(str(path), shared=True, size=scratch.numel(), dtype=scratch.dtype)
            path.unlink()
        return mapped.view_as(scratch).copy_(scratch)

    def pack(self, weight: nn.Parameter, packed: Packed) -> None:
        """Write these tensors in the place of a weight that is held, which has the value that they give back."""
        self._packed[self.names[weight]] = packed

    def write_rest(self) -> None:
        """Write all parts that have not been held, and the buffers that are stored."""
        for part in self.parts:
            with self._holding(_own(part, recurse=part in self.blocks)):
                pass
        stored = {name: buffer for name, buffer in self.buffers.items() if name in self.source}
        if stored:
            self.writer.put({name: buffer.to(self.source[name].dtype) for name, buffer in stored.items()})

    def sizes(self) -> dict[str, int]:
        """Bytes of all parameters and of the largest block's, in float32, and of those in memory at most."""
        return {
            "model_bytes": sum(one.nbytes for one in _own(self.module)),
            "block_bytes": max(sum(one.nbytes for one in _own(block)) for block in self.blocks),
            "most_live_bytes": self.most_live_bytes,
        }

    def _match(self, prefix: str) -> dict[nn.Parameter, str]:
        """The stored name of each parameter; buffers that are stored are read."""
        wanted: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            wanted.setdefault(parameter, []).append(name.removeprefix(prefix))
        self.buffers = {name.removeprefix(prefix): buffer for name, buffer in self.module.named_buffers()}
        kept = {name.removeprefix(prefix) for name in self.module.state_dict(keep_vars=True)}
        found: dict[nn.Parameter, str] = {}
        for parameter, names in wanted.items():
            found[parameter] = self._stored(names, parameter)
        for name, buffer in self.buffers.items():
            if name in kept:
                buffer.copy_(self.source[self._stored([name], buffer)].read())
        known = {name for names in wanted.values() for name in names} | set(self.buffers)
        ignored = _ignored(self.module)
        strange = sorted(
            name for name in self.source if name not in known and not any(re.search(one, name) for one in ignored)
        )
        if strange:
            raise self._misfit(f"{len(strange)} tensors that the model has not, such as {strange[0]!r}")
        return found

    def _stored(self, names: list[str], like: Tensor) -> str:
        """The first of the names of one tensor that is in the folder."""
        here = [name for name in names if name in self.source]
        if not here:
            raise self._misfit(f"no tensor {names[0]!r}")
        for name in here:
            if self.source[name].entry.shape != tuple(like.shape):
                found = f"tensor {name!r} of shape {list(self.source[name].entry.shape)}"
                raise self._misfit(f"{found}, where config.json makes it {list(like.shape)}")
        for name in here[1:]:
            if not torch.equal(self.source[name].read(), self.source[here[0]].read()):
                raise self._misfit(f"tensors {here[0]!r} and {name!r} that differ, though the model shares them")
        return here[0]

    def _misfit(self, found: str) -> WorkloadError:
        return WorkloadError(
            f"opening {self.folder} block by block",
            found=found,
            expected="the names and shapes of the model that config.json describes",
            fix="load the model with the installed transformers and save it again: save_pretrained(folder)",
        )

    @contextmanager
    def _holding(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        self._enter(parameters)
        try:
            yield
            self._write(parameters)
        finally:
            self._leave(parameters)

    def _entering(self, recurse: bool) -> Callable[..., None]:
        def enter(part: nn.Module, _args: Any) -> None:
            if part not in self._entered:
                parameters = _own(part, recurse)
                self._enter(parameters)
                self._entered[part] = parameters

        return enter

    def _begin(self, _module: nn.Module, _args: Any) -> None:
        watch: Any = _WatchedReads
        self._watch = watch()
        self._watch.__enter__()

    def _end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._watch = None

    def _left(self, part: nn.Module, _args: Any, _output: Any) -> None:
        self._leave(self._entered.pop(part, []))

    def _enter(self, parameters: list[nn.Parameter]) -> None:
        entered: list[nn.Parameter] = []
        try:
            for parameter in parameters:
                if not self._users.get(parameter):
                    _swap(parameter, self._read(self.names[parameter]))
                    self.live_bytes += parameter.nbytes
                    self.most_live_bytes = max(self.most_live_bytes, self.live_bytes)
                self._users[parameter] = self._users.get(parameter, 0) + 1
                entered.append(parameter)
        except BaseException:
            self._leave(entered)
            raise

    def _leave(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            self._users[parameter] -= 1
            if not self._users[parameter]:
                self.live_bytes -= parameter.nbytes
                _swap(parameter, parameter.detach().to("meta"))

    def _read(self, name: str) -> Tensor:
        """A weight as it is now, float32."""
        written = self._written.get(name)
        if written is not None:
            tensors = {key: stored.read() for key, stored in written.items()}
            value = self._packed[name][1](tensors) if name in self._packed else tensors[name]
            return value.to(self.source[name].dtype).float()
        value = self.source[name].read()
        if name not in self._seen and not torch.isfinite(value).all():
            raise StageError(
                f"reading tensor {name} of {self.folder}",
                found="weights that are NaN or infinite",
                expected="finite weights",
                fix="look at the training that the model comes from, or download the folder again",
            )
        self._seen.add(name)
        return value.float()

    def _write(self, parameters: list[nn.Parameter]) -> None:
        """One shard of those that are in memory and have not been written."""
        shard: dict[str, Tensor] = {}
        names: dict[str, list[str]] = {}
        for parameter in parameters:
            name = self.names[parameter]
            if name in self._written:
                continue
            packed = self._packed.get(name)
            tensors = packed[0] if packed else {name: parameter.detach().to(self.source[name].dtype)}
            names[name] = list(tensors)
            shard |= tensors
        if not shard:
            return
        file = open_file(self.writer.put(shard))
        for name, keys in names.items():
            self._written[name] = {key: file[key] for key in keys}
            if name in self._packed:
                self._packed[name] = ({}, self._packed[name][1])


def _own(module: nn.Module, recurse: bool = True) -> list[nn.Parameter]:
    return list(module.parameters(recurse))


def _swap(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter another tensor and leave it the same object, for all who hold it."""
    swap: Any = torch.utils.swap_tensors
    swap(parameter, nn.Parameter(value, requires_grad=False))


def _ignored(module: nn.Module) -> list[str]:
    """Patterns of stored names that transformers passes over."""
    patterns: list[str] = [r"rotary_emb\.inv_freq$"]
    for child in module.modules():
        patterns += getattr(child, "_keys_to_ignore_on_load_unexpected", None) or []
    return patterns
