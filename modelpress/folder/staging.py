"""A folder's tensors, coded one by one into shards on the local disk; what was finished is found again.

Beside each shard stands a record of the tensors that end in it, written after it. A run that was killed is run again:
shards with their records are taken as they are, as far as they are in an unbroken row and have the digests that were
recorded, and coding goes on with the first tensor that is not whole among them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import CompressConfig, ShardConfig
from modelpress.container import Piece, StoredTensor
from modelpress.manifest import ShardEntry, TensorEntry
from modelpress.progress import Progress
from modelpress.reports import CodedTensor
from modelpress.shard import ShardFile, groups_of, plan, tensor_entry, write_shard
from modelpress.store.local import file_sha256, local_errors


class Record(BaseModel):
    """One finished shard."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    shard: ShardEntry
    """Its digest and length."""
    tensors: tuple[str, ...]
    """Tensors with a piece in it."""
    entries: tuple[TensorEntry, ...]
    """Those that end in it, as the manifest lists them."""
    rows: tuple[CodedTensor, ...]
    """How each of these is stored, and why; without times."""


@dataclass
class Staged:
    """What is ready to be published."""

    folder: Path
    records: list[Record] = field(default_factory=list)

    @property
    def shards(self) -> list[ShardFile]:
        """The files."""
        return [
            ShardFile(self._path(number), one.shard.sha256, one.shard.size_bytes, one.tensors)
            for number, one in enumerate(self.records)
        ]

    @property
    def entries(self) -> list[TensorEntry]:
        """Of all tensors that are whole, in reading order."""
        return [entry for record in self.records for entry in record.entries]

    @property
    def rows(self) -> list[CodedTensor]:
        """How each of them is stored."""
        return [row for record in self.records for row in record.rows]

    def find(self) -> None:
        """Take up what an earlier run finished; what it did not is forgotten."""
        while (record := self._read(len(self.records))) is not None:
            self.records.append(record)
        whole = {entry.name for entry in self.entries}
        while self.records and not whole.issuperset(self.records[-1].tensors):
            whole.difference_update(entry.name for entry in self.records.pop().entries)

    def write(self, pieces: Sequence[Piece], ends: Sequence[tuple[StoredTensor, CodedTensor]]) -> None:
        """Write the next shard, and its record.

        Args:
            pieces: what is in it.
            ends: the tensors whose last piece is among them.

        Raises:
            StoreFullError: the disk is full.
        """
        number = len(self.records)
        with local_errors(f"writing {self._path(number)}", writing=True):
            shard = write_shard(self._path(number), pieces)
        first = dict.fromkeys(shard.tensors, number)
        for before in range(number - 1, -1, -1):
            if not (still := first.keys() & set(self.records[before].tensors)):
                break
            first |= dict.fromkeys(still, before)
        entries = [tensor_entry(tensor, tuple(range(first[tensor.name], number + 1))) for tensor, _ in ends]
        record = Record(
            shard=ShardEntry(sha256=shard.sha256, size_bytes=shard.size_bytes),
            tensors=shard.tensors,
            entries=tuple(entries),
            rows=tuple(row.model_copy(update={"decode_seconds": None}) for _, row in ends),
        )
        path = self._path(number).with_suffix(".json")
        partial = path.with_suffix(".partial")
        with local_errors(f"writing {path}", writing=True):
            partial.write_text(record.model_dump_json())
            partial.replace(path)
        self.records.append(record)

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _read(self, number: int) -> Record | None:
        path = self._path(number)
        with local_errors(f"reading {path}"):
            if not path.is_file() or not path.with_suffix(".json").is_file():
                return None
            try:
                record = Record.model_validate(json.loads(path.with_suffix(".json").read_bytes()))
            except (ValidationError, ValueError):  # cut short by what killed the run
                return None
            same = path.stat().st_size == record.shard.size_bytes and file_sha256(path) == record.shard.sha256
        return record if same else None


def stage(
    names: Sequence[str],
    read: Callable[[str], Tensor],
    folder: Path,
    compress_config: CompressConfig | None,
    shard_config: ShardConfig,
    progress: Progress,
) -> Staged:
    """Code tensors and write them as shards into `folder`.

    The shards are those of `shard.write_shards` on all tensors at once. In memory are one tensor, in each form that is
    tried on it, and at most two shards beside it.

    Args:
        names: of the tensors, in reading order.
        read: gives one of them.
        folder: made by `stage`; what an earlier run left there must be of the same tensors and configs.
        compress_config: None stores every tensor raw.
        shard_config: how large shards are.
        progress: called with tensors that are coded.

    Raises:
        ConfigError, StageError: see `compress` and `write_shards`.
        StoreFullError: the disk is full.
    """
    with local_errors(f"making {folder}", writing=True):
        folder.mkdir(parents=True, exist_ok=True)
    staged = Staged(folder)
    staged.find()
    row = _Row(staged, shard_config, groups_of(names, shard_config))
    for number, name in enumerate(names[len(staged.entries) :], start=len(staged.entries)):
        progress(number, len(names), f"coding {name}")
        coded, report = compress(Checkpoint("torch", {name: read(name)}), compress_config)
        row.add(coded.tensors[0], report.tensors[0])
    row.write(last=True)
    progress(len(names), len(names))
    return staged


class _Row:
    """Coded tensors that wait for their shards to be full."""

    def __init__(self, staged: Staged, config: ShardConfig, groups: Mapping[str, object]) -> None:
        self._staged, self._config, self._groups = staged, config, groups
        self._waiting: dict[str, tuple[StoredTensor, CodedTensor]] = {}
        self._pending_bytes = 0
        self._written = 0
        """Shards of the first of them that are written already: it is larger than a shard, and its rest waits."""

    def add(self, tensor: StoredTensor, row: CodedTensor) -> None:
        """Take a tensor, and write what is full."""
        self._waiting[tensor.name] = tensor, row
        self._pending_bytes += tensor.piece.stored_bytes
        if self._pending_bytes > self._config.max_shard_size:
            self.write(last=False)

    def write(self, *, last: bool) -> None:
        """Write the shards that are full, and with `last` the rest."""
        plans = plan([tensor for tensor, _ in self._waiting.values()], self._config, self._groups)
        full = plans if last else plans[:-1]
        for pieces in full[self._written :]:
            ends = [self._waiting[one.name] for one in pieces if one.start + one.count == one.elements]
            self._staged.write(pieces, ends)
        rest = plans[len(full) :]
        kept = [piece for pieces in rest for piece in pieces]
        self._waiting = {piece.name: self._waiting[piece.name] for piece in kept}
        self._pending_bytes = sum(piece.stored_bytes for piece in kept)
        self._written = sum(piece.name == kept[0].name for pieces in full for piece in pieces) if kept else 0
