"""Models by name: what is in the cache is read, what is not says what to do, and what is no pinned name is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modelpress.errors import WorkloadError
from modelpress.workloads.hub import fetch
from tests.decoders import make_decoder_folder, make_text_folder

ROOT = Path(__file__).parents[2]
REVISION = "0123456789abcdef0123456789abcdef01234567"
RESOLVE = """
import sys
from modelpress.errors import ModelpressError
from modelpress.workloads.hf_folder import resolve_folder
try:
    print(resolve_folder(sys.argv[1]))
except ModelpressError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def resolve(home: Path, model: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the Hub's client reads its environment once."""
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RESOLVE, model]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_model_in_the_cache_needs_no_internet_and_any_other_says_what_to_do(tmp_path: Path) -> None:
    model = make_decoder_folder(tmp_path / "model", make_text_folder(tmp_path / "texts", ("json",)))
    snapshot = tmp_path / "home" / "hub" / "models--our--decoder" / "snapshots" / REVISION
    shutil.copytree(model, snapshot)
    found = resolve(tmp_path / "home", f"hf://our/decoder@{REVISION}")
    assert found.returncode == 0, found.stdout + found.stderr
    assert Path(found.stdout.strip()) == snapshot
    missing = resolve(tmp_path / "home", f"hf://our/other@{REVISION}")
    assert missing.returncode == 3, missing.stdout + missing.stderr
    assert f"hf download our/other --revision {REVISION}" in missing.stdout


@pytest.mark.parametrize("name", ["hf://our/decoder", "hf://our/decoder@main", "hf://decoder@" + REVISION, "hf://"])
def test_a_name_without_a_commit_is_refused(name: str) -> None:
    with pytest.raises(WorkloadError, match="commit"):
        fetch(name)
