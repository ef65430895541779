"""The documentation is true: its links lead somewhere, its commands exist, its page of code runs as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("modelpress/**/*.md")])
OWN_MODEL = ROOT / "docs" / "bring-your-own.md"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_paths_exist(page: Path) -> None:
    """What stands in backticks and begins with a folder of the repository is there; names with capitals are made up."""
    folders = "|".join(folder.name for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    named = re.findall(rf"`((?:{folders})/[a-z0-9_./-]*)(?::\w+)?`", page.read_text())
    assert not [path for path in named if not (ROOT / path).exists()]


def test_named_commands_exist() -> None:
    from typer.main import get_command

    from modelpress.cli import app

    command = get_command(app)
    known = set(getattr(command, "commands", {}))
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"^(?:[A-Z_]+=\S+ )*modelpress ([a-z-]+)", text, re.MULTILINE))
    assert named
    assert named <= known


def test_named_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"^make ([a-z0-9-]+)", text, re.MULTILINE)) <= targets


def test_own_model_is_under_forty_lines() -> None:
    (code,) = blocks(OWN_MODEL, "python")
    assert len(code.splitlines()) < 40


def test_own_model_runs_as_printed(tmp_path: Path) -> None:
    """The page's class and recipe, by the page's command, to a published and promoted pack."""
    (code,) = blocks(OWN_MODEL, "python")
    recipe = next(block for block in blocks(OWN_MODEL, "yaml") if block.startswith("name: cells"))
    (tmp_path / "cells.py").write_text(code)
    (tmp_path / "cells.yaml").write_text(recipe)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "MODELPRESS_HOME": str(tmp_path / "home"), "NO_COLOR": "1"}
    environment |= {"PREFECT_HOME": str(tmp_path / "prefect"), "COLUMNS": "160"}
    command = [sys.executable, "-m", "modelpress.cli"]
    done = subprocess.run(
        [*command, "run", "cells.yaml"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = subprocess.run(
        [*command, "inspect", "cells@champion"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "int8" in shown.stdout.lower() or "i8" in shown.stdout.lower()
