"""A model as named tensors, small files and text: what passes from stage to stage, and what a pack holds.

One safetensors file. A torch checkpoint is its state dict; an ONNX one is its graph without weights (the file
``model.onnx``) plus its initializers (tensors), so that the same codecs and shards serve both. Files are kept as U8
tensors under ``file:NAME``. No pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from modelpress.blocks import sync_depth
from modelpress.errors import CorruptionError, WorkloadError
from modelpress.workload import Workload

FILE_PREFIX = "file:"
Kind = Literal["torch", "onnx"]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors (torch, on CPU, contiguous), files and how to rebuild the module.

    `metadata` is small JSON. For `torch`, ``architecture`` holds what `Workload.skeleton` takes, and ``tied`` the
    names that share another name's tensor, which is stored once: {name: stored name}.
    """

    kind: Kind
    tensors: dict[str, Tensor]
    files: dict[str, bytes] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Serialise as one safetensors file, deterministically."""
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(self.tensors.items())}
        for name, data in sorted(self.files.items()):
            # A buffer of no bytes has no address, so an empty file is an empty view of one byte.
            stored[FILE_PREFIX + name] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
        # One key: safetensors writes several in an order that changes from call to call.
        header = json.dumps({"kind": self.kind, "metadata": self.metadata}, sort_keys=True)
        return safetensors.torch.save(stored, {"checkpoint": header})

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """Read what `to_bytes` wrote.

        Raises:
            CorruptionError: not such a file.
        """
        try:
            # First safetensors' own reader, which checks lengths and nesting before anything is parsed here.
            tensors = safetensors.torch.load(data)
            facts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            header = json.loads(facts["checkpoint"])
            kind, metadata = header["kind"], header["metadata"]
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise CorruptionError(
                "reading a checkpoint", found=f"{type(error).__name__}: {error}", expected="a modelpress checkpoint"
            ) from error
        if kind not in get_args(Kind) or not isinstance(metadata, dict):
            raise CorruptionError(
                "reading a checkpoint",
                found=f"kind {kind!r}, metadata {type(metadata).__name__}",
                expected=f"a kind of {', '.join(get_args(Kind))} and a mapping",
            )
        names = [name for name in tensors if name.startswith(FILE_PREFIX)]
        files = {name.removeprefix(FILE_PREFIX): tensors.pop(name).numpy().tobytes() for name in names}
        return cls(kind, tensors, files, metadata)

    def arrays(self) -> dict[str, np.ndarray]:
        """The tensors as numpy arrays sharing memory (dtypes that numpy has)."""
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


def from_module(module: nn.Module, architecture: Mapping[str, Any] | None = None) -> Checkpoint:
    """Snapshot of a module's state dict; a tensor that stands under several names is stored once."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        stored = first.setdefault(id(value), name)
        if stored != name:
            tied[name] = stored
        else:
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    metadata: dict[str, Any] = {"architecture": dict(architecture or {})}
    if tied:
        metadata["tied"] = tied
    return Checkpoint("torch", tensors, metadata=metadata)


def to_module(checkpoint: Checkpoint, workload: Workload) -> nn.Module:
    """Rebuild a module in eval mode: `Workload.skeleton`, then fitted to the tensors' shapes, then filled.

    Fitting shrinks what structured pruning and layer drop shrank (see `fit_module`). Global random state is unchanged.

    Raises:
        WorkloadError: the checkpoint is no torch one, or its tensors do not fit.
    """
    if checkpoint.kind != "torch":
        raise WorkloadError("rebuilding a torch module", found=f"a {checkpoint.kind} checkpoint", expected="torch")
    tied: dict[str, str] = checkpoint.metadata.get("tied", {})
    try:
        tensors = checkpoint.tensors | {name: checkpoint.tensors[stored] for name, stored in tied.items()}
    except KeyError as error:
        raise WorkloadError("rebuilding tied tensors", found=f"no tensor {error}", expected="it in the file") from error
    with torch.random.fork_rng(devices=[]):
        module = workload.skeleton(checkpoint.metadata.get("architecture", {}))
    fit_module(module, tensors)
    for name, stored in tied.items():
        _tie(module, name, stored)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise WorkloadError(
            "loading a checkpoint into the skeleton",
            found=str(error),
            fix="`skeleton` must build, from the checkpoint's architecture, what `source` or the student was",
        ) from error
    return module.eval()


def _tie(module: nn.Module, name: str, stored: str) -> None:
    owner, _, key = name.rpartition(".")
    other, _, other_key = stored.rpartition(".")
    setattr(module.get_submodule(owner), key, getattr(module.get_submodule(other), other_key))


def fit_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Shrink `module` in place to the shapes in `tensors`: shorter `ModuleList`s, smaller layers.

    Linear, convolution, batch and layer normalisation and embedding layers take the shapes of their tensors; a
    `ModuleList` loses its last child as long as that has tensors and none of them is stored, and configs around it
    count what is left. Values are left for `load_state_dict`.
    """
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.ModuleList):
            before = len(child)
            _fit_list(child, f"{name}." if name else "", tensors)
            if len(child) < before:
                sync_depth(module, child, before, range(len(child)))
    for name, child in module.named_modules():
        _fit_layer(child, name, tensors)


def _fit_list(layers: nn.ModuleList, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Drop the last children that are not stored; one without tensors, an activation, is never known to be gone."""
    if not any(name.startswith(prefix) for name in tensors):
        return  # another model's tensors, which `load_state_dict` refuses by name
    while len(layers):
        last = f"{prefix}{len(layers) - 1}."
        owned = layers[-1].state_dict()
        if not owned or any(last + name in tensors for name in owned):
            return
        del layers[-1]


def _fit_layer(layer: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Replace the layer's own parameters and buffers by empty ones of the stored shapes, and follow with its sizes."""
    prefix = f"{name}." if name else ""
    owned = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    for key, value in owned:
        stored = tensors.get(prefix + key)
        if stored is not None and stored.shape != value.shape:
            empty = torch.empty(stored.shape, dtype=value.dtype)
            setattr(layer, key, nn.Parameter(empty) if isinstance(value, nn.Parameter) else empty)
    sync_sizes(layer)


def sync_sizes(layer: nn.Module) -> None:
    """Make a layer's size attributes say what its weight's shape is."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, nn.Conv1d | nn.Conv2d):
        if layer.groups == layer.in_channels and layer.groups > 1:  # depthwise: as many groups as channels
            layer.groups = weight.shape[0] // (layer.out_channels // layer.groups)
        layer.out_channels, layer.in_channels = weight.shape[0], weight.shape[1] * layer.groups
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        layer.num_features = weight.shape[0]
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = weight.shape
