"""A new version of a pack that sends only what changed: each tensor as the difference to the one that is published.

What is equal is not stored. What differs is stored as the difference of its words where that takes fewer bytes: codes
on the same scales (`quantize.scales_from`) differ by a step here and there after a light fine-tune. A base stands
alone, so that a reader needs two packs at most, however many versions there have been.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from modelpress import load
from modelpress.checkpoint import Checkpoint
from modelpress.codec import CODECS, Codec, bound_bytes
from modelpress.codec.difference import subtract
from modelpress.compress import choose, compress, plain_piece, summary
from modelpress.config import CompressConfig
from modelpress.container import Coded, StoredTensor
from modelpress.container.base import PackTensors
from modelpress.container.tensors import to_bytes
from modelpress.errors import ConfigError
from modelpress.manifest import TensorEntry
from modelpress.progress import Progress, silent
from modelpress.reports import CodedTensor, CompressReport, DeltaReport
from modelpress.store.base import Store


def find_base(store: Store, name: str, ref: str) -> str:
    """Digest of the pack that stands alone behind a reference: itself, or the base that it is stored as differences to.

    Raises:
        NotFoundError: there is no such pack or alias.
        ConfigError: `ref` is neither alias nor digest.
        CorruptionError: its manifest is damaged.
    """
    digest = load.resolve(store, name, ref)
    return load.load_manifest(store, name, digest).base or digest


def open_base(store: Store, name: str, digest: str) -> PackTensors:
    """The tensors of a pack that `find_base` found.

    Raises:
        see `load.load_manifest`.
    """
    manifest = load.load_manifest(store, name, digest)
    return PackTensors(manifest, load.fetcher(store, manifest))


def compress_against(
    checkpoint: Checkpoint, config: CompressConfig, base: PackTensors, progress: Progress = silent
) -> tuple[Coded, CompressReport]:
    """`compress`, with tensors stored as the difference to a base's where that takes fewer bytes.

    A difference must decode as fast as the config asks, the base's tensor included. Where all of it would take more
    than `config.max_delta_share` of the whole tensors' bytes, the result stands alone; `CompressReport.delta` says so.

    Args:
        checkpoint: the new version.
        config: the codecs, the floor and the share; `base` is the digest of the pack.
        base: a pack that stands alone.
        progress: told of each tensor.

    Raises:
        ConfigError: the base is not the config's, or is stored as differences itself; and see `compress`.
        StoreError, FormatError: the base cannot be read.
    """
    doing = f"storing differences to pack {base.manifest.name}@{base.manifest.digest}"
    if config.base != base.manifest.digest:
        raise ConfigError(doing, found=f"compress.base {config.base!r}", expected="that pack's digest")
    if base.manifest.base is not None:
        found = f"a pack that is stored as differences to {base.manifest.base}"
        raise ConfigError(doing, found=found, expected="one that stands alone: that base")
    config = config.model_copy(update={"base": None})
    coded, report = compress(checkpoint, config, progress)
    # Each tensor of the base serves one: that of its name, or else one that is equal.
    free = [one for one in base.manifest.tensors if one.name not in checkpoint.tensors]
    renamed = {(one.raw_sha256, one.dtype, one.shape): one.name for one in reversed(free)}
    stored: list[StoredTensor] = []
    rows: list[CodedTensor] = []
    for number, (tensor, row) in enumerate(zip(coded.tensors, report.tensors, strict=True)):
        progress(number, len(coded.tensors), f"difference of {tensor.name}")
        piece, entry = tensor.piece, base.entries.get(tensor.name)
        if entry is not None and (entry.dtype, entry.shape) == (piece.dtype.name, piece.shape):
            equal = entry.name if entry.raw_sha256 == tensor.raw_sha256 else None
        else:
            entry, equal = None, renamed.pop((tensor.raw_sha256, piece.dtype.name, piece.shape), None)
        if equal is not None:
            tensor = StoredTensor.unchanged(tensor.name, tensor.raw_sha256, equal, piece.dtype, piece.shape)
            row = row.model_copy(update={"codec": "raw", "stored_bytes": 0, "entropy_bound_bytes": 0.0, "base": equal})
        elif entry is not None:
            tensor, row = _difference(checkpoint, tensor, row, entry, base, config)
        stored.append(tensor)
        rows.append(row)
    delta = _judge(report, rows, base.manifest.digest, config.max_delta_share)
    if not delta.chosen:
        return coded, report.model_copy(update={"delta": delta})
    made = replace(coded, tensors=tuple(stored), base=base.manifest.digest)
    return made, summary(rows).model_copy(update={"delta": delta})


def _difference(
    checkpoint: Checkpoint,
    whole: StoredTensor,
    row: CodedTensor,
    entry: TensorEntry,
    base: PackTensors,
    config: CompressConfig,
) -> tuple[StoredTensor, CodedTensor]:
    """The tensor as a difference if that is smaller, else as it was; the row tells of both."""
    dtype, shape = whole.piece.dtype, whole.piece.shape
    raw = to_bytes(checkpoint.tensors[whole.name])
    difference = subtract(raw, base.read(entry.name), dtype)
    plain = plain_piece(whole.name, dtype, shape, difference)
    choice = choose(difference, dtype, plain, whole.raw_sha256, config, _floor(config, CODECS[entry.codec]))
    costs = {codec: cost for codec, cost in choice.costs.items() if codec != plain.codec}
    row = row.model_copy(update={"differences": costs})
    if choice.piece is plain or costs[choice.piece.codec] >= row.candidates[row.codec]:
        return whole, row
    bound = bound_bytes(difference, dtype)
    found = {
        "codec": choice.piece.codec,
        "stored_bytes": choice.piece.stored_bytes,
        "entropy_bound_bytes": bound,
        "decode_seconds": choice.seconds,
        "too_slow": choice.too_slow,
        "not_tried": choice.not_tried,
        "base": entry.name,
    }
    return StoredTensor(choice.piece, whole.raw_sha256, math.ceil(bound), entry.name), row.model_copy(update=found)


def _floor(config: CompressConfig, base: Codec) -> float:
    """How fast a difference must decode, so that the base's tensor and it take no longer than the config allows."""
    if not config.min_decode_bytes_per_second:
        return 0.0
    left = 1 / config.min_decode_bytes_per_second - 1 / base.decode_bytes_per_second
    return 1 / left if left > 0 else math.inf


def _judge(whole: CompressReport, rows: Sequence[CodedTensor], base: str, most: float) -> DeltaReport:
    equal = sum(row.base is not None and not row.stored_bytes for row in rows)
    differences = sum(row.base is not None for row in rows) - equal
    full_bytes = sum(row.candidates[row.codec] for row in whole.tensors)
    delta_bytes = sum(
        row.candidates[row.codec] if row.base is None else row.differences[row.codec] if row.stored_bytes else 0
        for row in rows
    )
    share = delta_bytes / full_bytes if full_bytes else 1.0
    if not equal + differences:
        reason = "no tensor is equal to the base's, or smaller as the difference to it"
    else:
        reason = f"{share:.1%} of the whole tensors' bytes, of {most:.1%} that compress.max_delta_share allows"
    return DeltaReport(
        base=base,
        chosen=share <= most and equal + differences > 0,
        reason=reason,
        full_bytes=full_bytes,
        delta_bytes=delta_bytes,
        share=share,
        equal=equal,
        differences=differences,
        whole=len(rows) - equal - differences,
    )
