"""Tensors while their shards are still on the way: fetched by range, hashed and decoded as the bytes come.

Two threads bring shards, each into a buffer that is used again; this thread decodes what has come, straight into the
memory that the tensors keep, and others hash it. So it takes the model, and `IN_FLIGHT` shards; of an encrypted pack
twice as many, the opened ones beside them.

A tensor is given out when the digests of all shards that hold it are known to hold, and its own. These two imply the
third that a manifest has, that of its coded bytes, which is left to `verify`: equal shards hold equal coded bytes.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from modelpress.cipher import Opener
from modelpress.codec import Buffer
from modelpress.container.read import Begun, Original, check_original
from modelpress.container.safetensors_file import MAX_HEADER_BYTES, read
from modelpress.container.stored import RAW, Piece, read_pieces
from modelpress.cores import usable_cores
from modelpress.errors import CorruptionError, FormatError, SetupError
from modelpress.load.blobs import Blobs, GivenUpError
from modelpress.manifest import Manifest, TensorEntry
from modelpress.store.receive import memory
from modelpress.store.threads import DaemonPool

IN_FLIGHT = 2
"""Shards in memory at a time: one that is decoded, and one on its way."""
RUN_BYTES = 8 * 2**20
"""A tensor of more stored bytes is decoded in runs of chunks of about so many, as they come."""


def stream_tensors(
    manifest: Manifest,
    blobs: Blobs,
    *,
    threads: int | None = None,
    original: Original | None = None,
    stopped: threading.Event | None = None,
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """Every tensor of a pack, verified, in the manifest's order: what `container.read_tensors` gives.

    When it raises, or is closed, its threads have ended; what was decoded and not given out is gone.

    Args:
        manifest: of the pack.
        blobs: where its shards come from.
        threads: that decode at the same time, and that hash; by default as many as this process may use cores.
        original: gives the base's tensors, where the pack is stored as differences; it is called by one thread.
        stopped: is set when the reader has ended, so that what `original` waits for ends as well.

    Raises:
        NotFoundError: a shard is not there.
        CorruptionError: a shard or a decoded tensor is not what the manifest says.
        UnsupportedFormatError: a codec or a format version that this release does not know.
    """
    check_original(manifest, original)
    threads = threads or usable_cores()
    stream = _Stream(manifest, blobs, stopped or threading.Event())
    hashing = ThreadPoolExecutor(1 if original else threads, thread_name_prefix="tensor-sha256")
    begun: dict[str, Begun] = {}

    def taken(entry: TensorEntry) -> torch.Tensor:
        """A tensor of which nothing is stored here: the base's, as it is."""
        doing = f"reading tensor {entry.name!r} of pack {manifest.name}"
        return hashing.submit(Begun(entry, coded_digest=False).finish, doing, original).result()

    try:
        due = _due(manifest)
        for entry in due[-1]:
            yield entry.name, taken(entry)
        for position in range(len(manifest.shards)):
            doing = f"from shard {manifest.shards[position].sha256}"
            shard = stream.shard(position)
            finished: dict[str, Future[torch.Tensor]] = {}
            try:
                for entry, piece, end in _runs(manifest, position, shard, stream.entries(position)):
                    where = f"reading tensor {entry.name!r} {doing}"
                    shard.wait(end)
                    started = begun.setdefault(entry.name, Begun(entry, coded_digest=False))
                    started.add(piece, where, threads)
                    if piece.start + piece.count == piece.elements and position == entry.shards[-1]:
                        finished[entry.name] = hashing.submit(begun.pop(entry.name).finish, where, original)
                    del piece, started
            except FormatError:
                stream.check(position)  # a digest that does not hold is the better reason
                raise
            del shard
            stream.release(position)
            for entry in due[position]:
                if entry.is_base:
                    yield entry.name, taken(entry)
                    continue
                if entry.name not in finished:
                    begun.pop(entry.name).finish(f"reading tensor {entry.name!r} {doing}")  # which says what lacks
                yield entry.name, finished.pop(entry.name).result()
    finally:
        stream.close()
        hashing.shutdown(wait=True, cancel_futures=True)


def _due(manifest: Manifest) -> dict[int, list[TensorEntry]]:
    """The tensors in their order, by the shard after which they are whole; -1: before any."""
    due: dict[int, list[TensorEntry]] = {position: [] for position in range(-1, len(manifest.shards))}
    last = -1
    for entry in manifest.tensors:
        last = entry.shards[-1] if entry.shards else last
        due[last].append(entry)
    return due


class _Arriving:
    """One shard while it comes. What is there is read by one thread and changes no more."""

    def __init__(self, plain: memoryview) -> None:
        self.plain = plain
        self._count = 0
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def came(self, count: int) -> None:
        """So many more bytes are there."""
        with self._changed:
            self._count += count
            self._changed.notify_all()

    def fail(self, failure: BaseException) -> None:
        """No more will come."""
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def wait(self, end: int) -> None:
        """Return when the bytes up to `end` are there; raise why they will not be."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._count >= end)
            if self._failure is not None:
                raise self._failure


@dataclass
class _Slot:
    """A buffer for stored bytes, and the thread that fills it."""

    buffer: memoryview
    bringing: Future[None] | None = None


class _Stream:
    """The shards of a pack, in order, the next ones brought while one is read."""

    def __init__(self, manifest: Manifest, blobs: Blobs, stopped: threading.Event) -> None:
        self._manifest, self._blobs, self._stopped = manifest, blobs, stopped
        count = min(IN_FLIGHT, len(manifest.shards))
        largest = max((shard.size_bytes for shard in manifest.shards), default=0)
        self._slots = [_Slot(self._memory(largest)) for _ in range(count)]
        self._pool = DaemonPool(max(count, 1), "shard")
        self._arriving: dict[int, _Arriving] = {}
        self._entries: dict[int, list[TensorEntry]] = {}
        for entry in manifest.tensors:
            for position in entry.shards:
                self._entries.setdefault(position, []).append(entry)
        try:
            for position in range(count):
                self._start(position)
        except BaseException:
            self.close()
            raise

    def entries(self, position: int) -> list[TensorEntry]:
        """The tensors that have a piece in a shard."""
        return self._entries[position]

    def shard(self, position: int) -> _Arriving:
        """A shard, arriving or there."""
        return self._arriving[position]

    def check(self, position: int) -> None:
        """Wait until a shard has come; raise why it is not sound."""
        bringing = self._slots[position % len(self._slots)].bringing
        assert bringing is not None
        bringing.result()

    def release(self, position: int) -> None:
        """Wait until a shard's digest holds, forget its bytes, and begin with another one in its place."""
        self.check(position)
        del self._arriving[position]
        if position + len(self._slots) < len(self._manifest.shards):
            self._start(position + len(self._slots))

    def close(self) -> None:
        """End the threads, and wait for that; they wait for no server."""
        self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, position: int) -> None:
        slot, shard = self._slots[position % len(self._slots)], self._manifest.shards[position]
        opening = self._blobs.opener(shard.sha256)
        stored = slot.buffer[: shard.size_bytes]
        arriving = _Arriving(stored if opening is None else self._memory(shard.content.size_bytes))
        self._arriving[position] = arriving
        slot.bringing = self._pool.submit(self._bring, shard.sha256, stored, arriving, opening)

    def _memory(self, size: int) -> memoryview:
        try:
            return memory(size)
        except (OSError, OverflowError, ValueError, MemoryError) as error:
            raise SetupError(
                f"reading pack {self._manifest.name}",
                found=f"shards of up to {size} bytes, {IN_FLIGHT} at a time, and no memory for them ({error})",
                expected="shards that this machine can hold",
                fix="publish it again with a smaller max_shard_size",
            ) from error

    def _bring(self, digest: str, stored: memoryview, arriving: _Arriving, opening: Opener | None) -> None:
        written = 0

        def give(plain: bytes) -> None:
            nonlocal written
            arriving.plain[written : written + len(plain)] = plain  # of another length than was said: ValueError
            written += len(plain)
            arriving.came(len(plain))

        def arrived(data: memoryview) -> None:
            if self._stopped.is_set():
                raise GivenUpError
            if opening is None:
                arriving.came(len(data))
            else:
                give(opening.feed(data))

        try:
            self._blobs.read_into(digest, stored, arrived)
            if opening is not None:
                opening.finish()
        except BaseException as error:
            arriving.fail(error)
            raise


def _runs(
    manifest: Manifest, position: int, shard: _Arriving, entries: list[TensorEntry]
) -> list[tuple[TensorEntry, Piece, int]]:
    """What is decoded of a shard, and the byte up to which it must have come, in that order.

    Waits for the header alone. Raises what is wrong with it.
    """
    doing = f"reading shard {position} ({manifest.shards[position].sha256}) of pack {manifest.name}"
    shard.wait(min(8, len(shard.plain)))
    header = 8 + int.from_bytes(shard.plain[:8], "little")
    if header <= min(8 + MAX_HEADER_BYTES, len(shard.plain)):
        shard.wait(header)
    pieces = {piece.name: piece for piece in read_pieces(*read(shard.plain, doing), doing)}
    begin = np.frombuffer(shard.plain, np.uint8).ctypes.data
    runs: list[tuple[TensorEntry, Piece, int]] = []
    for entry in entries:
        piece = pieces.pop(entry.name, None)
        if piece is None:
            raise CorruptionError(
                f"reading tensor {entry.name!r} from shard {manifest.shards[position].sha256}",
                found="no such tensor in the shard",
                expected=f"{entry.dtype} {list(entry.shape)}",
            )
        end = 0
        for part in _cut(
            piece
        ):  # runs of one tensor stay in their order, though the last stream may have no byte of one
            end = max(end, *(_end(stream.body, begin) for stream in part.streams))
            runs.append((entry, part, end))
    if pieces:
        raise CorruptionError(
            doing, found=f"tensor {next(iter(pieces))!r}", expected="only the tensors that the manifest puts there"
        )
    return sorted(runs, key=lambda run: run[2])


def _end(body: Buffer, begin: int) -> int:
    """Where a part of a shard ends in it."""
    return np.frombuffer(body, np.uint8).ctypes.data + len(body) - begin if len(body) else 0


def _cut(piece: Piece) -> list[Piece]:
    """A piece in runs of chunks, of about RUN_BYTES each; a small one whole."""
    parts = -(-piece.stored_bytes // RUN_BYTES)
    unit = 1 if piece.codec == RAW else piece.chunk_symbols
    units = -(-piece.count // unit)
    if min(parts, units) < 2:
        return [piece]
    cuts = [units * number // parts * unit for number in range(parts)] + [piece.count]
    return [piece.cut(piece.start + first, last - first) for first, last in itertools.pairwise(cuts) if last > first]
