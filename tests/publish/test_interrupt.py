"""Ctrl-C during a publish ends it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.packs import make_pack

SECONDS_PER_BLOB = 30.0
"""Far more than a process with torch takes to end on a busy machine."""

PUBLISH = """
import signal, sys, time
from pathlib import Path
from modelpress.config import UploadConfig
from modelpress.publish import publish
from modelpress.store.local import LocalStore
from tests.packs import make_pack

class Slow(LocalStore):
    def put(self, key, data, **options):
        if key.startswith("blobs/"):
            print("sending", flush=True)
            time.sleep(float(sys.argv[2]))
        return super().put(key, data, **options)

# A suite that a shell runs in the background is started deaf to interrupts, and so are its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
folder = Path(sys.argv[1])
pack = make_pack(folder / "shards")
publish(Slow(folder / "store"), pack.manifest, pack.shards, pack.blobs, config=UploadConfig(concurrency=1),
        source_bytes=1)
"""


def test_an_interrupt_ends_a_publish_at_once(tmp_path: Path) -> None:
    assert len(make_pack(tmp_path / "other").manifest.blobs()) > 3
    command = [sys.executable, "-c", PUBLISH, str(tmp_path), str(SECONDS_PER_BLOB)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sending\n"
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        rest, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert time.monotonic() - started < SECONDS_PER_BLOB / 2
    assert rest == ""
    assert list((tmp_path / "store").rglob("packs")) == []
