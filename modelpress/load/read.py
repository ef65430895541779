"""From a manifest to tensors and files: every byte is read and checked."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

from modelpress import keys
from modelpress.checkpoint import Checkpoint
from modelpress.cipher import opener
from modelpress.container import read_tensors
from modelpress.errors import CorruptionError, NotFoundError
from modelpress.load.names import MIN_PREFIX, load_manifest, resolve
from modelpress.manifest import Manifest
from modelpress.pack_files import read_files, read_reports
from modelpress.progress import Progress, silent
from modelpress.reports import VerifyReport
from modelpress.store.base import Store, check_digest


def load_checkpoint(store: Store, name: str, digest: str, progress: Progress = silent) -> tuple[Manifest, Checkpoint]:
    """Read a pack, one shard at a time, with everything verified; `progress` counts bytes.

    Raises:
        NotFoundError: the pack, or one of its blobs, is not there.
        CorruptionError: any digest or length differs; the message names the shard, the tensor or the file.
        EncryptionKeyError: the pack is encrypted, and none of the keys that the settings name opens it.
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


def fetcher(store: Store, manifest: Manifest, progress: Progress = silent) -> Callable[[str], bytes]:
    """Read a blob of the pack by its sha256, never more bytes than the manifest says; errors name the pack's part.

    The blobs of an encrypted pack are verified and opened with the keys that the settings name.

    Raises:
        EncryptionKeyError: none of the keys opens the pack; see `cipher.opener`.
    """
    sizes, opener_of = manifest.blobs(), opener(store, manifest)
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
        if (sealed := opener_of(digest, doing)) is None:
            return data
        check_digest(f"{doing} from {store.uri}/{keys.blob(digest)}", hashlib.sha256(data).hexdigest(), digest)
        return sealed.open(data)

    return fetch
