"""The files of a pack (graph, tokenizer, reports): each a blob of its own, as it is or as one zstandard frame."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import zstandard

from modelpress.errors import CorruptionError
from modelpress.manifest import FileEntry, Manifest, canonical_json
from modelpress.strictjson import loads

MAX_FILE_BYTES = 2**31
REPORTS_NAME = "reports.json"
FILE_LEVEL = 19


def pack_file(name: str, data: bytes) -> tuple[FileEntry, bytes]:
    """Store a file as a zstandard frame where that is smaller, else as it is: its entry and its blob."""
    coded = zstandard.ZstdCompressor(level=FILE_LEVEL).compress(data)
    codec, stored = ("zstd", coded) if len(coded) < len(data) else ("raw", data)
    entry = FileEntry.model_validate(
        {
            "name": name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "size_bytes": len(data),
            "codec": codec,
            "stored_sha256": hashlib.sha256(stored).hexdigest(),
            "stored_bytes": len(stored),
        }
    )
    return entry, stored


def unpack_file(entry: FileEntry, content: bytes) -> bytes:
    """The file behind an entry, verified; `content` is its blob, opened where the pack is encrypted.

    Raises:
        CorruptionError: the blob or the file is not what the entry says.
    """
    doing, expected = f"reading file {entry.name!r}", entry.content.sha256
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise CorruptionError(doing, found=f"blob sha256 {found}", expected=f"blob sha256 {expected}")
    data = content
    if entry.codec == "zstd":
        data = _decompress(doing, content, entry.size_bytes)
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256 or len(data) != entry.size_bytes:
        raise CorruptionError(
            doing,
            found=f"{len(data)} bytes, sha256 {found}",
            expected=f"{entry.size_bytes} bytes, sha256 {entry.sha256}",
        )
    return data


def read_files(manifest: Manifest, fetch: Callable[[str], bytes]) -> dict[str, bytes]:
    """Every file of a pack (without the reports), verified; `fetch` gives the blob of a sha256, opened."""
    return {entry.name: unpack_file(entry, fetch(entry.stored_sha256)) for entry in manifest.files}


def read_reports(manifest: Manifest, fetch: Callable[[str], bytes]) -> dict[str, Any]:
    """The reports of a pack, by stage; empty when it has none."""
    if manifest.reports is None:
        return {}
    return loads(unpack_file(manifest.reports, fetch(manifest.reports.stored_sha256)), "reading the reports")


def pack_reports(reports: Mapping[str, Any]) -> tuple[FileEntry, bytes]:
    """Entry and blob of the stages' reports (JSON values, by stage)."""
    return pack_file(REPORTS_NAME, canonical_json(dict(reports)))


def _decompress(doing: str, stored: bytes, size: int) -> bytes:
    """One standard frame of `size` bytes; its own header must agree before anything is allocated."""
    try:
        claimed = zstandard.get_frame_parameters(stored).content_size
        if claimed != size or size > MAX_FILE_BYTES:
            raise CorruptionError(doing, found=f"a frame of {claimed} bytes", expected=f"{size} bytes")
        return zstandard.ZstdDecompressor().decompress(stored, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptionError(doing, found=str(error), expected="a zstandard frame") from error
