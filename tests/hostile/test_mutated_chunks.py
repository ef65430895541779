"""The compiled loops under damaged chunks, in a process of their own: a crash fails this test and ends no other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.mutated_chunks import CASES

ROOT = Path(__file__).parents[2]
ROUNDS = 300


def test_damaged_chunks_are_refused_or_decoded_within_their_memory() -> None:
    command = [sys.executable, "-m", "tests.hostile.mutated_chunks", str(ROUNDS), "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode} (a negative one is a signal)\n{done.stderr[-2000:]}"
    refused, passed = map(int, done.stdout.split())
    assert refused + passed == ROUNDS * len(CASES)
    assert min(refused, passed) > 100  # both happen, or the damage is of one kind alone


@pytest.mark.parametrize(("beyond", "signal"), [(0, 0), (1, -11)])
def test_the_fence_ends_a_process_that_reads_too_far(beyond: int, signal: int) -> None:
    reading = "from tests.hostile.mutated_chunks import Fenced; import ctypes;"
    reading += f"fenced = Fenced(10); ctypes.string_at(fenced.last(10).ctypes.data, 10 + {beyond})"
    done = subprocess.run([sys.executable, "-c", reading], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == signal
