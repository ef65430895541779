"""A Hugging Face folder that is written shard by shard, and is not there under its name before it is whole."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from modelpress.blockwise.tensors import INDEX, SINGLE
from modelpress.container.safetensors_file import Entry, write
from modelpress.container.tensors import NAMES, to_bytes
from modelpress.errors import ConfigError
from modelpress.store.local import local_errors
from modelpress.workloads.hf_folder import read_object

REPORT = "modelpress.json"
"""What was done, from which folder: written beside the weights."""
KEPT_SUFFIXES = {".json", ".jinja", ".md", ".model", ".txt"}
KEPT_NAMES = ("LICENSE", "LICENCE", "NOTICE")
"""Files of the source folder that go with the model: configs, tokenizer, card, licence; no weights of any kind."""


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
        with local_errors(f"writing {path}", writing=True), path.open("wb") as file:
            for piece in write(entries, {"format": "pt"}):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        self.shards.append({entry.name: entry.size_bytes for entry in entries})
        return path

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(sum(shard.values()) for shard in self.shards)

    def finish(self, source: Path, config: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """Name the shards, copy the source folder's small files, and write index, config and report.

        Args:
            source: the folder that the model comes from.
            config: what config.json says beyond, or instead of, the source's.
            report: JSON.
        """
        count = len(self.shards)
        names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        names = [SINGLE] if count == 1 else names
        with local_errors(f"writing {self.folder}", writing=True):
            for number, name in enumerate(names, start=1):
                (self.folder / f"shard-{number}.safetensors").rename(self.folder / name)
            for path in sorted(source.iterdir()):
                kept = path.suffix in KEPT_SUFFIXES or path.name.startswith(KEPT_NAMES)
                if path.is_file() and kept and path.name != "config.json" and not path.name.endswith(".index.json"):
                    shutil.copyfile(path, self.folder / path.name)
            places = {tensor: name for name, shard in zip(names, self.shards, strict=True) for tensor in shard}
            if count > 1:
                index = {"metadata": {"total_size": self.size_bytes}, "weight_map": dict(sorted(places.items()))}
                _write_json(self.folder / INDEX, index)
            _write_json(self.folder / REPORT, report)
            _write_json(self.folder / "config.json", {**read_object(source / "config.json"), **config})


def check_new(to: Path) -> None:
    """Refuse a folder that is there, before hours are spent.

    Raises:
        ConfigError: it is.
    """
    if to.exists():
        raise ConfigError(
            f"writing a model into {to}",
            found="it exists already",
            expected="a folder that is not there yet",
            fix="name another one, or remove it",
        )


@contextmanager
def new_folder(to: Path) -> Iterator[FolderWriter]:
    """A writer whose folder becomes `to` at the end; where anything fails, nothing of it stays.

    Raises:
        ConfigError: `to` is there already.
    """
    check_new(to)
    to = Path(os.path.abspath(to))
    partial = to.with_name(f".{to.name}.{uuid.uuid4().hex}.partial")
    with local_errors(f"making {partial}", writing=True):
        partial.mkdir(parents=True)
    try:
        yield FolderWriter(partial)
        with local_errors(f"writing {to}", writing=True):
            partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
