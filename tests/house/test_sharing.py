"""The suite's own order: real workers of pytest-xdist on a small suite."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.sharing import WAITING

CONFTEST = "from tests.sharing import pytest_xdist_make_scheduler\n"
NOTE = """
import os, pathlib

def test_it():
    with (pathlib.Path(__file__).parents[2] / os.environ["PYTEST_XDIST_WORKER"]).open("a") as notes:
        notes.write({name!r} + "\\n")
"""


def test_one_worker_begins_with_what_waits_and_one_with_what_computes(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for name in ("advise/test_a", "integration/test_b", "prune/test_c", "stack/test_d"):
        path = tmp_path / "tests" / f"{name}.py"
        path.parent.mkdir(parents=True)
        path.write_text(NOTE.format(name=name))
    command = ["-m", "pytest", "-p", "xdist.plugin", "-n", "2", "--dist", "loadfile", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command, "-c", os.devnull, "--no-loadscope-reorder", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, last = ((tmp_path / worker).read_text().splitlines() for worker in ("gw0", "gw1"))
    assert first[0] == "integration/test_b"
    assert last[0] == "advise/test_a"
    assert sorted([*first, *last]) == ["advise/test_a", "integration/test_b", "prune/test_c", "stack/test_d"]


def test_what_waits_is_there() -> None:
    assert not [path for path in WAITING if not (ROOT / path).exists()]
