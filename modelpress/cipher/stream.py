"""One blob, encrypted in segments: AES-256-GCM in the STREAM construction.

Each segment is sealed under a nonce of its number and of whether it is the last one, so that a stream that is cut,
reordered or repeated is refused at the segment where it happens (Hoang, Reyhanitabar, Rogaway, Vizár: "Online
Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance", CRYPTO 2015, https://eprint.iacr.org/2015/189, section
7). Bounded memory: a segment, on either side.

The key of a blob is derived (HKDF-SHA256, RFC 5869) from the model's secret, the segments' length and the sha256 of the
bytes: it seals these bytes, cut this way, and nothing else ever, so that nonces that count are unique. Equal bytes
under one secret are equal blobs: versions share them, and a publication that is repeated gets the same digests.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from modelpress.errors import CorruptionError
from modelpress.manifest import TAG_BYTES, Encryption, Plain

if TYPE_CHECKING:
    from typing_extensions import Buffer

KEY_BYTES: Final = 32
LABEL: Final = b"modelpress blob v1"


class Readable(Protocol):
    """A binary file, or what reads like one."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""


def blob_key(secret: bytes, plain: Plain, segment_bytes: int) -> bytes:
    """The key of one blob, 32 bytes, from the model's secret."""
    return derive(secret, LABEL + segment_bytes.to_bytes(8, "little") + bytes.fromhex(plain.sha256), KEY_BYTES)


def derive(secret: bytes, info: bytes, size: int) -> bytes:
    """HKDF-SHA256 without salt: the secret is random as it is."""
    return HKDF(SHA256(), size, salt=None, info=info).derive(secret)


def seal(source: Readable, plain: Plain, secret: bytes, encryption: Encryption, doing: str) -> Iterator[bytes]:
    """The segments of a blob, sealed, in order.

    Whoever writes them keeps none if this raises: only at the end is it known that the bytes are those that the key is
    for.

    Args:
        source: the bytes.
        plain: their digest and length.
        secret: the model's, 32 bytes.
        encryption: of the manifest.
        doing: for errors.

    Raises:
        CorruptionError: `source` holds other bytes than `plain` says.
    """
    cipher = AESGCM(blob_key(secret, plain, encryption.segment_bytes))
    identity, digest, size = bytes.fromhex(plain.sha256), hashlib.sha256(), 0
    count = encryption.segments(plain.size_bytes)
    for number in range(count):
        segment = _read(source, min(encryption.segment_bytes, plain.size_bytes - size))
        digest.update(segment)
        size += len(segment)
        yield cipher.encrypt(_nonce(number, number == count - 1), segment, identity)
    beyond = len(source.read(1))
    if beyond or size != plain.size_bytes or digest.hexdigest() != plain.sha256:
        raise CorruptionError(
            doing,
            found=f"{size + beyond} bytes, sha256 {digest.hexdigest()}" + (" of the first of them" if beyond else ""),
            expected=f"{plain.size_bytes} bytes, sha256 {plain.sha256}",
            fix="something changed them after they were written: run the stage again",
        )


class Opener:
    """Opens a sealed blob while its bytes come in, in pieces of any length: `feed` gives what is proved, no more.

    Holds less than one segment beside what it is given. Called from one thread at a time; several openers work at once
    (the decryption itself holds no lock of Python's).

    Args:
        plain: digest and length of the bytes before they were sealed.
        secret: the model's, 32 bytes.
        encryption: of the manifest.
        doing: for errors.
    """

    def __init__(self, plain: Plain, secret: bytes, encryption: Encryption, doing: str) -> None:
        self._cipher = AESGCM(blob_key(secret, plain, encryption.segment_bytes))
        self._identity, self._doing = bytes.fromhex(plain.sha256), doing
        self._encryption, self._plain = encryption, plain
        self._count = encryption.segments(plain.size_bytes)
        self._number, self._waiting = 0, bytearray()

    def feed(self, data: bytes | memoryview) -> bytes:
        """The next sealed bytes; the bytes of all segments that are whole by now.

        Raises:
            CorruptionError: a segment is not what was sealed here, or there are more bytes than were sealed.
        """
        view, out = memoryview(data).cast("B"), []
        while view:
            if self._number == self._count:
                raise self._refusal(f"bytes behind the last of {self._count} segments")
            size = self._sealed_size(self._number)
            if not self._waiting and len(view) >= size:
                segment, view = view[:size], view[size:]
                out.append(self._next(segment))
                continue
            missing = size - len(self._waiting)
            self._waiting += view[:missing]
            view = view[missing:]
            if len(self._waiting) == size:
                out.append(self._next(self._waiting))
                self._waiting = bytearray()
        return out[0] if len(out) == 1 else b"".join(out)

    def finish(self) -> None:
        """Say that nothing follows.

        Raises:
            CorruptionError: something is missing.
        """
        if self._number != self._count:
            raise self._refusal(f"the end in segment {self._number} of {self._count}")

    def open(self, data: Buffer) -> bytes:
        """A whole blob at once.

        Raises:
            CorruptionError: see `feed` and `finish`.
        """
        view, out, step = memoryview(data).cast("B"), io.BytesIO(), self._encryption.segment_bytes + TAG_BYTES
        for start in range(0, len(view), step):
            out.write(self.feed(view[start : start + step]))
        self.finish()
        return out.getvalue()

    def open_segment(self, number: int, data: bytes | memoryview) -> bytes:
        """One segment alone, for ranged reads: sealed, it lies at `number * (segment_bytes + 16)`.

        Raises:
            CorruptionError: it is not what was sealed here.
        """
        if not 0 <= number < self._count or len(data) != self._sealed_size(number):
            raise self._refusal(f"{len(data)} bytes as segment {number} of {self._count}")
        try:
            return self._cipher.decrypt(_nonce(number, number == self._count - 1), data, self._identity)
        except InvalidTag:
            raise self._refusal(f"segment {number} of {self._count}, which this key did not seal") from None

    def _next(self, segment: bytes | bytearray | memoryview) -> bytes:
        opened = self.open_segment(self._number, memoryview(segment))
        self._number += 1
        return opened

    def _sealed_size(self, number: int) -> int:
        step = self._encryption.segment_bytes
        return min(step, self._plain.size_bytes - number * step) + TAG_BYTES

    def _refusal(self, found: str) -> CorruptionError:
        return CorruptionError(
            self._doing,
            found=found,
            expected=f"{self._count} segments, sealed for sha256 {self._plain.sha256}",
            fix="the blob was damaged or exchanged: delete it and publish the pack again",
        )


def _nonce(number: int, last: bool) -> bytes:
    """96 bits: the segment's number in 11 bytes, and 1 in the last byte of the last segment."""
    return number.to_bytes(11, "little") + bytes([last])


def _read(source: Readable, size: int) -> bytes:
    """`size` bytes, or what is left."""
    parts, missing = [], size
    while missing and (part := source.read(missing)):
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
