"""Publishers of a soak, each a process of its own: killed at random moments, with a wrong clock, or on a full disk."""

from __future__ import annotations

import itertools
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks._soak import MIB, PART, WORK_DEADLINE, Line, Pack, Tallies, half_packs, small_parts
from modelpress import keys
from modelpress.errors import ModelpressError
from modelpress.store import open_store
from modelpress.store.s3 import S3Store
from tests.conftest import S3Server
from tests.faults.proxy import FOREVER

ROOT = Path(__file__).parents[1]


class Publisher:
    """A process that forks one publisher after the other: each is a process of its own, and none has to import."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._publishers"],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, **job: object) -> None:
        """Begin one."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def wait(self) -> dict[str, str]:
        """How it ended: `code`, and the error's text if it was one of ours."""
        assert self._process.stdout is not None
        found: dict[str, str] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def kills(server: S3Server, tallies: Tallies, rng: random.Random, count: int) -> None:
    """Kill publishers at random moments, some more than once in a row, and then let one end."""
    line, publisher = Line(server), Publisher(server.environment())
    line.proxy.inject("slow_request", "PUT", times=FOREVER, rate=60 * MIB)
    left, length = count, 0.0
    try:
        for number in itertools.count():
            seed, wrong = rng.randrange(2**32), list[str]()
            pack = _kill_pack(seed)
            # The first shows how long it takes.
            in_a_row, killed = 0 if number == 0 else min(left, rng.choice([1, 1, 2, 3])), 0
            for _ in range(in_a_row):
                after = rng.uniform(0, length)
                publisher.start(uri=line.uri, endpoint=line.proxy.endpoint, seed=seed, kill_after=after)
                hit = publisher.wait()["code"] == str(-signal.SIGKILL)
                killed += hit
                length *= 1.05 if hit else 0.8  # about as long as a publish takes, whatever else this machine does
                wrong += half_packs(line.direct)
            stored = _stored(line.direct, pack)
            sent, started = line.proxy.sent("PUT", "/blobs/"), time.monotonic()
            publisher.start(uri=line.uri, endpoint=line.proxy.endpoint, seed=seed)
            ended = publisher.wait()
            seconds = time.monotonic() - started
            sent = line.proxy.sent("PUT", "/blobs/") - sent
            length = seconds if number == 0 else length
            wrong += half_packs(line.direct) + ([] if ended["code"] == "0" else [f"the last run failed: {ended}"])
            if line.direct.info(keys.manifest("soak", pack.manifest.digest)) is None:
                wrong.append("another digest after a kill")
            if sent > pack.size_bytes - stored:
                wrong.append(f"{sent} bytes sent, of {pack.size_bytes} with {stored} stored")
            left -= killed
            if number:
                tallies.add(
                    "kill -9", injected=killed, seconds=seconds, error=None, wrong=wrong, deadline=WORK_DEADLINE
                )
            for info in list(line.direct.list()):
                line.direct.delete(info.key)
            if not left:
                return
    finally:
        publisher.close()
        line.close()


def _kill_pack(seed: int) -> Pack:
    return Pack.make(random.Random(seed), [2 * PART + MIB, *[200_000] * 5])


def _stored(store: S3Store, pack: Pack) -> int:
    """Bytes of a pack that the server has: whole blobs, and parts."""
    whole = sum(info.size_bytes for info in store.list(keys.BLOBS))
    newest: dict[str, int] = {}
    for upload in store.unfinished(keys.BLOBS):
        newest[upload.key] = max(newest.get(upload.key, 0), upload.size_bytes)
    there = {info.key for info in store.list(keys.BLOBS)}
    return min(pack.size_bytes, whole + sum(size for key, size in newest.items() if key not in there))


def clocks(server: S3Server, tallies: Tallies, rng: random.Random, count: int) -> None:
    """Publishers whose clock is wrong: by minutes they are served, by more they are told."""
    line, publisher = Line(server), Publisher(server.environment())
    try:
        for _ in range(count):
            skew = rng.choice([-1, 1]) * rng.choice([rng.uniform(1, 12), rng.uniform(20, 600)])
            seed, started = rng.randrange(2**32), time.monotonic()
            publisher.start(uri=line.uri, endpoint=server.endpoint, seed=seed, skew_minutes=skew)
            ended = publisher.wait()
            served = abs(skew) < 15
            right = ended["code"] == "0" if served else "set the clock" in ended.get("error", "")
            wrong = half_packs(line.direct) + ([] if right else [f"{skew:.0f} minutes: {ended}"])
            error = None if served else ModelpressError("clock")
            seconds = time.monotonic() - started
            tallies.add("clock skew", injected=1, seconds=seconds, error=error, wrong=wrong, deadline=WORK_DEADLINE)
            for info in list(line.direct.list()):
                line.direct.delete(info.key)
    finally:
        publisher.close()
        line.close()


def full_disks(folder: Path, tallies: Tallies, rng: random.Random, count: int) -> None:
    """Publishers to a folder where no file may grow beyond a random size (EFBIG, as ENOSPC on a full disk)."""
    publisher = Publisher({})
    try:
        for number in range(count):
            store, seed = open_store(str(folder / f"{number}")), rng.randrange(2**32)
            limit, started = rng.randrange(5_000, 2 * PART), time.monotonic()
            publisher.start(uri=store.uri, endpoint="", seed=seed, limit_bytes=limit)
            ended = publisher.wait()
            seconds = time.monotonic() - started
            wrong = [] if "free space" in ended.get("error", "") else [f"a limit of {limit}: {ended}"]
            wrong += half_packs(store)
            publisher.start(uri=store.uri, endpoint="", seed=seed)
            ended = publisher.wait()
            wrong += half_packs(store) + ([] if ended["code"] == "0" else [f"the last run failed: {ended}"])
            full = ModelpressError("full")
            tallies.add("full disk", injected=1, seconds=seconds, error=full, wrong=wrong, deadline=WORK_DEADLINE)
    finally:
        publisher.close()


def serve() -> None:
    """Fork a publisher for each line of standard input; what `Publisher` talks to."""
    for job in map(json.loads, sys.stdin):
        said, says = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(said)
            os._exit(_publish(job, says))
        os.close(says)
        if "kill_after" in job and not select.select([said], [], [], job["kill_after"])[0]:
            os.kill(pid, signal.SIGKILL)  # it has not been waited for, so its id is still its own
        with os.fdopen(said) as answer:
            error = answer.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"code": str(code), "error": error}), flush=True)


def _publish(job: dict[str, float | str], says: int) -> int:
    import resource
    from datetime import timedelta

    import botocore.auth

    from modelpress.settings import read_settings

    if "skew_minutes" in job:
        now = vars(botocore.auth)["get_current_datetime"]
        skew = timedelta(minutes=float(job["skew_minutes"]))
        vars(botocore.auth)["get_current_datetime"] = lambda *a, **k: now(*a, **k) + skew
    if "limit_bytes" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(job["limit_bytes"]), resource.RLIM_INFINITY))
    try:
        settings = read_settings().model_copy(update={"s3_endpoint_url": job["endpoint"], "s3_attempts": 4})
        with small_parts():
            _kill_pack(int(job["seed"])).publish(open_store(str(job["uri"]), settings))
    except ModelpressError as error:
        os.write(says, str(error).encode())
        return 3
    return 0


if __name__ == "__main__":
    serve()
