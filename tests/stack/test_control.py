"""What is chosen before anything starts, what is refused, and what the commands say."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from modelpress.errors import ConfigError, SetupError
from modelpress.stack import control, parts, processes
from modelpress.stack.credentials import make_credentials, write_shell
from modelpress.stack.layout import Chosen, Folder, PartState, State, write
from tests.conftest import ROOT

FREE = dict.fromkeys(parts.LISTENING, 0)


def command(*arguments: str, folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "modelpress.cli", *arguments, "--folder", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,  # type: ignore[call-overload]
    )


def made(path: Path, **chosen: object) -> tuple[Folder, Chosen]:
    folder = Folder(path)
    folder.make()
    document = Chosen.model_validate(
        {"ports": {"prefect": 1, "mlflow": 2, "worker": 3, "serving": 4, "s3": 5}} | chosen
    )
    write(folder.chosen, document.model_dump_json())
    return folder, document


def test_where_a_stack_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MODELPRESS_STACK", "MODELPRESS_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert control.default_folder() == tmp_path / "modelpress" / "stack"
    monkeypatch.setenv("MODELPRESS_HOME", "/somewhere")
    assert control.default_folder() == Path("/somewhere/stack")
    monkeypatch.setenv("MODELPRESS_STACK", "/elsewhere")
    assert control.default_folder() == Path("/elsewhere")


def test_a_port_that_is_taken_is_named_with_its_part(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = command("up", "--store", str(tmp_path / "store"), "--port", f"mlflow={port}", folder=tmp_path / "stack")
    assert done.returncode == 3
    assert f"taking port {port} of 127.0.0.1 for mlflow" in done.stderr
    assert "--port mlflow=0" in done.stderr
    folder = Folder(tmp_path / "stack")
    assert folder.read_chosen() is None, "nothing was chosen"
    assert not folder.is_held()
    done = command("up", "--store", "x", "--without", "nothing", folder=folder.path)
    assert "found: without nothing" in done.stderr, "the folder is a stack's, and the next start gets as far"


def test_who_looks_at_the_lock_does_not_keep_it_from_who_starts(tmp_path: Path) -> None:
    folder, _ = made(tmp_path / "stack")
    with folder.locked() as looking:
        assert looking is not None
        threading.Timer(0.2, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with folder.locked(seconds=30.0) as lock:
            assert lock is not None


def test_ports_differ_and_stay(tmp_path: Path) -> None:
    first = control._ports("127.0.0.1", list(parts.LISTENING), {}, FREE)
    assert len(set(first.values())) == len(parts.LISTENING)
    assert control._ports("127.0.0.1", list(parts.LISTENING), first, {}) == first
    assert control._ports("127.0.0.1", ["s3"], first, {"s3": 0})["s3"] != first["s3"]


def test_the_usual_port_is_taken_where_it_is_free_and_another_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        monkeypatch.setitem(parts.USUAL_PORTS, "mlflow", other.getsockname()[1])
        usual = parts.USUAL_PORTS["mlflow"]
        other.listen()
        assert control._ports("127.0.0.1", ["mlflow"], {}, {})["mlflow"] != usual
    assert control._ports("127.0.0.1", ["mlflow"], {}, {})["mlflow"] == usual


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--port", "mlfow=0"], 2, "no part mlfow"),
        (["--port", "mlflow"], 2, "PART=PORT"),
        (["--port", "mlflow=70000"], 2, "PART=PORT"),
        (["--without", "mlflow"], 2, "one of worker, serving"),
        (["--checkout", "/"], 3, "infra/prefect.yaml"),
        (["--listen", "203.0.113.7"], 3, "not this machine's"),
    ],
)
def test_what_is_not_possible_is_refused_before_anything_starts(
    tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    done = command("up", "--store", str(tmp_path / "store"), *arguments, folder=tmp_path / "stack")
    assert done.returncode == code
    assert words in done.stderr
    assert Folder(tmp_path / "stack").read_state() is None


def test_without_an_s3_server_it_says_how_to_get_one(tmp_path: Path) -> None:
    done = command("up", folder=tmp_path / "stack", env={**os.environ, "PATH": "/nowhere"})
    assert done.returncode == 3
    assert "no radosgw, radosgw-admin, ceph, ceph-mon, ceph-osd" in done.stderr
    assert "apt-get install radosgw ceph-mon ceph-osd" in done.stderr
    assert "--store" in done.stderr


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    for name in ("up", "down"):
        done = command(name, *(["--delete", "--yes"] if name == "down" else []), folder=tmp_path)
        assert (done.returncode == 3) == (name == "up")
    assert [item.name for item in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(ConfigError, match=r"without stack\.json"):
        control.delete(Folder(tmp_path))


def test_a_folder_that_cant_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = command("up", folder=tmp_path / "file" / "stack")
    assert done.returncode == 3
    assert f"making the stack's folder {tmp_path}/file/stack" in done.stderr


def test_a_full_disk_is_named_and_nothing_starts(tmp_path: Path) -> None:
    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    arguments = ["up", "--store", str(tmp_path / "store"), *(f"--port={name}=0" for name in FREE if name != "s3")]
    done = command(*arguments, folder=tmp_path / "stack", preexec_fn=full)
    assert done.returncode == 3, done.stderr
    assert "writing to the stack's folder" in done.stderr
    assert not Folder(tmp_path / "stack").is_held()


def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    folder, _ = made(tmp_path / "stack")
    folder.state.write_text('{"phase": "up", "pid"')
    done = command("status", folder=folder.path)
    assert done.returncode == 2
    assert str(folder.state) in done.stderr


def test_another_up_with_other_options_is_refused_while_it_runs(tmp_path: Path) -> None:
    folder, _ = made(tmp_path / "stack")
    with folder.locked() as lock:
        assert lock is not None
        with pytest.raises(SetupError, match="it runs already"):
            control.up(folder, control.Wanted(store="/elsewhere"), print)
        with pytest.raises(SetupError, match="it runs"):
            control.delete(folder)


def test_the_lock_goes_with_who_inherits_it(tmp_path: Path) -> None:
    folder, _ = made(tmp_path / "stack")
    with folder.locked() as lock:
        assert lock is not None
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[lock]
        )
    assert folder.is_held()
    child.communicate()
    assert not folder.is_held()


def test_credentials_are_made_once_and_for_this_user_alone(tmp_path: Path) -> None:
    folder, chosen = made(tmp_path / "stack")
    keys = make_credentials(folder)
    assert make_credentials(folder) == keys
    shell = write_shell(folder, chosen, keys)
    files = list(folder.keys.iterdir())
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert keys.prefect not in repr(keys)
    assert len({file.read_text() for file in files}) == len(files)
    said = command("env", folder=folder.path).stdout
    assert said == f". {shell}\n"
    names = subprocess.run(
        ["sh", "-c", f"{said}echo $PREFECT_API_AUTH_STRING; echo ${{AWS_ACCESS_KEY_ID-none}}; echo $MODELPRESS_STACK"],
        env={"AWS_ACCESS_KEY_ID": "somebody's", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert names.stdout.split() == [keys.prefect, "none", str(folder.path)]
    (folder.keys / "prefect").chmod(0o644)
    with pytest.raises(SetupError, match="others can read it"):
        make_credentials(folder)


def test_no_secret_is_on_a_command_line_and_each_part_has_its_own(tmp_path: Path) -> None:
    folder, chosen = made(tmp_path / "stack", checkout=str(ROOT))
    keys = make_credentials(folder)
    built = {part.name: part for part in parts.build(folder, chosen, keys)}
    assert list(built) == ["s3", "prefect", "mlflow", "prepare", "worker", "serving"]
    texts = [keys.prefect, keys.mlflow, keys.mlflow_admin, keys.mlflow_session, keys.serving]
    for part in built.values():
        assert not [text for text in texts if text.rpartition(":")[2] in " ".join(part.command)]
        assert not [text for text in texts if text in repr(part)]
    holders = {text: {part.name for part in built.values() if text in part.environment.values()} for text in texts}
    assert holders[keys.mlflow_admin] == holders[keys.mlflow_session] == {"mlflow"}
    assert holders[keys.mlflow] == {"prepare", "worker"}
    assert holders[keys.prefect] == {"prefect", "prepare", "worker"}
    assert holders[keys.serving] == set(), "it reads the file"
    assert built["serving"].environment["AWS_SHARED_CREDENTIALS_FILE"] == str(keys.s3_reader)


def test_what_leads_to_other_servers_is_left_behind() -> None:
    given = {
        "PATH": "/bin",
        "PREFECT_API_URL": "https://elsewhere",
        "MLFLOW_TRACKING_TOKEN": "x",
        "AWS_ACCESS_KEY_ID": "x",
        "MODELPRESS_STORE": "s3://elsewhere",
        "MODELPRESS_S3_ENDPOINT_URL": "https://elsewhere",
        "MODELPRESS_SIGNING_KEY_FILE": "mine.pem",
    }
    assert set(parts.base_environment(given, own_s3=True)) - set(parts.QUIET) == {"PATH", "MODELPRESS_SIGNING_KEY_FILE"}
    external = set(parts.base_environment(given, own_s3=False)) - set(parts.QUIET)
    assert external == {"PATH", "MODELPRESS_SIGNING_KEY_FILE", "AWS_ACCESS_KEY_ID", "MODELPRESS_S3_ENDPOINT_URL"}


def test_status_says_how_each_is_and_ends_with_it(tmp_path: Path) -> None:
    folder, chosen = made(tmp_path / "stack")
    done = command("status", folder=folder.path)
    assert done.returncode == 3
    assert "modelpress up" in done.stdout
    good = PartState(name="prefect", status="healthy", pid=1, address="http://127.0.0.1:1")
    bad = PartState(name="mlflow", status="gave up", why="5 times in 5 min")
    for rows, code in (([good], 0), ([good, bad], 3)):
        write(folder.state, State(phase="up", pid=1, parts=rows).model_dump_json())
        with folder.locked() as lock:
            assert lock is not None
            done = command("status", folder=folder.path)
            assert done.returncode == code, done.stderr
            assert all(row.status in done.stdout for row in rows)
            assert [
                one["name"] for one in json.loads(command("status", "--json", folder=folder.path).stdout)["parts"]
            ] == [row.name for row in rows]
    done = command("status", folder=folder.path)
    assert done.returncode == 3
    assert "the supervisor was killed" in done.stdout
    assert processes.marked(f"{chosen.identity}/") == []


def test_logs_show_the_last_lines_and_name_what_there_is(tmp_path: Path) -> None:
    folder, _ = made(tmp_path / "stack")
    for name in ("mlflow", "prefect"):
        folder.log(name).write_text("".join(f"{name} {number}\n" for number in range(50)))
    assert command("logs", "mlflow", "-n", "2", folder=folder.path).stdout == "mlflow 48\nmlflow 49\n"
    assert command("logs", "-n", "1", folder=folder.path).stdout == "    mlflow | mlflow 49\n   prefect | prefect 49\n"
    done = command("logs", "mlfow", folder=folder.path)
    assert done.returncode == 2
    assert "one of: mlflow, prefect" in done.stderr


def test_following_a_log_goes_on_over_a_cut(tmp_path: Path) -> None:
    folder, _ = made(tmp_path / "stack")
    log = folder.log("mlflow")
    log.write_text("before\n")
    call = [sys.executable, "-m", "modelpress.cli", "logs", "mlflow", "-f", "--folder", str(folder.path)]
    with subprocess.Popen(
        call, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "before\n"
        with log.open("a") as file:
            file.write("a second line that is longer\n")
        assert process.stdout.readline() == "a second line that is longer\n"
        log.write_text("cut\n")
        assert process.stdout.readline() == "cut\n"
        process.kill()
