"""A pack as a folder, in the layouts that other tools read."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modelpress.errors import ConfigError
from modelpress.load.layouts.folders import checkpoint_names, folder_names, write_checkpoint, write_compressed_tensors
from modelpress.load.layouts.graphs import onnx_names, write_onnx
from modelpress.load.layouts.triton import write_triton
from modelpress.load.layouts.vitis import write_vitis
from modelpress.load.layouts.writing import MANIFEST_NAME, check_names, write_file
from modelpress.load.names import load_manifest, resolve
from modelpress.load.read import Parts, open_parts
from modelpress.manifest import Manifest
from modelpress.progress import Progress, silent
from modelpress.store.base import Store
from modelpress.store.local import check_new_folder, local_errors

__all__ = ["LAYOUTS", "MANIFEST_NAME", "Layout", "Writer", "pull", "pull_into"]

MARK = ".modelpress"
"""A file in a folder that `pull_into` may fill again."""

Layout = Literal["checkpoint", "huggingface", "compressed-tensors", "onnx", "triton", "vitis-ai"]


@dataclass(frozen=True)
class Writer:
    """One layout."""

    about: str
    """What it is, in a line."""
    names: Callable[[Manifest], Sequence[str]]
    """The files that it makes beside the pack's own; ConfigError where the pack does not fit. Nothing is fetched."""
    write: Callable[[Manifest, Parts, Path], object]
    """Write a pack into an empty folder; at most a shard and a tensor of it are in memory."""


LAYOUTS: dict[Layout, Writer] = {
    "checkpoint": Writer("tensors as safetensors, and the pack's files", checkpoint_names, write_checkpoint),
    "huggingface": Writer("the folder that was published, byte for byte", folder_names, write_checkpoint),
    "compressed-tensors": Writer("the same, and surely one that vLLM reads", folder_names, write_compressed_tensors),
    "onnx": Writer("model.onnx with external data", onnx_names, write_onnx),
    "triton": Writer("a Triton model repository: NAME/config.pbtxt, NAME/1/model.onnx", onnx_names, write_triton),
    "vitis-ai": Writer("model.onnx for a DPU: one sample a run, powers of two as scales", onnx_names, write_vitis),
}


def pull(
    store: Store, name: str, ref: str, folder: Path, layout: Layout = "checkpoint", progress: Progress = silent
) -> str:
    """Write a pack to `folder` in a layout that other tools read, whole or not at all; return its digest.

    The pack's manifest stands beside the files as ``modelpress.json``.

    Args:
        store: where the pack is.
        name: of the pack.
        ref: alias or digest; see `resolve`. It is resolved once.
        folder: new, or empty.
        layout: see `LAYOUTS`.
        progress: called with bytes read, and the pack's bytes.

    Raises:
        ConfigError: `folder` cannot be replaced (see `check_new_folder`), the layout does not fit the pack, or two
            files take one name.
        StoreFullError: no space left for it.
        and see `resolve` and `load_checkpoint`.
    """
    digest = resolve(store, name, ref)
    manifest = load_manifest(store, name, digest)
    doing = f"pulling {name}@{ref} to {folder}"
    folder = Path(os.path.abspath(folder))
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    with local_errors(doing):
        check_new_folder(folder, doing)
        try:
            _fill(store, manifest, partial, layout, progress)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return digest


def pull_into(
    store: Store, name: str, ref: str, folder: Path, layout: Layout = "checkpoint", progress: Progress = silent
) -> str:
    """As `pull`, into a folder that cannot be replaced as a whole: the mount point of a volume.

    Everything is written and verified below `folder` first, and then moved up, the manifest last: a folder without one
    is not finished. The folder is marked by a file ``.modelpress``, and what an earlier call left there is removed, as
    when a container starts again on the volume that it had before.

    Raises:
        ConfigError: something is in `folder` that no earlier call put there.
        and see `pull`.
    """
    digest = resolve(store, name, ref)
    manifest = load_manifest(store, name, digest)
    doing = f"pulling {name}@{ref} into {folder}"
    mark, partial = folder / MARK, folder / f"{MARK}.partial"
    with local_errors(doing):
        folder.mkdir(parents=True, exist_ok=True)
        there = [path for path in folder.iterdir() if path.name not in (MARK, "lost+found")]
        if there and not mark.is_file():
            raise ConfigError(doing, found=f"{there[0].name!r} there already", expected="an empty folder")
        mark.write_text("Written by modelpress, which replaces everything here when it runs again.\n")
        # The manifest goes first and comes last: a folder that has one is whole.
        for path in sorted(there, key=lambda path: path.name != MANIFEST_NAME):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            _fill(store, manifest, partial, layout, progress)
            made = sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST_NAME)
            for path in made:
                path.rename(folder / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return digest


def _fill(store: Store, manifest: Manifest, folder: Path, layout: Layout, progress: Progress) -> None:
    """Make `folder` and write the pack into it."""
    writer = LAYOUTS[layout]
    check_names(manifest, writer.names(manifest))
    folder.mkdir(parents=True)
    writer.write(manifest, open_parts(store, manifest, progress), folder)
    write_file(folder / MANIFEST_NAME, manifest.to_bytes())
