"""`report`, `compare` and `fleet`: which file they write, and what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpress import errors
from tests.cli.conftest import Run
from tests.page.beside import advice, profile


def test_a_report_is_a_file(packs: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("report", "scale")
    made = tmp_path / f"scale-{packs[1][:12]}.html"
    assert code == 0
    assert out.endswith(f"in {made.name}\n")
    assert packs[1] in made.read_text()
    assert run("report", f"scale@{packs[0]}", "--out", "pages/first.html")[0] == 0
    assert packs[0] in Path("pages/first.html").read_text()
    assert list(tmp_path.glob(".page-*")) == []
    printed = run("report", "scale", "--out", "-")[1]
    assert printed == made.read_text()
    Path("advice.json").write_text(advice().model_dump_json())
    Path("profile.json").write_text(profile().model_dump_json())
    assert run("report", "scale", "--with", "advice.json", "--with", "profile.json", "--out", "both.html")[0] == 0
    assert all(text in Path("both.html").read_text() for text in ("What was advised", "Which resource binds"))
    assert run("report", "scale", "--with", "none.json")[0] == errors.ConfigError.exit_code
    assert run("report", "other")[0] == errors.StoreError.exit_code
    assert run("report", "scale", "--out", str(made / "under"))[0] != 0


def test_a_comparison_and_a_fleet_are_files(packs: list[str], run: Run, tmp_path: Path) -> None:
    code, out, _ = run("compare", f"scale@{packs[0]}", "@champion", "--out", str(tmp_path / "two.html"))
    assert (code, "scale " in out) == (0, True)
    page = (tmp_path / "two.html").read_text()
    assert packs[0] in page
    assert packs[1] in page
    assert run("fleet", "--out", str(tmp_path / "all.html"))[0] == 0
    page = (tmp_path / "all.html").read_text()
    assert packs[1][:12] in page
    assert packs[0][:12] not in page
