"""A model as named tensors, small files and text: what passes from stage to stage, and what a pack holds.

One safetensors file. A torch checkpoint is its state dict; an ONNX one is its graph without weights (the file
``model.onnx``) plus its initializers (tensors), so that the same codecs and shards serve both. Files are kept as U8
tensors under ``file:NAME``. No pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor, nn

from modelpress.errors import CorruptionError, WorkloadError
from modelpress.workload import Workload

FILE_PREFIX = "file:"
Kind = Literal["torch", "onnx"]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors (torch, on CPU, contiguous), files and how to rebuild the module.

    `metadata` is small JSON: for `torch`, ``architecture`` holds what `Workload.skeleton` takes.
    """

    kind: Kind
    tensors: dict[str, Tensor]
    files: dict[str, bytes] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Serialise as one safetensors file, deterministically."""
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(self.tensors.items())}
        for name, data in sorted(self.files.items()):
            stored[FILE_PREFIX + name] = torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[: len(data)]
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
            length = int.from_bytes(data[:8], "little")
            header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["checkpoint"])
            tensors = safetensors.torch.load(data)
            kind, metadata = header["kind"], header["metadata"]
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise CorruptionError("reading a checkpoint", found=str(error), expected="a modelpress checkpoint") from error
        files = {
            name.removeprefix(FILE_PREFIX): tensors.pop(name).numpy().tobytes()
            for name in [name for name in tensors if name.startswith(FILE_PREFIX)]
        }
        return cls(kind, tensors, files, metadata)

    def arrays(self) -> dict[str, np.ndarray]:
        """The tensors as numpy arrays sharing memory (dtypes that numpy has)."""
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


def from_module(module: nn.Module, architecture: Mapping[str, Any] | None = None) -> Checkpoint:
    """Snapshot of a module's state dict; tied tensors are stored once each, under every name."""
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
    return Checkpoint("torch", tensors, metadata={"architecture": dict(architecture or {})})


def to_module(checkpoint: Checkpoint, workload: Workload) -> nn.Module:
    """Rebuild a module in eval mode: `Workload.skeleton`, then fitted to the tensors' shapes, then filled.

    Fitting shrinks what structured pruning and layer drop shrank (see `fit_module`).

    Raises:
        WorkloadError: the checkpoint is no torch one, or its tensors do not fit.
    """
    if checkpoint.kind != "torch":
        raise WorkloadError("rebuilding a torch module", found=f"a {checkpoint.kind} checkpoint", expected="torch")
    module = workload.skeleton(checkpoint.metadata.get("architecture", {}))
    fit_module(module, checkpoint.tensors)
    try:
        module.load_state_dict(checkpoint.tensors)
    except RuntimeError as error:
        raise WorkloadError("loading a checkpoint into the skeleton", found=str(error)) from error
    return module.eval()


def fit_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Shrink `module` in place to the shapes in `tensors`: shorter `ModuleList`s, smaller layers.

    Linear, Conv1d/2d, BatchNorm, LayerNorm and Embedding take the shapes of their tensors; a `ModuleList` keeps as
    many children as the tensors name.
    """
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.ModuleList) and len(child):
            prefix = f"{name}."
            indices = {int(key[len(prefix) :].split(".")[0]) for key in tensors if key.startswith(prefix)}
            if indices and max(indices) + 1 < len(child):
                del child[max(indices) + 1 :]
    for name, child in module.named_modules():
        _fit_layer(child, {key: tensors.get(f"{name}.{key}" if name else key) for key in ("weight", "bias")}, tensors, name)


def _fit_layer(
    layer: nn.Module, own: Mapping[str, Tensor | None], tensors: Mapping[str, Tensor], name: str
) -> None:
    weight = own["weight"]
    if weight is None or not isinstance(getattr(layer, "weight", None), Tensor):
        return
    if tuple(layer.weight.shape) == tuple(weight.shape):
        return
    for key, parameter in list(layer.named_parameters(recurse=False)):
        stored = tensors[f"{name}.{key}"]
        setattr(layer, key, nn.Parameter(torch.empty(stored.shape, dtype=parameter.dtype)))
    for key, buffer in list(layer.named_buffers(recurse=False)):
        stored = tensors[f"{name}.{key}"]
        setattr(layer, key, torch.empty(stored.shape, dtype=buffer.dtype))
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, nn.Conv1d | nn.Conv2d):
        if layer.groups == layer.in_channels and layer.groups > 1:
            layer.groups = weight.shape[0]
        layer.out_channels, layer.in_channels = weight.shape[0], weight.shape[1] * layer.groups
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        layer.num_features = weight.shape[0]
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = weight.shape
