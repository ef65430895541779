"""One blob: what is sealed opens again in any pieces, and nothing else opens."""

from __future__ import annotations

import hashlib
import io
import itertools

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress.cipher.stream import Opener, blob_key, derive, seal
from modelpress.errors import CorruptionError
from modelpress.manifest import TAG_BYTES, Encryption, Plain

SECRET = bytes(range(32))
ID = "0" * 32


def plain_of(data: bytes) -> Plain:
    return Plain(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def sealed(data: bytes, segment_bytes: int, secret: bytes = SECRET) -> bytes:
    encryption = Encryption(secret=ID, segment_bytes=segment_bytes)
    return b"".join(seal(io.BytesIO(data), plain_of(data), secret, encryption, "sealing"))


def opener(data: bytes, segment_bytes: int, secret: bytes = SECRET) -> Opener:
    """What opens the sealed `data`."""
    return Opener(plain_of(data), secret, Encryption(secret=ID, segment_bytes=segment_bytes), "opening")


def refused(data: bytes, segment_bytes: int, stored: bytes, secret: bytes = SECRET) -> str:
    with pytest.raises(CorruptionError) as raised:
        opener(data, segment_bytes, secret).open(stored)
    return str(raised.value)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.integers(1, 400), st.data())
def test_any_bytes_in_any_segments_come_back_in_any_pieces(data: bytes, segment: int, draw: st.DataObject) -> None:
    stored = sealed(data, segment)
    encryption = Encryption(secret=ID, segment_bytes=segment)
    assert len(stored) == encryption.stored_bytes(len(data)) == len(data) + 16 * max(1, -(-len(data) // segment))
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(stored)), max_size=6)))
    streamed, out = opener(data, segment), b""
    for start, end in itertools.pairwise([0, *cuts, len(stored)]):
        piece = streamed.feed(memoryview(stored)[start:end])
        out += piece
        assert end >= len(out) + TAG_BYTES * -(-len(out) // segment), "nothing comes out before it is proved"
    streamed.finish()
    assert out == data == opener(data, segment).open(stored)
    assert sealed(data, segment) == stored, "the same bytes under the same secret are the same blob"


@settings(max_examples=80, deadline=None)
@given(st.binary(min_size=1, max_size=200), st.integers(1, 90))
def test_segments_open_alone(data: bytes, segment: int) -> None:
    stored, streamed = sealed(data, segment), opener(data, segment)
    for number, start in enumerate(range(0, len(data), segment)):
        at = number * (segment + TAG_BYTES)
        part = stored[at : at + segment + TAG_BYTES]
        assert streamed.open_segment(number, part) == data[start : start + segment]
        for other in (number - 1, number + 1):
            with pytest.raises(CorruptionError):
                streamed.open_segment(other, part)


@pytest.mark.parametrize("size", [0, 1, 32, 33, 64, 100])
def test_every_flipped_bit_of_every_byte_is_refused(size: int) -> None:
    data = bytes(range(size))
    stored = sealed(data, 32)
    for position in range(len(stored)):
        for bit in (0, 7):
            changed = bytearray(stored)
            changed[position] ^= 1 << bit
            assert f"segment {position // 48} of" in refused(data, 32, bytes(changed))


@pytest.mark.parametrize("size", [0, 1, 32, 64, 96, 100])
def test_every_truncation_is_refused(size: int) -> None:
    """At the boundaries of segments too, where what is left would be a whole stream if nothing marked the last."""
    data = bytes(size)
    stored = sealed(data, 32)
    for length in range(len(stored)):
        assert "the end in segment" in refused(data, 32, stored[:length])
    assert "behind the last" in refused(data, 32, stored + b"\0")


def test_a_shorter_stream_is_no_stream_of_its_segments() -> None:
    """Told that the blob is shorter, the opener still refuses: the last segment was not sealed as the last."""
    data = bytes(96)
    stored = sealed(data, 32)
    shorter = Plain(sha256=plain_of(data).sha256, size_bytes=64)
    with pytest.raises(CorruptionError, match="segment 1 of 2"):
        Opener(shorter, SECRET, Encryption(secret=ID, segment_bytes=32), "opening").open(stored[:96])


def test_swapped_and_repeated_segments_are_refused() -> None:
    data = b"a" * 32 + b"b" * 32 + b"c" * 32
    stored = sealed(data, 32)
    first, second, third = (stored[start : start + 48] for start in (0, 48, 96))
    assert "segment 0 of 3" in refused(data, 32, second + first + third)
    assert "segment 1 of 3" in refused(data, 32, first + first + third)
    assert "segment 1 of 3" in refused(data, 32, first + third + second)
    assert "segment 1 of 3" in refused(data, 32, first + third)


def test_another_secret_another_blob_and_another_cut_do_not_open() -> None:
    data, other = b"x" * 64, b"y" * 64
    assert "did not seal" in refused(data, 32, sealed(data, 32), bytes(32))
    assert "did not seal" in refused(data, 32, sealed(other, 32))
    assert "did not seal" in refused(data, 64, sealed(data, 16)[:80])


def test_no_key_and_nonce_meet_twice() -> None:
    """The key depends on the bytes *and* on how they are cut: under one key, the same bytes cut otherwise would put
    other bytes under nonce 1."""
    plains = [plain_of(bytes([value]) * size) for value in range(3) for size in (1, 2)]
    cuts = (1, 2, 2**20)
    found = {blob_key(secret, plain, cut) for secret in (SECRET, bytes(32)) for plain in plains for cut in cuts}
    assert len(found) == 2 * len(plains) * 3


def test_the_bytes_on_the_line_are_those_of_the_format() -> None:
    """Rebuilt from FORMAT.md with the primitives alone."""
    data = b"0123456789"
    digest = hashlib.sha256(data).digest()
    key = derive(SECRET, b"modelpress blob v1" + (4).to_bytes(8, "little") + digest, 32)
    expected = b"".join(
        AESGCM(key).encrypt(bytes([number]) + bytes(10) + bytes([number == 2]), data[4 * number :][:4], digest)
        for number in range(3)
    )
    assert sealed(data, 4) == expected


def test_hkdf_is_that_of_rfc_5869() -> None:
    """Test case 3 of its appendix: no salt, no info."""
    expected = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    assert derive(b"\x0b" * 22, b"", 42).hex() == expected


@pytest.mark.parametrize("found", [b"abcd", b"abcdefgh+", b"abcdefgX", b""])
def test_other_bytes_than_the_key_is_for_are_not_sealed(found: bytes) -> None:
    expected = b"abcdefgh"
    with pytest.raises(CorruptionError, match="run the stage again"):
        list(seal(io.BytesIO(found), plain_of(expected), SECRET, Encryption(secret=ID, segment_bytes=3), "sealing"))


def test_a_source_may_give_its_bytes_in_small_parts() -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 5))

    data = bytes(range(100))
    encryption = Encryption(secret=ID, segment_bytes=32)
    assert b"".join(seal(Trickle(data), plain_of(data), SECRET, encryption, "sealing")) == sealed(data, 32)
