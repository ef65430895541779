"""A soak: seeded faults over uploads, commits, entries of aliases and downloads, to and from a real S3 server.

Every trial checks what others see: packs are whole or not there, bytes are the right ones, and after a failure the same
work, run again, ends with the same digest and sends nothing that the server had already.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

from modelpress import keys, load, pointer
from modelpress.config import UploadConfig
from modelpress.errors import ModelpressError
from modelpress.manifest import Manifest
from modelpress.publish import publish
from modelpress.store import Store
from modelpress.store.s3 import S3Store
from tests.conftest import S3Server
from tests.faults.proxy import FOREVER, KINDS, Fault, FaultProxy

MIB = 2**20
PART = 5 * MIB
"""The least that S3 allows."""
DEADLINE = 8.0
SETTINGS = {"s3_timeout_seconds": 0.6, "s3_deadline_seconds": DEADLINE, "s3_attempts": 4, "s3_backoff_seconds": 0.02}
WORK_DEADLINE = 4 * DEADLINE
"""A publish is some requests after each other; the first that gets no answer by its own deadline ends it."""
RARE = {"trickle_answer": 0.1, "half_open": 0.5, "stall_request": 0.5, "stall_answer": 0.5}
"""These wait for silence or the deadline; fewer of them leave time for the others."""

PLACES = [
    *(("", ""), ("PUT", "/blobs/"), ("PUT", "/packs/"), ("PUT", "/uploads/"), ("PUT", "/refs/"), ("PUT", "partNumber")),
    *(("GET", "/blobs/"), ("HEAD", ""), ("POST", ""), ("DELETE", "")),
]
"""Methods and parts of addresses that faults are put to."""


@dataclass
class Tally:
    """What became of the faults of one kind."""

    injected: int = 0
    trials: int = 0
    healed: int = 0
    clear_errors: int = 0
    wrong: list[str] = field(default_factory=list)
    """Lost or wrong bytes, half packs, bytes sent twice, errors without a way out."""
    longest_seconds: float = 0.0
    late: int = 0
    """Trials that took longer than their deadline."""


class Tallies(dict[str, Tally]):
    """By kind; filled from threads."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def add(
        self, kind: str, *, injected: int, seconds: float, error: Exception | None, wrong: list[str], deadline: float
    ) -> None:
        with self._lock:
            tally = self.setdefault(kind, Tally())
            tally.trials += 1
            tally.injected += injected
            tally.healed += error is None
            tally.clear_errors += error is not None
            tally.wrong += wrong
            tally.longest_seconds = max(tally.longest_seconds, seconds)
            tally.late += seconds > deadline

    def injected(self) -> int:
        """Faults in all."""
        return sum(tally.injected for tally in self.values())


@dataclass(frozen=True)
class Pack:
    """A pack of files: real in everything but tensors, which play no part on the way."""

    manifest: Manifest
    blobs: dict[str, bytes]

    @classmethod
    def make(cls, rng: random.Random, sizes: list[int], *, name: str = "soak", shared: bytes = b"") -> Pack:
        """A pack with random blobs of these sizes, and one that packs share."""
        contents = [rng.randbytes(size) for size in sizes] + ([shared] if shared else [])
        blobs = {hashlib.sha256(data).hexdigest(): data for data in contents}
        files = [
            {"name": f"{number}", "codec": "raw", "sha256": digest, "size_bytes": len(data)}
            | {"stored_sha256": digest, "stored_bytes": len(data)}
            for number, (digest, data) in enumerate(blobs.items())
        ]
        document = {"name": name, "kind": "torch", "shards": [], "tensors": [], "files": files}
        return cls(Manifest.model_validate(document), blobs)

    def publish(self, store: Store) -> None:
        """Publish it."""
        publish(store, self.manifest, [], self.blobs, config=UploadConfig(concurrency=3), source_bytes=1)

    @property
    def size_bytes(self) -> int:
        """Of its blobs."""
        return sum(map(len, self.blobs.values()))


def half_packs(store: Store, name: str = "soak") -> list[str]:
    """What is wrong with the packs that are visible: a blob that is missing, or other bytes."""
    found = []
    for info in list(store.list(keys.manifests(name))):
        if (owner := keys.manifest_owner(info.key)) is None:
            continue
        manifest = load.load_manifest(store, *owner)
        for digest in manifest.blobs():
            try:
                data = store.get(keys.blob(digest))
            except ModelpressError as error:
                found.append(f"{info.key}: {error}")
                continue
            if hashlib.sha256(data).hexdigest() != digest:
                found.append(f"{info.key}: blob {digest} has other bytes")
    return found


def unclear(error: Exception) -> list[str]:
    """An error has to say what was done and what was found, in a kind of ours."""
    clear = isinstance(error, ModelpressError) and error.doing and error.found and (error.fix or error.expected)
    return [] if clear else [f"an error without a way out: {error!r}"]


class Line:
    """One worker's place: a proxy to the server, a store behind it, and one beside it."""

    def __init__(self, server: S3Server) -> None:
        self.proxy = FaultProxy(server.endpoint)
        self.uri = f"s3://{server.bucket}/soak-{uuid.uuid4().hex[:12]}"
        self.through = S3Store(self.uri, server.settings(s3_endpoint_url=self.proxy.endpoint, **SETTINGS))
        self.direct = S3Store(self.uri, server.settings())

    def close(self) -> None:
        """Leave nothing in the bucket."""
        for upload in self.direct.unfinished():
            self.direct.abort(upload)
        for info in list(self.direct.list()):
            self.direct.delete(info.key)
        self.through.close()
        self.direct.close()
        self.proxy.__exit__()


# --- faults on the line


def on_the_line(server: S3Server, tallies: Tallies, rng: random.Random, enough: Callable[[], bool]) -> None:
    """Trials with random faults, one after the other, until there were enough."""
    line = Line(server)
    shared, kinds = rng.randbytes(100_000), list(KINDS)
    weights = [RARE.get(kind, 1.0) for kind in kinds]
    try:
        while not enough():
            kind = rng.choices(kinds, weights)[0]
            pack = Pack.make(rng, [rng.randrange(1, 200_000), rng.choice([50_000, PART + MIB // 4])], shared=shared)
            method, address = rng.choice(PLACES)
            times = rng.choices([1, 2, 3, FOREVER], [60, 15, 15, 10])[0]
            fault = Fault(kind, method, address, times, rng.randrange(100_000), rng.uniform(0, 0.3), 2 * MIB)
            _trial(line, fault, pack, tallies)
    finally:
        line.close()


def _trial(line: Line, fault: Fault, pack: Pack, tallies: Tallies) -> None:
    """Publish, point an alias at it and read it back through the fault; then again without it."""
    before, error = line.proxy.injected(), None
    digest = pack.manifest.digest

    def work(store: S3Store) -> None:
        pack.publish(store)
        pointer.append(store, "soak", "champion", digest, "promote", token=digest)
        load.verify(store, "soak", digest)

    started = time.monotonic()
    how = {"times": fault.times, "after": fault.after, "seconds": fault.seconds, "rate": fault.rate}
    line.proxy.inject(fault.kind, fault.method, fault.address, **how)
    try:
        work(line.through)
    except Exception as caught:  # noqa: BLE001  what it is, is looked at
        error = caught
    seconds = time.monotonic() - started
    injected = line.proxy.injected() - before
    line.proxy.heal()
    wrong = unclear(error) if error else []
    wrong += half_packs(line.direct)
    if error is not None:
        work(line.direct)
        wrong += half_packs(line.direct)
    if keys.manifest("soak", digest) not in {info.key for info in line.direct.list(keys.manifests("soak"))}:
        wrong.append(f"no pack {digest} at the end")
    current = pointer.current(line.direct, "soak", "champion")
    if current is None or current.pack != digest:
        wrong.append(f"the alias is not at {digest}")
    for info in list(line.direct.list()):
        line.direct.delete(info.key)
    tallies.add(fault.kind, injected=injected, seconds=seconds, error=error, wrong=wrong, deadline=3 * WORK_DEADLINE)


# --- several at a time, and a server that goes away


def races(server: S3Server, tallies: Tallies, rng: random.Random, count: int) -> None:
    """Two publishers at one name and one alias, with blobs in common, or with the same pack."""
    line = Line(server)
    try:
        for number in range(count):
            shared, started, wrong = rng.randbytes(PART + 1000), time.monotonic(), list[str]()
            one = Pack.make(rng, [1000], shared=shared)
            both = [one, one if number % 2 else Pack.make(rng, [2000], shared=shared)]

            def go(pack: Pack) -> None:
                with closing(S3Store(line.uri, server.settings())) as store:
                    pack.publish(store)
                    pointer.append(store, "soak", "champion", pack.manifest.digest, "promote")

            with ThreadPoolExecutor(2) as pool:
                for future in [pool.submit(go, pack) for pack in both]:
                    if (caught := future.exception()) is not None:
                        wrong.append(repr(caught))
            wrong += half_packs(line.direct)
            log = [entry.pack for entry in pointer.history(line.direct, "soak", "champion")]
            if sorted(log) != sorted(pack.manifest.digest for pack in both):
                wrong.append(f"the log holds {log}")
            seconds = time.monotonic() - started
            tallies.add("race", injected=1, seconds=seconds, error=None, wrong=wrong, deadline=WORK_DEADLINE)
            for info in list(line.direct.list()):
                line.direct.delete(info.key)
    finally:
        line.close()


def restarts(server: S3Server, tallies: Tallies, rng: random.Random, count: int) -> None:
    """The server is killed while a pack is on its way, and started again."""
    line = Line(server)
    settings = server.settings(s3_endpoint_url=line.proxy.endpoint, s3_attempts=20, s3_backoff_seconds=0.1)
    try:
        for _ in range(count):
            pack, wrong = Pack.make(rng, [3 * PART, 1000]), list[str]()
            line.proxy.inject("delay", "PUT", "/blobs/", times=FOREVER, seconds=0.3)
            started = time.monotonic()
            with closing(S3Store(line.uri, settings)) as store, ThreadPoolExecutor(1) as pool:
                sending = pool.submit(pack.publish, store)
                time.sleep(rng.uniform(0, 0.6))
                server.restart()
                if (caught := sending.exception(120)) is not None:
                    wrong.append(repr(caught))
            seconds = time.monotonic() - started
            line.proxy.heal()
            wrong += half_packs(line.direct)
            if line.direct.info(keys.manifest("soak", pack.manifest.digest)) is None:
                wrong.append("no pack after a restart")
            tallies.add("server restarted", injected=1, seconds=seconds, error=None, wrong=wrong, deadline=120)
    finally:
        line.close()


@contextmanager
def small_parts() -> Iterator[None]:
    """Parts of the least size that S3 allows: many of them, in little time."""
    from modelpress.store import s3, s3_multipart

    before = s3.MULTIPART_BYTES, s3_multipart.PART_BYTES
    s3.MULTIPART_BYTES = s3_multipart.PART_BYTES = PART
    try:
        yield
    finally:
        s3.MULTIPART_BYTES, s3_multipart.PART_BYTES = before
