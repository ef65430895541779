"""What every layout writes with: tensors to their places as they come, files one by one, and nothing over another."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from modelpress.container.tensors import to_bytes
from modelpress.errors import ConfigError
from modelpress.load.read import Parts
from modelpress.manifest import Manifest
from modelpress.pack_files import unpack_file

MANIFEST_NAME = "modelpress.json"


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes go."""

    file: str
    offset: int
    """Position in the file at which they begin."""


def check_names(manifest: Manifest, own: Sequence[str]) -> None:
    """Refuse a pack whose files would lie in each other's way, or in that of what a layout writes itself.

    Args:
        manifest: the pack.
        own: files that the layout makes, beside the manifest and the pack's files.

    Raises:
        ConfigError: two of one name, or a file where another needs a folder.
    """
    every = Counter([MANIFEST_NAME, *own, *(file.name for file in manifest.files)])
    for name, times in sorted(every.items()):
        if times > 1:
            raise ConfigError(f"writing file {name!r}", found="a name that this layout takes for itself")
        parts = name.split("/")
        for end in range(1, len(parts)):
            if (folder := "/".join(parts[:end])) in every:
                raise ConfigError(
                    f"writing file {name!r}", found=f"a file {folder!r}", expected="a folder of this name"
                )


def write_tensors(parts: Parts, folder: Path, heads: Mapping[str, bytes], places: Mapping[str, Place]) -> None:
    """Write every tensor of a pack to its place; one shard and one tensor are in memory.

    Args:
        parts: what the pack is read with.
        folder: relative to it are the files' names.
        heads: what each file begins with; all files are named.
        places: by tensor. Together they fill each file behind its head; zeros are left between them, if anything.

    Raises:
        CorruptionError: see `container.read_tensors`.
        ConfigError: see `_created`.
    """
    for name, head in heads.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with _created(path) as file:
            file.write(head)
    for name, tensor in parts.tensors():
        place = places[name]
        with (folder / place.file).open("r+b") as file:
            file.seek(place.offset)
            file.write(to_bytes(tensor).data)
        del tensor  # the next one is decoded when this one is let go
    for name in heads:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def write_files(manifest: Manifest, parts: Parts, folder: Path, but: Iterable[str] = ()) -> None:
    """Write the pack's files, one at a time, byte for byte; those in `but` are left out.

    Raises:
        CorruptionError: see `pack_files.unpack_file`.
    """
    left_out = set(but)
    for entry in manifest.files:  # the manifest admits plain relative names only
        if entry.name not in left_out:
            write_file(folder / entry.name, unpack_file(entry, parts.fetch(entry.stored_sha256)))


def read_file(manifest: Manifest, parts: Parts, name: str) -> bytes:
    """One file of a pack, verified.

    Raises:
        ConfigError: the pack has none of this name.
        CorruptionError: see `pack_files.unpack_file`.
    """
    entry = manifest.file(name)
    return unpack_file(entry, parts.fetch(entry.stored_sha256))


def write_file(path: Path, data: bytes) -> None:
    """Write a small file to the disk, and make its folder.

    Raises:
        ConfigError: see `_created`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _created(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _created(path: Path) -> BinaryIO:
    """A new file.

    Raises:
        ConfigError: there is one; in a folder that was empty, one whose name is the same to this file system.
    """
    try:
        return path.open("xb")
    except FileExistsError:
        raise ConfigError(
            f"writing file {path.name!r}",
            found=f"another file of the pack, whose name is the same on the file system of {path.parent}",
            expected="names that do not only differ in case or spelling",
            fix="write to a file system that tells such names apart, as those of Linux do",
        ) from None
