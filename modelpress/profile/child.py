"""Loads a pack in a process of its own, answers once, and says what each part took.

`python -m modelpress.profile.child` reads a `Task` as JSON from its standard input, and writes `Found` as JSON. Each
part is done alone, one after the other, so that it can be told from the others; a server reads, verifies and decodes at
the same time, and is faster.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

    from modelpress.checkpoint import Checkpoint
    from modelpress.store import Store

SAMPLE_SECONDS = 0.005
"""How often resident memory is looked at."""


class Task(TypedDict):
    """What the process does."""

    forked: float
    """The parent's `time.perf_counter()` just before it started the process; the clock is the machine's."""
    store: str
    """URI of the store."""
    name: str
    """Of the pack."""
    digest: str
    """Of the pack."""
    provider: str
    """ONNX Runtime execution provider."""
    threads: int
    """Of one operator."""
    inputs: list[str]
    """Files of inputs (safetensors): the first one's are answered first, each further batch a few times where memory is
    watched."""
    watch: bool
    """Whether resident memory is sampled all the time."""


class Found(TypedDict):
    """What the process found."""

    parts: dict[str, float]
    """Seconds of each part, by its name in `ColdStart` without `_seconds`; the sum of all is to the first answer."""
    verified: bool
    """Whether `verify` stands for all shards: those of an encrypted pack are verified as they are fetched."""
    points: list[tuple[float, int]]
    """Seconds and resident bytes, where memory is watched."""
    marks: list[tuple[float, str]]
    """What began when."""
    peak_bytes: int | None
    """Most resident memory, as the kernel counted it; None where it does not."""


class _Watcher:
    """Samples resident memory on a thread, and keeps the time of each part."""

    def __init__(self, began: float, *, watch: bool) -> None:
        self.points: list[tuple[float, int]] = []
        self.marks: list[tuple[float, str]] = []
        self.parts: dict[str, float] = {}
        self._began = self._last = began
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True) if watch else None
        if self._thread is not None:
            self._thread.start()

    def mark(self, what: str) -> None:
        """Something begins."""
        self.marks.append((time.perf_counter() - self._began, what))

    def part(self, name: str) -> None:
        """A part has ended: what was since the last one is its time."""
        now = time.perf_counter()
        self.parts[name] = now - self._last
        self._last = now

    def end(self) -> None:
        """Stop sampling."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()

    def _sample(self) -> None:
        while True:
            self.points.append((time.perf_counter() - self._began, resident_bytes()))
            if self._stop.wait(SAMPLE_SECONDS):
                return


def main() -> None:
    """Do the task, and print what was found."""
    began = time.perf_counter()
    task: Task = json.load(sys.stdin)
    watcher = _Watcher(began, watch=task["watch"])
    watcher.parts["interpreter"] = began - task["forked"]
    watcher.mark("import")
    import safetensors.torch

    from modelpress import graph
    from modelpress.store import open_store

    watcher.part("import")
    watcher.mark("fetch")
    checkpoint, verified = load(open_store(task["store"]), task["name"], task["digest"], watcher)
    watcher.mark("session")
    session = graph.session(checkpoint, task["provider"], task["threads"])
    watcher.part("session")
    watcher.mark("first answer")
    inputs: dict[str, Tensor] = safetensors.torch.load_file(task["inputs"][0])
    graph.run(session, inputs)
    watcher.part("first_answer")
    for path in task["inputs"][1:] if task["watch"] else ():
        batch = safetensors.torch.load_file(path)
        watcher.mark(f"batch {len(next(iter(batch.values())))}")
        for _ in range(3):
            graph.run(session, batch)
            time.sleep(SAMPLE_SECONDS)
    watcher.end()
    found = Found(
        parts=watcher.parts,
        verified=verified,
        points=watcher.points,
        marks=watcher.marks,
        peak_bytes=peak_bytes(),
    )
    print(json.dumps(found))


def load(store: Store, name: str, digest: str, watcher: _Watcher) -> tuple[Checkpoint, bool]:
    """A pack's checkpoint, in the parts fetch, verify and decode; whether all shards were verified in `verify`."""
    import hashlib

    from modelpress.checkpoint import Checkpoint
    from modelpress.container import read_tensors
    from modelpress.errors import CorruptionError
    from modelpress.load import load_manifest, open_parts
    from modelpress.pack_files import read_files

    manifest = load_manifest(store, name, digest)
    parts = open_parts(store, manifest)
    blobs = {shard: parts.fetch(shard) for shard in manifest.blobs()}
    watcher.part("fetch")
    watcher.mark("verify")
    plain = manifest.encryption is None
    for shard in manifest.shards if plain else ():
        if (found := hashlib.sha256(blobs[shard.sha256]).hexdigest()) != shard.sha256:
            raise CorruptionError(f"verifying shard {shard.sha256}", found=f"sha256 {found}", expected="its name")
    watcher.part("verify")
    watcher.mark("decode")
    tensors = dict(read_tensors(manifest, blobs.__getitem__, original=parts.base))
    files = read_files(manifest, blobs.__getitem__)
    watcher.part("decode")
    # The decoder verifies each shard as well, which is not its own work.
    watcher.parts["decode"] = max(0.0, watcher.parts["decode"] - watcher.parts["verify"])
    return Checkpoint(manifest.kind, tensors, files, dict(manifest.metadata)), plain


def resident_bytes() -> int:
    """Resident memory of this process."""
    try:
        return _status("VmRSS")
    except OSError:  # not Linux
        import psutil

        return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int | None:
    """The most that it ever was; what `getrusage` says would have the parent's in it, from before the `exec`."""
    try:
        return _status("VmHWM")
    except OSError:
        return None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"the kernel says nothing of {key}")


if __name__ == "__main__":
    main()
