"""`access create|list|revoke`: a key is shown once, and then only who has one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.keyring import Keyring, Sources, UnauthenticatedError
from tests.cli.conftest import Run


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the environment names."""
    monkeypatch.setenv("MODELPRESS_SERVING_KEYS_FILE", str(tmp_path / "keys.json"))
    return tmp_path / "keys.json"


def test_a_key_from_its_making_to_its_end(path: Path, run: Run) -> None:
    code, key, told = run("access", "create", "team-a", "--scope", "infer", "--scope", "metrics", "--expires", "2h")
    assert code == 0
    assert "shown once" in told
    assert Keyring(Sources(path)).check(f"Bearer {key.strip()}", "infer").name == "team-a"

    code, out, _ = run("access", "list")
    assert code == 0
    assert "team-a" in out
    assert "counts" in out
    assert key.strip() not in out + path.read_text()
    code, out, _ = run("access", "list", "--json")
    (shown,) = json.loads(out)
    assert (shown["name"], shown["scopes"], shown["state"]) == ("team-a", ["infer", "metrics"], "counts")
    assert "sha256" not in shown

    code, out, _ = run("access", "revoke", shown["id"])
    assert (code, out) == (0, f"team-a: {shown['id']} (infer, metrics) is revoked\n")
    with pytest.raises(UnauthenticatedError):
        Keyring(Sources(path)).check(f"Bearer {key.strip()}")
    assert "revoked" in run("access", "list")[1]
    assert run("access", "revoke", shown["id"])[0] == 8


def test_another_file_and_no_end(path: Path, run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    arguments = ("--scope", "infer", "--model", "digits", "--model", "team-*", "--expires", "never")
    assert run("access", "create", "a", *arguments, "--file", str(other))[0] == 0
    shown = run("access", "list", "--file", str(other))[1]
    assert "never" in shown
    assert "digits, team-*" in shown
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["create", "Team A", "--scope", "infer"], 2, "name"),
        (["create", "a", "--scope", "root"], 2, "infer, admin, promote, metrics"),
        (["create", "a"], 2, "--scope"),
        (["create", "a", "--scope", "infer", "--model", "Digits"], 2, "models"),
        (["create", "a", "--scope", "infer", "--expires", "soon"], 2, "when a key ends"),
        (["create", "a", "--scope", "infer", "--expires", "2001-01-01"], 2, "in the future"),
        (["list"], 2, "modelpress access create"),
        (["revoke", "a"], 8, "no key of this id or name"),
    ],
)
def test_what_is_wrong_is_said(path: Path, run: Run, arguments: list[str], code: int, said: str) -> None:
    found, out, told = run("access", *arguments)
    assert found == code
    assert said in told
    assert not out
    assert not path.exists()
