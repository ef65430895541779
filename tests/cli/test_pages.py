"""`report`, `compare` and `fleet`: which file they write, and what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from modelpress import errors
from tests.cli.conftest import Run
from tests.databases import Databases
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
    assert run("fleet", "scale", "--out", str(tmp_path / "one.html"))[0] == 0
    assert (tmp_path / "one.html").read_text() == page
    code, _, err = run("fleet", "scale", "nobody", "--out", str(tmp_path / "none.html"))
    assert code == errors.NotFoundError.exit_code
    assert "looking for model 'nobody'" in err
    assert not (tmp_path / "none.html").exists()


def test_a_fleet_with_its_registry(
    packs: list[str], run: Run, databases: Databases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--out", str(tmp_path / "all.html"))
    code, _, err = run("fleet", "--registry", *out)
    assert (code, "no database" in err) == (errors.SetupError.exit_code, True)
    address = databases.mlflow(tmp_path / "mlflow")
    monkeypatch.setenv("MODELPRESS_TRACKING_URI", address)
    MlflowClient(address, address).create_registered_model("of somebody")
    assert run("fleet", "--registry", *out)[0] == 0
    page = (tmp_path / "all.html").read_text()
    assert "Without a pack: of somebody." in page
    assert "2 of 2 published packs are carried by no version" in page
    assert "servers follow pack" in page, "the registry has not heard of the champion"
    assert run("fleet", "of somebody", "--registry", *out)[0] == 0
    assert packs[1][:12] not in (tmp_path / "all.html").read_text()
    code, _, err = run("fleet", "nobody", "--registry", *out)
    assert code == errors.NotFoundError.exit_code
    assert "no registered model of this name" in err
    monkeypatch.setenv("MODELPRESS_TRACKING_URI", "http://127.0.0.1:9")
    assert run("fleet", "--registry", *out)[0] == errors.SetupError.exit_code
