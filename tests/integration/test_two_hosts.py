"""Servers on one host and workers on another, joined by a cable: `benchmarks/two_hosts.py`, looked at."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks import two_hosts


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


@pytest.mark.e2e
@pytest.mark.s3
@pytest.mark.timeout(1800)
def test_a_run_crosses_the_cable_and_nothing_else() -> None:
    if reason := two_hosts.lacking():
        pytest.skip(reason)
    before = namespaces()
    rows = {(row.case, row.system, row.metric): row.value for row in two_hosts.measure(True)}
    run, served = "the run", "start of the server, and an answer"
    assert rows[run, "servers", "torch"] == 0, "no part of the run is where the servers are"
    assert (rows[run, "workers", "torch"] or 0) >= 1
    assert rows[run, "workers", "doors used"] == 3
    assert (rows[run, "workers", "sent"] or 0) > 2_768_624, "at least the source model crossed, to the work store"
    assert rows[served, "workers", "numbers"] == 10
    assert rows[served, "workers", "without the token"] == 401
    assert (rows[served, "servers", "sent"] or 0) > 20_000, "the pack came back"
    assert namespaces() <= before
