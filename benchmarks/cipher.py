"""Encryption of one blob on one core: how fast it is sealed and opened, in which memory, at which segment size.

`python -m benchmarks.cipher [--quick] [--write]`. Peers, over the same bytes in the same run: AES-256-GCM of the whole
blob at once (no streaming, and the blob in memory twice), ChaCha20-Poly1305 in segments, and sha256 alone, which every
blob passes anyway. Figures are bytes per second of CPU time; sealing has the check of the digest in it.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from benchmarks._report import Row, main
from modelpress.cipher.stream import Opener, seal
from modelpress.manifest import TAG_BYTES, Encryption, Plain

SECRET = b"s" * 32
SEGMENTS = (2**14, 2**16, 2**18, 2**20, 2**22)
PIECE = 2**16
"""Bytes that come in at a time, as from a socket."""


def measure(quick: bool) -> Iterator[Row]:
    """Rows of every segment size and of the peers."""
    size, rounds = (64 * 2**20, 3) if quick else (512 * 2**20, 5)
    data = os.urandom(2**20) * (size >> 20)
    plain = Plain(sha256=hashlib.sha256(data).hexdigest(), size_bytes=size)
    for segment in SEGMENTS:
        encryption = Encryption(secret="0" * 32, segment_bytes=segment)
        case, system = "one blob, one core", f"modelpress, segments of {segment >> 10} KiB"
        sealed = b"".join(_sealed(data, plain, encryption))
        seals, opens = partial(_sealed, data, plain, encryption), partial(_opened, sealed, plain, encryption)
        yield Row(case, system, "seal", "GB/s", _rate(rounds, size, partial(_drain, seals)))
        yield Row(case, system, "open", "GB/s", _rate(rounds, size, partial(_drain, opens)))
        yield Row(case, system, "memory to seal", "MiB", _peak(seals))
        yield Row(case, system, "memory to open", "MiB", _peak(opens))
        yield Row(case, system, "more bytes", "%", 100 * (len(sealed) - size) / size)
    yield from _peers(data, rounds)


def _peers(data: bytes, rounds: int) -> Iterator[Row]:
    case, nonce, size = "one blob, one core", bytes(12), len(data)
    gcm, chacha = AESGCM(SECRET), ChaCha20Poly1305(SECRET)
    whole = gcm.encrypt(nonce, data, None)
    yield Row(case, "AES-256-GCM at once", "seal", "GB/s", _rate(rounds, size, lambda: gcm.encrypt(nonce, data, None)))
    yield Row(case, "AES-256-GCM at once", "open", "GB/s", _rate(rounds, size, lambda: gcm.decrypt(nonce, whole, None)))
    yield Row(case, "AES-256-GCM at once", "memory to open", "MiB", len(data) / 2**20)
    step, view = 2**20, memoryview(data)
    name, starts = "ChaCha20-Poly1305, segments of 1024 KiB", range(0, size, step)
    yield Row(
        *(case, name, "seal", "GB/s"),
        _rate(rounds, size, lambda: _count(chacha.encrypt(nonce, view[at : at + step], None) for at in starts)),
    )
    parts = [chacha.encrypt(nonce, view[at : at + step], None) for at in starts]
    opened = _rate(rounds, size, lambda: _count(chacha.decrypt(nonce, part, None) for part in parts))
    yield Row(case, name, "open", "GB/s", opened)
    yield Row(case, "sha256 alone", "seal", "GB/s", _rate(rounds, size, lambda: hashlib.sha256(data).digest()))


def _sealed(data: bytes, plain: Plain, encryption: Encryption) -> Iterator[bytes]:
    return seal(io.BytesIO(data), plain, SECRET, encryption, "sealing")


def _opened(sealed: bytes, plain: Plain, encryption: Encryption) -> Iterator[bytes]:
    opener, view = Opener(plain, SECRET, encryption, "opening"), memoryview(sealed)
    piece = max(PIECE, encryption.segment_bytes + TAG_BYTES)  # a reader asks for whole segments, or for several
    for start in range(0, len(view), piece):
        yield opener.feed(view[start : start + piece])
    opener.finish()


def _count(parts: Iterable[bytes]) -> int:
    return sum(len(part) for part in parts)


def _drain(work: Callable[[], Iterator[bytes]]) -> int:
    return _count(work())


def _rate(rounds: int, size: int, work: Callable[[], object]) -> float:
    """GB per second of CPU time, the best of several rounds."""
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return size / min(taken) / 1e9


def _peak(work: Callable[[], Iterator[bytes]]) -> float:
    """MiB that are allocated at most while the parts pass by."""
    tracemalloc.start()
    try:
        _count(work())
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


if __name__ == "__main__":
    main("cipher", measure, note="Bytes per second of CPU time on one core, in 10⁹; the best round counts.\n")
