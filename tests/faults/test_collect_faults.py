"""A collection over a line that breaks: what a publisher needs is never taken, however late a delete arrives."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from modelpress import keys
from modelpress.errors import StoreUnavailableError
from modelpress.housekeeping import turns
from modelpress.housekeeping.collect import collect
from modelpress.publish import publish
from modelpress.store.s3 import S3Store
from tests.conftest import OpenS3
from tests.faults.conftest import QUICK
from tests.faults.proxy import FaultProxy
from tests.housekeeping.small import SmallPack, digest_of

pytestmark = [pytest.mark.faults, pytest.mark.s3]


def test_a_delete_that_was_sent_again_is_waited_for(
    open_s3: OpenS3, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line breaks, the delete is sent again and answered at once; the first one arrives while somebody publishes
    what it names."""
    monkeypatch.setattr(turns, "ROUND_SECONDS", 15.0)
    monkeypatch.setattr(turns, "MARGIN_SECONDS", 1.0)
    store = open_s3("writer")
    line = open_s3("writer", s3_endpoint_url=proxy.endpoint, **QUICK | {"s3_deadline_seconds": 4})
    pack, wanted = SmallPack([b"garbage"]), keys.blob(digest_of(b"garbage"))
    store.put(wanted, b"garbage")
    line.ensure_fit()
    proxy.inject("late", "DELETE", wanted)
    with contextlib.suppress(StoreUnavailableError):
        collect(line, delete=True, grace_seconds=-60)  # what was written in this second is old enough
    assert proxy.injected() == 1
    assert store.info(wanted) is None

    waits = threading.Event()

    def told(_done: int, _total: int, note: str = "") -> None:
        if "waiting for a round" in note:
            waits.set()

    with ThreadPoolExecutor(1) as pool:
        published = pool.submit(publish, store, pack.manifest, [], pack.blobs, source_bytes=1, progress=told)
        while not waits.wait(0.05) and not published.done():
            pass
        assert proxy.let_late_ones_go() == 1
        published.result(60)
    assert store.info(keys.manifest("demo", pack.digest)) is not None
    assert store.info(wanted) is not None, "a blob of a published pack is gone"


def test_a_delete_is_not_sent_again_after_the_machine_slept(
    through: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two attempts: its round is long over, and somebody may have published what it names."""
    slept, clock = [0.0], time.clock_gettime

    def with_sleep(which: int) -> float:
        return clock(which) + (slept[0] if which == time.CLOCK_BOOTTIME else 0.0)

    monkeypatch.setattr("modelpress.store.clock.time.clock_gettime", with_sleep)
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda _: slept.__setitem__(0, 3600.0))
    through.put("blobs/wanted", b"x")
    proxy.inject("slow_down", "DELETE", "wanted")
    with pytest.raises(StoreUnavailableError):
        through.delete("blobs/wanted")
    assert slept == [3600.0]
    assert through.info("blobs/wanted") is not None
