"""Faults, over a real S3 server: `python -m benchmarks.faults [--quick]`.

A seeded random schedule of faults on the line (all that `tests/faults/proxy.py` can do), publishers that are killed at
random moments, a server that is killed and started again, two publishers at one name, disks that fill and clocks that
are wrong. After each the state is checked: packs are whole or not there, the bytes are the right ones, the digest at
the end is the same, nothing that the server had was sent again, and a failure says what to do and came in time.

The server is a Ceph RGW of this run's own on loopback, and shares the cores. MODELPRESS_FAULTS_SEED chooses another
schedule. The run fails if anything was wrong.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import _publishers, _soak
from benchmarks._report import Row, main
from benchmarks._servers import s3_server
from tests.conftest import S3Server, _with_bucket

LINES = 4
"""Trials on the line that run at a time."""


@dataclass(frozen=True)
class Amounts:
    """How many of each."""

    faults: int
    kills: int
    restarts: int
    races: int
    disks: int
    clocks: int


FULL = Amounts(faults=1000, kills=60, restarts=4, races=20, disks=20, clocks=20)
QUICK = Amounts(faults=50, kills=5, restarts=0, races=2, disks=2, clocks=2)


def soak(server: S3Server, amounts: Amounts, folder: Path, seed: int) -> _soak.Tallies:
    """Everything, on one server; its keys must be in the environment."""
    tallies = _soak.Tallies()
    with _soak.small_parts():
        lines = min(LINES, max(1, amounts.faults // 20))
        with ThreadPoolExecutor(lines) as pool:
            enough = threading.Event()

            def done() -> bool:
                if tallies.injected() >= amounts.faults:
                    enough.set()
                return enough.is_set()

            for future in [
                pool.submit(_soak.on_the_line, server, tallies, random.Random(seed * 1000 + number), done)
                for number in range(lines)
            ]:
                future.result()
        rng = random.Random(seed)
        _publishers.kills(server, tallies, rng, amounts.kills)
        _soak.races(server, tallies, rng, amounts.races)
        _publishers.clocks(server, tallies, rng, amounts.clocks)
        _publishers.full_disks(folder, tallies, rng, amounts.disks)
        if server.folder is not None:
            _soak.restarts(server, tallies, rng, amounts.restarts)
    return tallies


def measure(quick: bool) -> Iterator[Row]:
    """A row of counts for each kind of fault, and their sum."""
    with _server() as server, tempfile.TemporaryDirectory() as folder:
        seed = int(os.environ.get("MODELPRESS_FAULTS_SEED", "1"))
        tallies = soak(server, QUICK if quick else FULL, Path(folder), seed)
    everything = _soak.Tally()
    for kind, tally in sorted(tallies.items()):
        everything.injected += tally.injected
        everything.trials += tally.trials
        everything.healed += tally.healed
        everything.clear_errors += tally.clear_errors
        everything.wrong += tally.wrong
        everything.late += tally.late
        everything.longest_seconds = max(everything.longest_seconds, tally.longest_seconds)
        yield from _rows(kind, tally)
    yield from _rows("all", everything)
    for text in everything.wrong:
        print(text, file=sys.stderr)
    if everything.wrong:
        raise SystemExit(f"{len(everything.wrong)} trials went wrong: see above")


def _rows(kind: str, tally: _soak.Tally) -> Iterator[Row]:
    counts = {
        "faults": tally.injected,
        "trials": tally.trials,
        "healed": tally.healed,
        "clear errors": tally.clear_errors,
        "wrong": len(tally.wrong),
        "too late": tally.late,
    }
    for metric, count in counts.items():
        yield Row("faults", kind, metric, "1", count)
    yield Row("faults", kind, "longest trial", "s", round(tally.longest_seconds, 2))


@contextmanager
def _server() -> Iterator[S3Server]:
    """A server of this run's own: it is killed on the way."""
    with s3_server() as (folder, said):
        for server in _with_bucket(said, folder):
            os.environ.update(server.environment())
            yield server


if __name__ == "__main__":
    main("faults", measure)
