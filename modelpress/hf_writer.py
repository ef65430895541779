"""Write a Hugging Face folder: config.json, the tokenizer's files, safetensors shards with their index.

Whole or not at all: everything goes to a folder beside, which is renamed at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelpress.codec import Buffer
from modelpress.container.safetensors_file import Entry
from modelpress.container.safetensors_file import write as serialized
from modelpress.container.tensors import NAMES, to_bytes
from modelpress.errors import WorkloadError
from modelpress.store.local import check_new_folder, local_errors
from modelpress.workload import Workload
from modelpress.workloads.hf_folder import read_object

SHARD_BYTES = 5_000_000_000
"""What transformers writes at most into one file."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COPIED = {".json", ".txt", ".model", ".jinja", ".md"}
_LICENCES = ("LICENSE", "LICENCE", "NOTICE")
_WRITTEN = {"config.json", INDEX, "pytorch_model.bin.index.json"}


def check_folder(folder: Path) -> None:
    """Refuse to write over something, before hours are spent.

    Raises:
        ConfigError: see `check_new_folder`.
    """
    with local_errors(f"looking at {folder}"):
        check_new_folder(folder, f"writing a Hugging Face folder to {folder}")


class FolderWriter:
    """Shards in a folder beside the one to be; `finish` names them and adds what else belongs to the model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[dict[str, int]] = []
        """Bytes by tensor, of each shard."""

    def put(self, tensors: Mapping[str, Tensor]) -> Path:
        """Write one shard and return its present place.

        Raises:
            StoreFullError: the disk is full.
        """
        path = self.folder / f"shard-{len(self.shards) + 1}.safetensors"
        entries = [
            Entry(name, NAMES[tensor.dtype], tuple(tensor.shape), [to_bytes(tensor).data])
            for name, tensor in tensors.items()
        ]
        with local_errors(f"writing {path}", writing=True):
            _write_file(path, serialized(entries, {"format": "pt"}))
        self.shards.append({entry.name: entry.size_bytes for entry in entries})
        return path

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Name the shards, and write their index and all other files.

        Args:
            files: by name, relative to the folder.
        """
        count = len(self.shards)
        names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        names = [SINGLE] if count == 1 else names
        with local_errors(f"writing {self.folder}", writing=True):
            for number, name in enumerate(names, start=1):
                (self.folder / f"shard-{number}.safetensors").rename(self.folder / name)
            if count > 1:
                places = {tensor: name for name, shard in zip(names, self.shards, strict=True) for tensor in shard}
                size = sum(sum(shard.values()) for shard in self.shards)
                index = {"metadata": {"total_size": size}, "weight_map": places}
                _write_file(self.folder / INDEX, [json_bytes(index)])
            for name, data in files.items():
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_file(path, [data])


@contextmanager
def new_folder(folder: Path) -> Iterator[FolderWriter]:
    """A writer whose folder becomes `folder` at the end; where anything fails, nothing of it stays.

    Raises:
        ConfigError: see `check_folder`.
        StoreError: it cannot be written.
    """
    check_folder(folder)
    folder = Path(os.path.abspath(folder))
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    with local_errors(f"making {partial}", writing=True):
        partial.mkdir(parents=True)
    try:
        yield FolderWriter(partial)
        with local_errors(f"writing {folder}", writing=True):
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write(tensors: Mapping[str, Tensor], files: Mapping[str, bytes], folder: Path, max_shard_size: int) -> None:
    """Write a folder whose tensors are all in memory.

    Args:
        tensors: by name, none sharing memory.
        files: by name, relative to the folder.
        folder: new, or empty.
        max_shard_size: bytes; a file is larger only where one tensor is.

    Raises:
        ConfigError, StoreError: see `new_folder`.
    """
    plan = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    with new_folder(folder) as writer:
        for members in plan.filename_to_tensors.values():
            writer.put({member: tensors[member] for member in members})
        writer.finish(files)


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """A JSON file."""
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The model that a reader builds from the config alone; without memory."""
    with torch.device("meta"):
        return type(model)(model.config)


def check_structure(model: PreTrainedModel) -> None:
    """Refuse a model whose config does not say what it is (pruned heads and channels, dropped layers), and one whose
    folder would have other tensors than the module.

    A submodule that was set to None is not refused: see `left_out`.

    Raises:
        WorkloadError: a tensor that the config does not foresee, or of another shape, or one that it foresees and that
            the model has lost; experts in one tensor, or other names in the source folder.
    """
    fused = [name for name, value in model.named_parameters() if value.ndim > 2 and not _of_convolution(model, name)]
    if fused or getattr(model, "_weight_conversions", None):
        raise WorkloadError(
            f"comparing {type(model).__name__} with its folder",
            found=f"{len(fused)} weights of several experts in one, such as {fused[0]}"
            if fused
            else "other names there",
            expected="a folder with the module's own tensors",
            fix="this is not done here for such models; publish the ONNX graph",
        )
    expected = {name: tuple(value.shape) for name, value in skeleton(model).state_dict().items()}
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in sorted(set(expected) | set(found)):
        if found.get(name) != expected.get(name) and not (name not in found and _does_without(model, name)):
            shown = [f"shape {list(one[name])}" if name in one else "none" for one in (found, expected)]
            raise WorkloadError(
                f"comparing {type(model).__name__} with its config.json",
                found=f"{name}: {shown[0]}",
                expected=shown[1],
                fix="structured pruning and dropped layers give sizes that this config.json does not say: publish the "
                "ONNX graph",
            )


def left_out(model: PreTrainedModel, workload: Workload) -> dict[str, Tensor]:
    """Tensors of the source folder that belong to submodules that the module has set to None, such as an unused pooler.

    Where the source folder has none either, there are none.
    """
    shapes = {name: tuple(value.shape) for name, value in skeleton(model).state_dict().items()}
    missing = {name for name in set(shapes) - set(model.state_dict()) if _does_without(model, name)}
    found: dict[str, Tensor] = {}
    folder = source_folder(workload)
    if folder is None or not missing:
        return found
    prefix = f"{model.base_model_prefix}."
    with local_errors(f"reading {folder}"):
        for path in sorted(folder.glob("*.safetensors")):
            with safetensors.safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  no mapping
                    short = name if name in missing else name.removeprefix(prefix)
                    if short in missing:
                        found[short] = opened.get_tensor(name)
    return found


def _of_convolution(model: PreTrainedModel, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _does_without(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor belongs to a submodule that was set to None."""
    owner: nn.Module | None = model
    for part in name.split(".")[:-1]:
        assert owner is not None
        if part not in owner._modules:
            return False
        owner = owner._modules[part]
        if owner is None:
            return True
    return False


def other_files(model: PreTrainedModel, workload: Workload) -> dict[str, bytes]:
    """The folder's other files: those of the source folder (tokenizer, pooling, model card), or the workload's.

    Weights, code and what is written anew are left out.
    """
    folder = source_folder(workload)
    files = dict(workload.files()) if folder is None else small_files(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None and model.can_generate():
        files.setdefault("generation_config.json", generation.to_json_string().encode())
    return files


def small_files(folder: Path) -> dict[str, bytes]:
    """What goes with a folder's model into another: tokenizer, pooling, card, licence; nothing that is hidden."""
    with local_errors(f"reading {folder}"):
        paths = [
            path for path in sorted(folder.glob("[!.]*")) + sorted(folder.glob("[!.]*/[!.]*.json")) if path.is_file()
        ]
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in paths
            if (path.suffix in _COPIED and path.name not in _WRITTEN and not path.name.endswith(".index.json"))
            or path.name.startswith(_LICENCES)
            or path.parent != folder
        }


def stored_dtype(workload: Workload) -> torch.dtype:
    """What the source folder's config.json says of its weights; float32 where there is none, or it says nothing.

    Raises:
        WorkloadError: another type than float32, bfloat16 or float16.
    """
    folder = source_folder(workload)
    document = {} if folder is None else read_object(folder / "config.json")
    stated = document.get("dtype") or document.get("torch_dtype") or "float32"
    if stated not in _DTYPES:
        raise WorkloadError(
            f"reading dtype of {folder}/config.json", found=repr(stated)[:80], expected=f"one of {', '.join(_DTYPES)}"
        )
    return _DTYPES[stated]


def source_folder(workload: Workload) -> Path | None:
    """The Hugging Face folder that a workload's model comes from."""
    folder = getattr(workload, "folder", None)
    return folder if isinstance(folder, Path) else None


def _write_file(path: Path, pieces: Iterable[Buffer]) -> None:
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
