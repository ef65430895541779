"""The documentation is true: its links lead somewhere, its commands exist, its page of code runs as printed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from modelpress.config import parse_config
from tests.databases import Databases
from tests.encoders import make_encoder_folder

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


def in_folder(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """The command line, and how to call it in `folder` with everything of its own."""
    environment = os.environ | {"PYTHONPATH": str(folder), "MODELPRESS_HOME": str(folder / "home"), "NO_COLOR": "1"}
    environment |= {"PREFECT_HOME": str(folder / "prefect"), "COLUMNS": "160"}
    return [sys.executable, "-m", "modelpress.cli"], {"cwd": folder, "env": environment, "text": True}


def test_own_model_runs_as_printed(tmp_path: Path) -> None:
    """The page's class and recipe, by the page's commands, to a published, promoted and served pack."""
    (code,) = blocks(OWN_MODEL, "python")
    recipe = next(block for block in blocks(OWN_MODEL, "yaml") if block.startswith("name: cells"))
    (tmp_path / "cells.py").write_text(code)
    (tmp_path / "cells.yaml").write_text(recipe)
    command, options = in_folder(tmp_path)
    done = subprocess.run([*command, "run", "cells.yaml"], capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = subprocess.run([*command, "inspect", "cells@champion"], capture_output=True, check=False, **options)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "int8" in shown.stdout.lower() or "i8" in shown.stdout.lower()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen([*command, "serve", "cells", "--port", str(port)], **options) as server:
        try:
            assert_answers(f"http://127.0.0.1:{port}/v2/models/cells", server)
        finally:
            server.terminate()
        assert server.wait(30) == 0


def assert_answers(model: str, server: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        try:
            if httpx.get(f"{model}/ready").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.1)
    tensor = {"name": "input", "shape": [2, 30], "datatype": "FP32", "data": [0.0] * 60}
    answer = httpx.post(f"{model}/infer", json={"inputs": [tensor]})
    assert answer.status_code == 200, answer.text
    assert answer.json()["outputs"][0]["shape"] == [2, 2]


def test_a_folder_of_an_encoder_runs_as_printed(tmp_path: Path, databases: Databases) -> None:
    """The page's first recipe, with a folder and pairs that are there, to a promoted pack."""
    databases.seed("prefect", tmp_path / "prefect" / "prefect.db")  # the other page's run begins on nothing
    databases.mlflow(tmp_path / "home")
    make_encoder_folder(tmp_path / "our-encoder", pairs=2000)
    recipe = next(block for block in blocks(OWN_MODEL, "yaml") if block.startswith("name: our-encoder"))
    recipe = recipe.replace("/models/our-encoder", str(tmp_path / "our-encoder"))
    recipe = recipe.replace("/data/pairs.jsonl", str(tmp_path / "our-encoder" / "pairs.jsonl"))
    (tmp_path / "our-encoder.yaml").write_text(recipe)
    command, options = in_folder(tmp_path)
    done = subprocess.run([*command, "run", "our-encoder.yaml"], capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    checked = subprocess.run([*command, "verify", "our-encoder@champion"], capture_output=True, check=False, **options)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_recipe_of_the_page_is_legal() -> None:
    """Also those whose models are too large to be trained in a test."""
    recipes = [yaml.safe_load(block) for block in blocks(OWN_MODEL, "yaml")]
    assert {parse_config(recipe).name for recipe in recipes} >= {"our-encoder", "our-decoder", "cells"}
