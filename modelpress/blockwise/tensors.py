"""The tensors of a Hugging Face folder, memory-mapped: nothing is read before it is asked for."""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modelpress.codec import Buffer
from modelpress.container.safetensors_file import Entry, read
from modelpress.container.tensors import TORCH_DTYPES
from modelpress.errors import CorruptionError, WorkloadError
from modelpress.hf_writer import INDEX, SINGLE
from modelpress.store.local import local_errors


@dataclass(frozen=True)
class Stored:
    """One tensor in a mapped file."""

    entry: Entry
    map: mmap.mmap
    start: int
    """Where its bytes begin in the file."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype as stored."""
        return TORCH_DTYPES[self.entry.dtype]

    def read(self) -> Tensor:
        """A copy in memory of its own; the pages of the file that were read for it are given back."""
        tensor = torch.empty(self.entry.shape, dtype=self.dtype)
        if not tensor.numel():
            return tensor
        (part,) = self.entry.parts
        tensor.reshape(-1).view(torch.uint8).numpy()[:] = np.frombuffer(part, np.uint8)
        if hasattr(mmap, "MADV_DONTNEED"):
            first = self.start - self.start % mmap.PAGESIZE
            self.map.madvise(mmap.MADV_DONTNEED, first, self.start - first + len(part))
        return tensor


def open_file(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file by name.

    Raises:
        CorruptionError: it is none, or is cut short; the file and the tensor are named.
        NotFoundError, AccessDeniedError: it cannot be opened.
    """
    doing = f"opening {path}"
    with local_errors(doing), path.open("rb") as file:
        size = file.seek(0, 2)
        if not size:
            raise CorruptionError(doing, found="0 bytes", expected="a safetensors file")
        map_ = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    try:
        entries, _ = read(memoryview(map_), doing)
    except CorruptionError as error:
        fix = error.fix or "copy the file again: it is damaged, or was cut short"
        raise CorruptionError(error.doing, found=error.found, expected=error.expected, fix=fix) from error
    begin = _address(map_)
    return {
        name: Stored(entry, map_, _address(entry.parts[0]) - begin if entry.size_bytes else 0)
        for name, entry in entries.items()
    }


def _address(data: mmap.mmap | Buffer) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data)


def open_folder(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's `model.safetensors`, or of the files that its index names.

    Raises:
        WorkloadError: neither is there, the index is none, or names a file or a tensor that is missing.
        CorruptionError: see `open_file`.
    """
    if (folder / SINGLE).is_file():
        return open_file(folder / SINGLE)
    places = _weight_map(folder)
    missing = sorted({name for name in places.values() if not (folder / name).is_file()})
    if missing:
        raise WorkloadError(
            f"opening the shards of {folder}",
            found=f"no {missing[0]}" + (f", and {len(missing) - 1} more are missing" if missing[1:] else ""),
            expected=f"each of the {len(set(places.values()))} files that {INDEX} names",
            fix="download or copy the folder again, whole",
        )
    files = {name: open_file(folder / name) for name in sorted(set(places.values()))}
    found: dict[str, Stored] = {}
    for name, file in places.items():
        if name not in files[file]:
            raise WorkloadError(
                f"opening {folder / file}",
                found=f"no tensor {name!r}",
                expected=f"it there, as {INDEX} says",
                fix="download or copy the folder again, whole",
            )
        found[name] = files[file][name]
    return found


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.is_file():
        raise WorkloadError(
            f"opening the weights of {folder}",
            found=f"neither {SINGLE} nor {INDEX}",
            expected="one of them",
            fix="save the model with save_pretrained(folder)",
        )
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(Path(name).name == name for name in places.values())  # no file of another folder
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"[:200]
        raise WorkloadError(f"reading {path}", found=found, expected="a weight_map of file names") from error
    if not plain or not places:
        raise WorkloadError(f"reading {path}", found="none, or other folders'", expected="a weight_map of file names")
    return dict(places)
