"""Packs: a drafted one is sealed before it is published, and its blobs are opened when they are read."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from modelpress.cipher.beside import secret_of
from modelpress.cipher.stream import Opener, Readable, seal
from modelpress.cipher.wrapping import WrappingKey
from modelpress.errors import StageError
from modelpress.manifest import Encryption, FileEntry, Manifest, Plain, ShardEntry
from modelpress.progress import Progress, silent
from modelpress.store.base import Store
from modelpress.store.local import local_errors

if TYPE_CHECKING:
    from modelpress.shard import ShardFile


def seal_pack(
    manifest: Manifest,
    shards: Sequence[ShardFile],
    blobs: Mapping[str, bytes],
    secret: tuple[str, bytes],
    folder: Path,
    *,
    segment_bytes: int = 2**18,
    progress: Progress = silent,
) -> tuple[Manifest, list[ShardFile], dict[str, bytes]]:
    """What `draft_manifest` gave, encrypted: the same three, for `publish`.

    The same pack, secret and segments give the same bytes, so that a publication that was cut off goes on. Memory: one
    segment, and the files' blobs once more.

    Args:
        manifest: of a pack that is not encrypted.
        shards: its shards' files, which stay as they are.
        blobs: the blobs of its files and reports, by sha256.
        secret: id and bytes, as `secrets.current` gives them.
        folder: takes the encrypted shards.
        segment_bytes: of the encrypted blobs.
        progress: called with the shards that are done, and all.

    Raises:
        StageError: the pack is encrypted already.
        CorruptionError: a shard's file is not what the manifest says; nothing of it stays in `folder`.
        StoreFullError: no space left in `folder`.
    """
    if manifest.encryption is not None:
        raise StageError(f"encrypting pack {manifest.name}", found="an encrypted pack", expected="a drafted one")
    encryption = Encryption(secret=secret[0], segment_bytes=segment_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    sealed: dict[str, ShardFile] = {}
    for number, shard in enumerate(shards):
        progress(number, len(shards))
        sealed[shard.sha256] = _seal_shard(shard, secret[1], encryption, folder)
    progress(len(shards), len(shards))
    entries, out = {}, dict[str, bytes]()
    for file in manifest.blob_files():
        entry, blob = _seal_file(file, blobs[file.stored_sha256], secret[1], encryption)
        entries[file.name if file is not manifest.reports else None] = entry
        out[entry.stored_sha256] = blob
    shard_entries = [_shard_entry(entry, sealed[entry.sha256]) for entry in manifest.shards]
    content = manifest.model_dump(mode="json") | {
        "format_version": 3,
        "encryption": encryption.model_dump(mode="json"),
        "shards": [entry.model_dump(mode="json") for entry in shard_entries],
        "files": [entries[file.name].model_dump(mode="json") for file in manifest.files],
        "reports": entries[None].model_dump(mode="json") if manifest.reports else None,
    }
    return Manifest.model_validate(content), list(sealed.values()), out


def opener(
    store: Store, manifest: Manifest, wrapping: Sequence[WrappingKey] | None = None
) -> Callable[[str, str], Opener | None]:
    """For each blob of a pack, by its sha256, what opens it; None for a pack that is not encrypted.

    The returned function takes the blob's digest and what is being done, for errors.

    Args:
        store: holds the model's wrapped secrets.
        manifest: the pack.
        wrapping: the keys that open the secrets; by default those that the settings name.

    Raises:
        EncryptionKeyError: none of the keys opens the pack's secret.
        CorruptionError: the wrapped secret was changed.
        AccessDeniedError, StoreUnavailableError: of KMS, or of the store.
    """
    encryption = manifest.encryption
    if encryption is None:
        return lambda _digest, _doing: None
    secret = secret_of(store, manifest.name, encryption, wrapping)
    contents = {shard.sha256: shard.content for shard in manifest.shards}
    contents |= {file.stored_sha256: file.content for file in manifest.blob_files()}
    return lambda digest, doing: Opener(contents[digest], secret, encryption, doing)


def _seal_shard(shard: ShardFile, secret: bytes, encryption: Encryption, folder: Path) -> ShardFile:
    path, plain = folder / f"{shard.path.name}.sealed", Plain(sha256=shard.sha256, size_bytes=shard.size_bytes)
    doing, digest, size = f"encrypting shard {shard.path}", sha256(), 0
    try:
        with local_errors(doing), shard.path.open("rb") as source, path.open("wb") as target:
            for segment in seal(source, plain, secret, encryption, doing):
                digest.update(segment)
                target.write(segment)
                size += len(segment)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return replace(shard, path=path, sha256=digest.hexdigest(), size_bytes=size)


def _seal_file(file: FileEntry, blob: bytes, secret: bytes, encryption: Encryption) -> tuple[FileEntry, bytes]:
    source: Readable = io.BytesIO(blob)
    sealed = b"".join(seal(source, file.content, secret, encryption, f"encrypting file {file.name!r}"))
    changed = {
        "stored_sha256": sha256(sealed).hexdigest(),
        "stored_bytes": len(sealed),
        "plain": file.content,
    }
    return file.model_copy(update=changed), sealed


def _shard_entry(entry: ShardEntry, sealed: ShardFile) -> ShardEntry:
    return ShardEntry(sha256=sealed.sha256, size_bytes=sealed.size_bytes, plain=entry.content)
