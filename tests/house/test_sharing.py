"""The suite's own order: real workers of pytest-xdist on a small suite."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.sharing import WAITING

CONFTEST = "from tests.sharing import pytest_collection, pytest_xdist_make_scheduler\n"
NOTE = """
import os, pathlib

def note(what):
    with pathlib.Path({folder!r}, what + "-" + os.environ["PYTEST_XDIST_WORKER"]).open("a") as notes:
        notes.write({name!r} + "\\n")

note("read")

def test_it():
    note("run")
"""


def run(folder: Path, *arguments: str) -> str:
    """Two workers on the suite in a folder: what they said."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\ntestpaths = small\n")
    command = [sys.executable, "-m", "pytest", "-p", "xdist.plugin", "-n", "2", "--dist", "loadfile"]
    done = subprocess.run(
        [*command, "--no-loadscope-reorder", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def write(folder: Path, name: str) -> None:
    path = folder / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(NOTE.format(folder=str(folder), name=name))


def test_one_worker_begins_with_what_waits_and_one_with_what_computes(tmp_path: Path) -> None:
    names = ["tests/advise/test_a", "tests/integration/test_b", "tests/prune/test_c", "tests/stack/test_d"]
    for name in names:
        write(tmp_path, name)
    assert "4 passed" in run(tmp_path, "tests")
    first, last = ((tmp_path / f"run-gw{worker}").read_text().splitlines() for worker in range(2))
    assert first[0] == names[1]
    assert last[0] == names[0]
    assert sorted([*first, *last]) == names


def test_each_worker_reads_its_share_first_and_what_is_wrong_is_told_once(tmp_path: Path) -> None:
    names = [f"small/test_{letter}" for letter in "abcd"]
    for name in names:
        write(tmp_path, name)
    (tmp_path / "small" / "__init__.py").touch()
    (tmp_path / "small" / "test_e.py").write_text("import pytest\npytest.skip('none here', allow_module_level=True)\n")
    assert "4 passed, 1 skipped" in run(tmp_path)
    read = [(tmp_path / f"read-gw{worker}").read_text().splitlines() for worker in range(2)]
    assert read == [[names[0], names[2], names[1], names[3]], [names[1], names[3], names[0], names[2]]]
    (tmp_path / "small" / "test_f.py").write_text("import nothing_of_that_name\n")
    said = run(tmp_path)
    assert "ERROR small/test_f.py" in said
    assert "1 error" in said


def test_what_waits_is_there() -> None:
    assert not [path for path in WAITING if not (ROOT / path).exists()]
