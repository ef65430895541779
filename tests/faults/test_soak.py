"""A short slice of the soak; `python -m benchmarks.faults` is the whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import QUICK, soak
from tests.conftest import S3Server

pytestmark = [pytest.mark.faults, pytest.mark.s3]


def test_nothing_is_lost_and_nothing_is_wrong(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    tallies = soak(s3_server, QUICK, tmp_path, seed=7)
    assert [text for tally in tallies.values() for text in tally.wrong] == []
    assert tallies.injected() >= QUICK.faults + QUICK.kills
    assert tallies["kill -9"].injected >= QUICK.kills
    assert {"kill -9", "race", "clock skew", "full disk"} < set(tallies)
    assert sum(tally.healed for tally in tallies.values()) > 10
    assert sum(tally.clear_errors for tally in tallies.values()) > 0
