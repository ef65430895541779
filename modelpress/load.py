"""From a name to verified tensors: resolve, read, check every digest, fail closed.

Nothing is taken for granted: the manifest must have the digest that names it, every blob the digest that the manifest
says, every tensor and file the digest of its own bytes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import onnx
import safetensors.torch
from torch import Tensor

from modelpress import graph, keys, pointer
from modelpress.checkpoint import Checkpoint
from modelpress.container import read_tensors
from modelpress.errors import ConfigError, CorruptionError, NotFoundError
from modelpress.manifest import Manifest, read_files, read_reports
from modelpress.progress import Progress, silent
from modelpress.reports import VerifyReport
from modelpress.store.base import Store, get_capped
from modelpress.store.local import local_errors

Layout = Literal["checkpoint", "onnx"]
MIN_PREFIX = 12
MAX_MANIFEST_BYTES = 2**28
PULLED_SHARD_BYTES = 2**28
"""A pulled checkpoint starts a new safetensors file when one would grow beyond this."""
MANIFEST_NAME = "modelpress.json"


def resolve(store: Store, name: str, ref: str) -> str:
    """The digest that `ref` stands for: an alias, a digest (also ``sha256:...``), or at least 12 of its first digits.

    Raises:
        NotFoundError: there is no such pack or alias.
        ConfigError: `ref` is none of these, or fits several packs.
    """
    text = ref.removeprefix("sha256:")
    if keys.is_digest(text):
        return text
    if keys.is_alias(ref) and (entry := pointer.current(store, name, ref)) is not None:
        return entry.pack
    doing = f"resolving {name}@{ref}"
    if not re.fullmatch(rf"[0-9a-f]{{{MIN_PREFIX},63}}", text):
        if keys.is_alias(ref):
            known = ", ".join(_aliases(store, name)) or "none"
            raise NotFoundError(
                doing,
                found=f"no alias {ref!r} of {name} on {store.uri}; there are: {known}",
                fix="publish and promote a pack first, or name it by its digest",
            )
        raise ConfigError(doing, found=repr(ref), expected=f"an alias, a digest, or {MIN_PREFIX} of its first digits")
    fits = [info.key for info in store.list(keys.manifests(name) + text)]
    if len(fits) != 1:
        error = ConfigError if fits else NotFoundError
        raise error(doing, found=f"{len(fits)} packs that begin so on {store.uri}", expected="one")
    return fits[0].rpartition("/")[2].removesuffix(".json")


def load_manifest(store: Store, name: str, digest: str) -> Manifest:
    """Read and verify a manifest.

    Raises:
        NotFoundError: no such pack.
        CorruptionError: its bytes do not have this digest, are more than `MAX_MANIFEST_BYTES`, or name another pack.
        UnsupportedFormatError: written by a newer modelpress.
    """
    key = keys.manifest(name, digest)
    data = get_capped(store, key, MAX_MANIFEST_BYTES, f"loading pack {name}@{digest[:MIN_PREFIX]}")
    manifest = Manifest.parse(data, digest)
    if manifest.name != name:
        raise CorruptionError(f"loading {store.uri}/{key}", found=f"a pack named {manifest.name}", expected=name)
    return manifest


def load_checkpoint(store: Store, name: str, digest: str, progress: Progress = silent) -> tuple[Manifest, Checkpoint]:
    """Read a pack, one shard at a time, with everything verified; `progress` counts bytes.

    Raises:
        NotFoundError: the pack, or one of its blobs, is not there.
        CorruptionError: any digest or length differs; the message names the shard, the tensor or the file.
        UnsupportedFormatError: written by a newer modelpress.
    """
    manifest = load_manifest(store, name, digest)
    fetch = fetcher(store, manifest, progress)
    tensors = dict(read_tensors(manifest, fetch))
    return manifest, Checkpoint(manifest.kind, tensors, read_files(manifest, fetch), dict(manifest.metadata))


def verify(store: Store, name: str, ref: str, progress: Progress = silent) -> VerifyReport:
    """Read everything of a pack afresh and check it, as `load_checkpoint` does, without keeping it.

    Raises:
        see `resolve` and `load_checkpoint`.
    """
    started = time.perf_counter()
    digest = resolve(store, name, ref)
    manifest = load_manifest(store, name, digest)
    fetch = fetcher(store, manifest, progress)
    tensors = sum(1 for _ in read_tensors(manifest, fetch))
    files = len(read_files(manifest, fetch))
    read_reports(manifest, fetch)
    return VerifyReport(
        pack=digest,
        uri=f"{store.uri}/{keys.manifest(name, digest)}",
        shards=len(manifest.shards),
        tensors=tensors,
        files=files,
        read_bytes=manifest.published_bytes,
        seconds=time.perf_counter() - started,
    )


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
            _WRITERS[layout](manifest, fetcher(store, manifest, progress), partial)
            (partial / MANIFEST_NAME).write_bytes(manifest.to_bytes())
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return digest


def _write_checkpoint(manifest: Manifest, fetch: Callable[[str], bytes], folder: Path) -> None:
    """Hugging Face's layout; never more than one file's tensors in memory."""
    groups = _grouped(manifest)
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else ["model.safetensors"]
    tensors: Iterator[tuple[str, Tensor]] = read_tensors(manifest, fetch)
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


def _write_onnx(manifest: Manifest, fetch: Callable[[str], bytes], folder: Path) -> None:
    files = read_files(manifest, fetch)
    model = graph.join(Checkpoint(manifest.kind, dict(read_tensors(manifest, fetch)), files, dict(manifest.metadata)))
    path = folder / graph.GRAPH_FILE
    onnx.save_model(model, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    _write_files({name: data for name, data in files.items() if name != graph.GRAPH_FILE}, folder)


_WRITERS: dict[Layout, Callable[[Manifest, Callable[[str], bytes], Path], None]] = {
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


def fetcher(store: Store, manifest: Manifest, progress: Progress = silent) -> Callable[[str], bytes]:
    """Read a blob of the pack by its sha256, never more bytes than the manifest says; errors name the pack's part."""
    sizes = manifest.blobs()
    total, seen = sum(sizes.values()), set[str]()
    pack = f"{manifest.name}@{manifest.digest[:MIN_PREFIX]}"
    parts = {shard.sha256: f"shard {number} ({shard.sha256})" for number, shard in enumerate(manifest.shards)}
    entries = [*manifest.files, *([manifest.reports] if manifest.reports else [])]
    parts |= {entry.stored_sha256: f"file {entry.name!r}" for entry in entries}

    def fetch(digest: str) -> bytes:
        doing = f"reading {parts[digest]} of pack {pack}"
        fix = "publish the pack again: it sends what is missing; a damaged blob must be deleted first"
        try:
            data = store.get(keys.blob(digest), 0, sizes[digest])
        except NotFoundError as error:
            found = f"no object {store.uri}/{keys.blob(digest)}"
            raise NotFoundError(doing, found=found, expected=f"{sizes[digest]} bytes", fix=fix) from error
        except CorruptionError as error:
            raise CorruptionError(
                doing,
                found=f"{error.found} under {store.uri}/{keys.blob(digest)}",
                expected=f"{sizes[digest]} bytes with sha256 {digest}",
                fix=fix,
            ) from error
        seen.add(digest)
        progress(sum(sizes[item] for item in seen), total, parts[digest])
        return data

    return fetch


def _aliases(store: Store, name: str) -> list[str]:
    prefix = f"{keys.manifests(name)}refs/"
    return sorted({info.key.removeprefix(prefix).partition("/")[0] for info in store.list(prefix)})
