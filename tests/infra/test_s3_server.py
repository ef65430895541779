"""The script that starts the S3 server: what it may remove, and that it leaves no daemon behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "infra/s3/server.py"


def call(command: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), command, "--folder", str(folder), *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def hear_interrupts() -> None:
    """A suite that a shell runs in the background is started deaf to them, and so are its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def daemons(folder: Path) -> list[int]:
    """The processes that run with this folder's configuration."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if str(folder / "ceph.conf").encode() in line.split(b"\0"):
            found.append(int(path.parent.name))
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


def credentials(path: Path, key: str, secret: str) -> Path:
    path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    return path


@pytest.mark.s3
def test_keys_and_address_can_be_given_and_are_not_printed(tmp_path: Path) -> None:
    """As `infra/compose.yaml` starts it: on a port of one's choice, with keys from files."""
    import boto3
    from botocore.exceptions import ClientError

    pairs = {"writer": ("WRITERWRITER", "w" * 40), "reader": ("READERREADER", "r" * 40)}
    given = [part for role, pair in pairs.items() for part in (f"--{role}", str(credentials(tmp_path / role, *pair)))]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(SCRIPT), "run", "--folder", str(tmp_path / "ceph"), "--listen", f"0.0.0.0:{port}"]
    with subprocess.Popen([*command, *given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said == f"export MODELPRESS_TEST_S3_ENDPOINT=http://127.0.0.1:{port}\n"
        writer, reader = (
            boto3.client(
                "s3",
                "us-east-1",
                endpoint_url=f"http://127.0.0.1:{port}",
                aws_access_key_id=key,
                aws_secret_access_key=secret,
            )
            for key, secret in pairs.values()
        )
        writer.create_bucket(Bucket="models")
        writer.put_object(Bucket="models", Key="x", Body=b"x")
        assert reader.get_object(Bucket="models", Key="x")["Body"].read() == b"x"
        with pytest.raises(ClientError, match="AccessDenied"):
            reader.put_object(Bucket="models", Key="y", Body=b"y")
        process.stdin.close()
        assert process.stdout.read() == "", "the given keys are in no log"
        assert process.wait(60) == 0


@pytest.mark.s3
def test_what_is_kept_outlives_a_kill_and_goes_with_a_stop(tmp_path: Path) -> None:
    import boto3
    from botocore.exceptions import ClientError

    folder = tmp_path / "ceph"
    capacity = ["--capacity-bytes", str(4 * 2**30)]
    for turn in range(2):
        started = call("start", folder, "--keep", *capacity)
        assert started.returncode == 0, started.stderr
        found = dict(re.findall(r"export MODELPRESS_TEST_S3_(\w+)=(\S+)", started.stdout))
        client = boto3.client(
            "s3",
            "us-east-1",
            endpoint_url=found["ENDPOINT"],
            aws_access_key_id=found["KEY"],
            aws_secret_access_key=found["SECRET"],
        )
        if turn == 0:
            client.create_bucket(Bucket="models")
            client.put_object(Bucket="models", Key="x", Body=b"x" * 100_000)
            for pid in daemons(folder):
                os.kill(pid, signal.SIGKILL)
    assert client.get_object(Bucket="models", Key="x")["Body"].read() == b"x" * 100_000
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket="models", Key="x", Body=b"y", IfNoneMatch="*")
    refused = call("start", folder)
    assert refused.returncode == 3
    assert "holds objects that are kept" in refused.stderr
    assert daemons(folder), "and nothing was touched"
    assert call("stop", folder).returncode == 0
    assert not daemons(folder)
    assert not folder.exists()


@pytest.mark.parametrize("text", ["", "[other]\n", "[default]\naws_access_key_id = A\n", "secret without a section"])
def test_a_file_that_holds_no_key_is_refused_without_showing_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "writer").write_text(text)
    command = [
        sys.executable,
        str(SCRIPT),
        "start",
        "--folder",
        str(tmp_path / "ceph"),
        "--writer",
        str(tmp_path / "writer"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert f"{tmp_path}/writer is no credentials file" in done.stderr
    assert "secret without" not in done.stderr
    assert not (tmp_path / "ceph").exists()
