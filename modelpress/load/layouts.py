"""A pack as a folder, in the layouts that other tools read."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import onnx
import safetensors.torch
from torch import Tensor

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.container import Base, read_tensors
from modelpress.errors import ConfigError
from modelpress.load.names import load_manifest, resolve
from modelpress.load.read import open_pack
from modelpress.manifest import Manifest
from modelpress.pack_files import read_files
from modelpress.progress import Progress, silent
from modelpress.store.base import Store
from modelpress.store.local import local_errors

Layout = Literal["checkpoint", "onnx"]
PULLED_SHARD_BYTES = 2**28
"""A pulled checkpoint starts a new safetensors file when one would grow beyond this."""
MANIFEST_NAME = "modelpress.json"


def pull(
    store: Store, name: str, ref: str, folder: Path, layout: Layout = "checkpoint", progress: Progress = silent
) -> str:
    """Write a pack to `folder` in a layout that other tools read, whole or not at all; return its digest.

    `checkpoint`: raw safetensors (with an index when there are several) and the files, as Hugging Face lays it out.
    `onnx`: ``model.onnx`` with its weights in ``model.onnx.data``, and the other files.
    The pack's manifest stands beside them as ``modelpress.json``.

    Raises:
        ConfigError: `folder` exists and is not empty, or the layout does not fit the pack's kind.
        StoreFullError: no space left for it.
        and see `resolve` and `load_checkpoint`.
    """
    digest = resolve(store, name, ref)
    manifest = load_manifest(store, name, digest)
    doing = f"pulling {name}@{ref} to {folder}"
    if layout == "onnx" and manifest.kind != "onnx":
        raise ConfigError(doing, found=f"layout onnx of a {manifest.kind} pack", expected="layout checkpoint")
    folder = Path(os.path.abspath(folder))
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    with local_errors(doing):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(doing, found="something there already", expected="a new or empty folder")
        try:
            partial.mkdir(parents=True)
            _WRITERS[layout](manifest, *open_pack(store, manifest, progress), partial)
            (partial / MANIFEST_NAME).write_bytes(manifest.to_bytes())
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return digest


def _write_checkpoint(manifest: Manifest, fetch: Callable[[str], bytes], base: Base | None, folder: Path) -> None:
    """Hugging Face's layout; never more than one file's tensors in memory."""
    groups = _grouped(manifest)
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else ["model.safetensors"]
    tensors: Iterator[tuple[str, Tensor]] = read_tensors(manifest, fetch, original=base)
    for file_name, group in zip(names, groups, strict=True):
        content = {name: tensor for _, (name, tensor) in zip(group, tensors, strict=False)}
        # Through bytes: the library's own writer turns a full disk into an error of no type.
        (folder / file_name).write_bytes(safetensors.torch.save(content, {"format": "pt"}))
    if len(groups) > 1:
        weights = {name: file_name for file_name, group in zip(names, groups, strict=True) for name in group}
        total = sum(tensor.raw_bytes for tensor in manifest.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weights}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    _write_files(read_files(manifest, fetch), folder)


def _write_onnx(manifest: Manifest, fetch: Callable[[str], bytes], base: Base | None, folder: Path) -> None:
    files = read_files(manifest, fetch)
    model = graph.join(
        Checkpoint(manifest.kind, dict(read_tensors(manifest, fetch, original=base)), files, dict(manifest.metadata))
    )
    path = folder / graph.GRAPH_FILE
    onnx.save_model(model, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    _write_files({name: data for name, data in files.items() if name != graph.GRAPH_FILE}, folder)


_WRITERS: dict[Layout, Callable[[Manifest, Callable[[str], bytes], Base | None, Path], None]] = {
    "checkpoint": _write_checkpoint,
    "onnx": _write_onnx,
}


def _write_files(files: dict[str, bytes], folder: Path) -> None:
    for name, data in files.items():  # the manifest admits plain relative names only
        path = folder / name
        if path.exists() or name == MANIFEST_NAME:
            raise ConfigError(f"writing file {name!r}", found="a name that this layout takes for itself")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _grouped(manifest: Manifest) -> list[list[str]]:
    """Tensor names by pulled file, in the manifest's order."""
    groups: list[list[str]] = [[]]
    filled = 0
    for tensor in manifest.tensors:
        if groups[-1] and filled + tensor.raw_bytes > PULLED_SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(tensor.name)
        filled += tensor.raw_bytes
    return groups
