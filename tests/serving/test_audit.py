"""The audit: whole lines, whatever stands in them, in the file that stands there now."""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpress.access import Principal
from modelpress.errors import ConfigError
from serving.audit import REFUSALS_A_MINUTE, Audit

ANNA = Principal("anna", frozenset({"promote"}), "key", "3f9c0a77d1e2")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().decode("ascii").splitlines()]


def test_a_line_says_who_did_what_when_and_how_it_ended(path: Path) -> None:
    audit = Audit(path, clock=lambda: 1_800_000_000.5)
    for status in (200, 409, 503):
        audit.done(ANNA, "rollback", "10.0.0.7", "digits", status, {"pack": "ab12", "before": "cd34"})
    assert lines(path)[0] == {
        "time": "2027-01-15T08:00:00.500+00:00",
        "who": "anna",
        "via": "key",
        "key": "3f9c0a77d1e2",
        "action": "rollback",
        "model": "digits",
        "from": "10.0.0.7",
        "outcome": "done",
        "status": 200,
        "pack": "ab12",
        "before": "cd34",
    }
    assert [line["outcome"] for line in lines(path)] == ["done", "refused", "failed"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o137 == 0


@given(st.text(), st.text())
def test_whatever_a_client_sends_is_one_line(tmp_path_factory: pytest.TempPathFactory, model: str, path: str) -> None:
    file = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    audit = Audit(file)
    audit.done(ANNA, "load", "", model, 200, {})
    audit.refused("", "GET", path, 401, "no")
    audit.close()
    first, second = lines(file)
    assert first["model"] == model[:200]
    assert second["asked"] == f"GET {path}"[:200]


def test_letters_that_are_none_are_a_line_too(path: Path) -> None:
    Audit(path).refused("", "GET", "/\udcff\n\r\u2028", 401, "no")
    assert lines(path)[0]["asked"] == "GET /\udcff\n\r\u2028"
    assert path.read_bytes().count(b"\n") == 1


def test_it_follows_a_rotation(path: Path) -> None:
    audit = Audit(path)
    audit.done(ANNA, "load", "", "a", 200, {})
    path.rename(path.with_name("audit.1"))
    audit.done(ANNA, "load", "", "b", 200, {})
    path.unlink()
    audit.done(ANNA, "load", "", "c", 200, {})
    assert [line["model"] for line in lines(path.with_name("audit.1"))] == ["a"]
    assert [line["model"] for line in lines(path)] == ["c"]


def test_lines_of_many_threads_are_whole(path: Path) -> None:
    audit = Audit(path)
    threads = [
        threading.Thread(target=lambda n=n: [audit.done(ANNA, "load", "", f"{n}" * 150, 200, {}) for _ in range(100)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line["model"] for line in lines(path)) == sorted(f"{n}" * 150 for n in range(4) for _ in range(100))


def test_who_guesses_keys_fills_no_disk(path: Path) -> None:
    now = 60.0
    audit = Audit(path, clock=lambda: now)
    for _ in range(REFUSALS_A_MINUTE + 50):
        audit.refused("10.0.0.9", "GET", "/v2", 401, "no")
    audit.done(ANNA, "load", "", "a", 200, {})
    assert len(lines(path)) == REFUSALS_A_MINUTE + 1, "what is changed is always told"
    now = 120.0
    audit.refused("10.0.0.9", "GET", "/v2", 401, "no")
    audit.refused("10.0.0.9", "GET", "/v2", 401, "no")
    assert lines(path)[-2]["suppressed"] == 50
    assert "suppressed" not in lines(path)[-1]


def test_without_a_file_the_log_has_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "modelpress.serving.audit"):
        Audit().done(ANNA, "unload", "10.0.0.7", "digits", 200, {})
    (record,) = caplog.records
    assert json.loads(record.getMessage())["action"] == "unload"


def test_a_file_that_cannot_be_made_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MODELPRESS_SERVING_AUDIT_FILE"):
        Audit(tmp_path / "none" / "audit.jsonl")


def test_a_disk_that_is_full_ends_no_action(caplog: pytest.LogCaptureFixture) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    Audit(Path("/dev/full")).done(ANNA, "rollback", "10.0.0.7", "digits", 200, {})
    assert "can't be written" in caplog.text
    assert '"action": "rollback"' in caplog.text, "the log has the line instead"
