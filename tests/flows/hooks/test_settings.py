"""Where the receiver's secret comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.hooks.settings import read_settings
from modelpress.errors import ConfigError


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SECRET", "SECRET_FILE", "PORT"):
        monkeypatch.delenv(f"MODELPRESS_HOOKS_{name}", raising=False)


def test_the_file_wins_and_holds_the_new_one_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text(f"{'n' * 32}\n\n {'o' * 32} \n")
    monkeypatch.setenv("MODELPRESS_HOOKS_SECRET", "e" * 32)
    assert read_settings().secrets() == [b"e" * 32]
    monkeypatch.setenv("MODELPRESS_HOOKS_SECRET_FILE", str(tmp_path / "secret"))
    assert read_settings().secrets() == [b"n" * 32, b"o" * 32]
    assert "e" * 32 not in repr(read_settings())


@pytest.mark.parametrize("text", ["", "\n \n", "short", f"{'n' * 32}\nshort\n"])
def test_no_secret_and_a_short_one_are_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "secret").write_text(text)
    with pytest.raises(ConfigError, match="MODELPRESS_HOOKS_SECRET_FILE") as refused:
        read_settings(secret_file=tmp_path / "secret").secrets()
    assert "token_urlsafe" in str(refused.value)
    assert "n" * 32 not in str(refused.value)


def test_other_mistakes_name_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_settings(secret_file=tmp_path / "none").secrets()
    (tmp_path / "binary").write_bytes(b"\xff" * 40)
    with pytest.raises(ConfigError, match="no UTF-8"):
        read_settings(secret_file=tmp_path / "binary").secrets()
    monkeypatch.setenv("MODELPRESS_HOOKS_PORT", "70000")
    with pytest.raises(ConfigError, match="MODELPRESS_HOOKS_PORT"):
        read_settings()
