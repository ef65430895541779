"""Memory for the parts of an upload: so many buffers and no more, and nobody waits for one once they are closed."""

from __future__ import annotations

import threading

import pytest

from modelpress.store.s3_multipart import Buffers
from modelpress.store.threads import ClosedError


def test_buffers_are_as_many_as_said_and_wait_for_nobody_once_closed() -> None:
    buffers = Buffers(2)
    first, second = buffers.take(10), buffers.take(10)
    third: list[bytearray] = []
    thread = threading.Thread(target=lambda: third.append(buffers.take(20)))
    thread.start()
    buffers.give_back(first)
    thread.join(10)
    assert [len(buffer) for buffer in third] == [20]
    failed: list[bool] = []

    def refused() -> None:
        with pytest.raises(ClosedError):
            buffers.take(10)
        failed.append(True)

    thread = threading.Thread(target=refused)
    thread.start()
    buffers.close()
    thread.join(10)
    assert failed == [True]
    buffers.give_back(second)


def test_no_memory_for_a_buffer_loses_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = Buffers(1)
    for _ in range(3):
        with pytest.raises(MemoryError):
            buffers.take(2**62)
        assert buffers.held == 0
    small = buffers.take(10)
    buffers.give_back(small)
    with pytest.raises(MemoryError):
        buffers.take(2**62)  # in the place of the small one, which went first
    assert buffers.held == 0
    assert len(buffers.take(20)) == 20
