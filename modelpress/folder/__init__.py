"""Publishing a Hugging Face folder as it is: losslessly compressed, sharded, and every byte to be had again.

The folder's safetensors files are read tensor by tensor, so that it may be larger than memory; their headers stand in
the manifest (`modelpress.hf_origin`), all other files are files of the pack. `pull --as huggingface` gives the folder
back, file by file the same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from modelpress import keys
from modelpress.blockwise.tensors import Stored, open_file, open_folder
from modelpress.cipher import seal_pack, secrets, wrapping_keys
from modelpress.compress import natural_key
from modelpress.config import CompressConfig, ShardConfig, UploadConfig
from modelpress.container.stored import check_names
from modelpress.errors import ConfigError, WorkloadError
from modelpress.folder.inventory import Inventory, take_inventory
from modelpress.folder.staging import Staged, stage
from modelpress.hf_origin import Origin
from modelpress.hf_writer import INDEX, SINGLE
from modelpress.manifest import Manifest, canonical_json, library_versions
from modelpress.pack_files import pack_file, pack_reports
from modelpress.progress import Progress, silent
from modelpress.publish import publish
from modelpress.reports import CodedTensor, CompressReport, UploadReport
from modelpress.settings import read_settings
from modelpress.shard import check_by, timeless
from modelpress.store import Store
from modelpress.store.local import local_errors
from modelpress.workloads.hf_folder import read_licence, read_object

__all__ = ["Inventory", "publish_folder", "take_inventory"]

CARD = "README.md"


@dataclass(frozen=True)
class _Source:
    """An opened folder: nothing is read before it is asked for."""

    origin: Origin
    tensors: dict[str, Stored]
    """By name in the pack."""

    @property
    def names(self) -> list[str]:
        """In reading order."""
        return sorted(self.tensors, key=natural_key)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self.tensors[name].read()


def publish_folder(
    store: Store,
    folder: Path,
    name: str,
    *,
    work: Path,
    compress: CompressConfig | None = None,
    shard: ShardConfig | None = None,
    upload: UploadConfig | None = None,
    ignore: Sequence[str] = (),
    follow_links: bool = False,
    licence: str | None = None,
    progress: Progress = silent,
) -> UploadReport:
    """Publish a folder as a pack of kind `torch`.

    A run that was killed is run again: shards that were finished are found in `work`, blobs that were sent are not sent
    again, and the pack gets the same digest. In memory are one tensor, in each form that is tried on it, at most two
    shards, and the compressed files other than safetensors; on the disk, below `work`, the compressed model until it is
    published.

    Args:
        store: the publication store.
        folder: `model.safetensors` or shards with their index, config, tokenizer; other safetensors files too.
        name: of the pack.
        work: a folder on a local disk for what is compressed and not yet sent.
        compress: how tensors are coded; the default tries every codec.
        shard: how large the pack's shards are; the folder's own play no part in it.
        upload: how many objects travel at once, and whether they are encrypted. Encrypted shards stand on the disk
            beside the others until they are published.
        ignore: globs of what is left out; see `take_inventory`.
        follow_links: see `take_inventory`.
        licence: its identifier; None takes the model card's, or `unknown`.
        progress: called with bytes read, then tensors coded, then bytes sent.

    Raises:
        ConfigError: `name` is no pack name, or a file is not published; see `take_inventory`. Or the shards are to be
            by rank, and the folder's tensors are whole.
        WorkloadError: no safetensors, or an index that names what is not there.
        CorruptionError: a safetensors file that is none, or is cut short.
        StageError: the folder was changed meanwhile.
        StoreFullError: no space for the shards.
        EncryptionKeyError: encryption without a key in the settings; see `cipher.secrets.current`.
        and see `publish`.
    """
    from modelpress.submodels import lineage  # which reads folders as this module lists them

    keys.manifests(name)
    inventory = take_inventory(folder, ignore, follow_links=follow_links)
    source = _open(inventory)
    check_by(source.names, shard or ShardConfig())
    secret = _secret(store, name) if upload is not None and upload.encrypt else None
    configs = {
        "compress": (compress or CompressConfig()).model_dump(mode="json"),
        "shard": (shard or ShardConfig()).model_dump(mode="json"),
    }
    digests = inventory.digests(progress)
    made_by = library_versions()
    key = hashlib.sha256(canonical_json({"files": digests, "versions": made_by, **configs})).hexdigest()
    with _workplace(work / key) as place:
        staged = stage(source.names, source.read, place, compress or CompressConfig(), shard or ShardConfig(), progress)
        inventory.check_unchanged()
        facts = {
            "config": configs,
            "versions": made_by,
            "lineage": {"files": digests, **lineage(folder)},
            "licence": licence or (read_licence(folder).strip("\"'") if CARD in inventory.files else "unknown"),
        }
        manifest, blobs = _draft(name, inventory, source, staged, facts)
        shards = staged.shards
        if secret is not None:
            manifest, shards, blobs = seal_pack(manifest, shards, blobs, secret, place / "sealed", progress=progress)
        report = publish(
            store,
            manifest,
            shards,
            blobs,
            config=upload,
            source_bytes=inventory.size_bytes,
            progress=progress,
        )
        shutil.rmtree(place, ignore_errors=True)
    return report


def _secret(store: Store, name: str) -> tuple[str, bytes]:
    """Id and bytes of the model's secret, by the keys of the settings; a model without one gets its first."""
    return secrets.current(store, name, wrapping_keys(read_settings()))


def _open(inventory: Inventory) -> _Source:
    """Open every safetensors file, and give each tensor its name in the pack.

    Raises:
        WorkloadError, CorruptionError: see `publish_folder`.
    """
    folder = inventory.folder
    opened = {file: open_file(folder / file) for file in inventory.weights}
    headers = {file: _header(folder / file) for file in inventory.weights}
    origin = Origin(headers=headers, model=_model_files(inventory))
    tensors: dict[str, Stored] = {}
    for file, found in opened.items():
        for own, tensor in found.items():
            given = origin.name_of(file, own)
            if given in tensors:
                raise WorkloadError(
                    f"opening {folder / file}",
                    found=f"tensor {own!r}, which stands in another file of the model too",
                    expected="each tensor once",
                    fix="save the model again with save_pretrained(folder)",
                )
            tensors[given] = tensor
    check_names(list(tensors))
    return _Source(origin, tensors)


def _model_files(inventory: Inventory) -> list[str]:
    """The files of the model itself, as transformers finds them: the single one, or those that the index names.

    Raises:
        WorkloadError, CorruptionError: an index whose files or tensors are missing, or left out.
    """
    if SINGLE in inventory.weights:
        return [SINGLE]
    if INDEX not in inventory.files:
        return inventory.weights if len(inventory.weights) == 1 else []
    open_folder(inventory.folder)
    named = sorted(set(read_object(inventory.folder / INDEX)["weight_map"].values()))
    if left_out := sorted(set(named) - set(inventory.weights)):
        raise WorkloadError(
            f"publishing {inventory.folder}",
            found=f"{left_out[0]} left out, which {INDEX} names",
            expected="the whole model",
            fix=f"leave out {INDEX} too, or nothing of it",
        )
    return named


def _header(path: Path) -> str:
    """The text of a header that `open_file` has checked."""
    with local_errors(f"reading {path}"), path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little")).decode()


def _draft(
    name: str, inventory: Inventory, source: _Source, staged: Staged, facts: Mapping[str, Any]
) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest, and the blobs of its files by their sha256."""
    blobs: dict[str, bytes] = {}
    files = []
    for file in inventory.files:
        with local_errors(f"reading {inventory.folder / file}"):
            entry, blob = pack_file(file, (inventory.folder / file).read_bytes())
        if entry.sha256 != facts["lineage"]["files"][file]:
            raise inventory.changed(file)
        blobs[entry.stored_sha256] = blob
        files.append(entry)
    reports, blob = pack_reports({"compress": timeless(_report(staged.rows).model_dump(mode="json"))})
    blobs[reports.stored_sha256] = blob
    manifest = Manifest(
        name=name,
        kind="torch",
        metadata=source.origin.to_metadata(),
        shards=tuple(record.shard for record in staged.records),
        tensors=tuple(staged.entries),
        files=tuple(files),
        reports=reports,
        **facts,
    )
    return manifest, blobs


def _report(rows: Sequence[CodedTensor]) -> CompressReport:
    raw, stored = sum(row.raw_bytes for row in rows), sum(row.stored_bytes for row in rows)
    return CompressReport(
        raw_bytes=raw,
        stored_bytes=stored,
        compression_ratio=raw / stored if stored else 1.0,
        coded_share=sum(row.raw_bytes for row in rows if row.codec != "raw") / raw if raw else 0.0,
        tensors=list(rows),
    )


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """The folder of this very publication, for one process at a time, and for no other user to read.

    Raises:
        ConfigError: another process is at it.
    """
    with local_errors(f"making {folder}", writing=True):
        folder.mkdir(0o700, parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = folder.exists() and folder.stat().st_ino == os.fstat(handle).st_ino
        except BlockingIOError:
            ours = False
        if not ours:
            raise ConfigError(
                f"publishing by way of {folder}",
                found="another process that publishes the same folder",
                fix="wait for it, and run this again: it finds what that one finished",
            )
        yield folder
    finally:
        os.close(handle)
