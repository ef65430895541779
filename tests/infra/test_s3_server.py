"""The script that starts the S3 server: what it may remove, and that it leaves no daemon behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "infra/s3/server.py"


def call(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), command, "--folder", str(folder)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def hear_interrupts() -> None:
    """A suite that a shell runs in the background is started deaf to them, and so are its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def daemons(folder: Path) -> list[str]:
    """Command lines of the processes that run with this folder's configuration."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if str(folder / "ceph.conf").encode() in line.split(b"\0"):
            found.append(line.replace(b"\0", b" ").decode())
    return found


@pytest.mark.parametrize("command", ["start", "stop", "run"])
def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path, command: str) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "data"
    for path in (elsewhere, folder):
        path.mkdir()
        (path / "precious").write_text("kept")
    (folder / "run").symlink_to(elsewhere)
    done = call(command, folder)
    assert done.returncode == 3
    assert "not the server's" in done.stderr
    assert (folder / "precious").read_text() == (elsewhere / "precious").read_text() == "kept"


def test_only_its_own_folder_of_sockets_is_removed(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "data"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("kept")
    folder.mkdir()
    (folder / ".modelpress-s3").touch()
    (folder / "run").symlink_to(elsewhere)
    assert call("stop", folder).returncode == 0
    assert not folder.exists()
    assert (elsewhere / "precious").read_text() == "kept"


@pytest.mark.s3
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_start_that_is_interrupted_leaves_no_daemon(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "ceph"
    command = [sys.executable, str(SCRIPT), "start", "--folder", str(folder)]
    with subprocess.Popen(command, preexec_fn=hear_interrupts) as process:
        while process.poll() is None and not (folder / "osd.0.pid").exists():
            time.sleep(0.01)
        assert daemons(folder)
        process.send_signal(number)
        assert process.wait(60) == 130
    assert daemons(folder) == []
    assert not folder.exists()
