"""Start, stop and remove a stack from outside: what the commands call."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil

from modelpress.errors import ConfigError, SetupError
from modelpress.stack import parts, processes
from modelpress.stack.credentials import make_credentials, write_shell
from modelpress.stack.layout import Chosen, Folder, State, write
from modelpress.stack.processes import MARK
from modelpress.stack.supervisor import SUPERVISOR, Supervisor

S3_PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd")
S3_INSTALL = "sudo apt-get install radosgw ceph-mon ceph-osd"
LOCAL = "local"
OPTIONAL = ("worker", "serving")
"""Parts that no other needs."""
UP_SECONDS = 1500.0
"""More than all parts may take one after the other."""
DOWN_SECONDS = 240.0
LOOKS_SECONDS = 1.0
"""A `status` that looks whether the lock is held has it for a moment."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What a user asks for; what is left out stays as it was chosen before."""

    ports: Mapping[str, int] = field(default_factory=dict)
    """By part; 0 takes a free one."""
    store: str | None = None
    """`local`: the stack's own S3 server."""
    checkout: Path | None = None
    listen: str | None = None
    without: Collection[str] = ()


def default_folder() -> Path:
    """`$MODELPRESS_STACK`, else `$MODELPRESS_HOME/stack`, else below the user's folder for data."""
    if stack := os.environ.get("MODELPRESS_STACK"):
        return Path(stack)
    if home := os.environ.get("MODELPRESS_HOME"):
        return Path(home) / "stack"
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "modelpress" / "stack"


def up(folder: Folder, wanted: Wanted, say: Say) -> State:
    """Start the stack, unless it runs, and wait until it is healthy.

    Raises:
        SetupError: a part did not become healthy; nothing of the stack runs any more. Or this machine lacks something.
        ConfigError: what is wanted is not possible.
    """
    folder.make()
    with folder.locked(LOOKS_SECONDS) as lock:
        if lock is not None:
            say("starting: the first time takes a minute or two" if folder.read_state() is None else "starting")
            chosen = _choose(folder, wanted)
            supervisor = _launch(folder, chosen, lock)
        else:
            supervisor = None
            _refuse_changes(folder, wanted)
            state = folder.read_state()
            say("it runs already" if state and state.phase == "up" else "it is on its way already: waiting for it")
    try:
        return _follow(folder, supervisor, say)
    except KeyboardInterrupt:
        if supervisor is not None:
            say("interrupted: stopping what runs")
            down(folder, say)
        raise


def stay(folder: Folder, wanted: Wanted) -> NoReturn:
    """Become the stack's supervisor, until a signal.

    Raises:
        SetupError: it runs already, or this machine lacks something.
    """
    folder.make()
    with folder.locked(LOOKS_SECONDS) as lock:
        if lock is None:
            found, fix = "it runs already", "`modelpress down` first"
            raise SetupError(f"starting the stack in {folder.path}", found=found, fix=fix)
        chosen = _choose(folder, wanted)
        os.set_inheritable(lock, True)
        command, environment = _supervisor(folder, chosen)
        sys.stdout.flush()
        os.execve(command[0], command, environment)  # a mark counts from a process's first moment on


def supervise(folder: Folder, chosen: Chosen) -> bool:
    """The supervisor's work; the lock is held."""
    return Supervisor(folder, chosen.identity, parts.build(folder, chosen, make_credentials(folder))).run()


def down(folder: Folder, say: Say) -> int:
    """Stop the stack: the supervisor first, then whatever still carries the mark.

    Returns:
        The number of processes that no supervisor ended.

    Raises:
        SetupError: it can't be stopped.
    """
    chosen = folder.read_chosen()
    if chosen is None:
        return 0
    end = time.monotonic() + DOWN_SECONDS
    asked = False
    while folder.is_held():
        found = processes.marked(f"{chosen.identity}/{SUPERVISOR}")
        if not asked and found:
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGTERM)
            asked = True
        if time.monotonic() > end:
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if not found:
                raise SetupError(
                    f"stopping the stack in {folder.path}", found="its lock is held, by no supervisor of it"
                )
        time.sleep(0.1)
    left = processes.end_all(f"{chosen.identity}/", 20.0)
    state = folder.read_state()
    if state is not None and state.phase not in ("stopped", "failed"):
        _mark_stopped(folder, state)
    if left:
        say(f"ended what a killed supervisor had left: {left} processes")
    return left


def delete(folder: Folder) -> None:
    """Remove a stack that is down, with all its data.

    Raises:
        SetupError: it runs, or can't be removed.
        ConfigError: the folder is no stack's; nothing was touched.
    """
    doing = f"removing the stack in {folder.path}"
    if folder.read_chosen() is None:
        raise ConfigError(doing, found="a folder without stack.json", expected="a stack's folder")
    with folder.locked() as lock:
        if lock is None:
            raise SetupError(doing, found="it runs", fix="`modelpress down` first")
        try:
            shutil.rmtree(folder.path)
        except OSError as error:
            raise SetupError(doing, found=str(error)) from error


def look(folder: Folder) -> State | None:
    """How the stack is, also where its supervisor was killed and left no last word. None: it was never started."""
    state = folder.read_state()
    if state is None or state.phase in ("stopped", "failed") or folder.is_held():
        return state
    why = "the supervisor was killed; `modelpress up` starts again, `modelpress down` clears up"
    gone = [part.model_copy(update={"status": "stopped", "pid": None, "why": ""}) for part in state.parts]
    return state.model_copy(update={"phase": "failed", "why": why, "parts": gone})


def _mark_stopped(folder: Folder, state: State) -> None:
    parts = [part.model_copy(update={"status": "stopped", "pid": None, "why": ""}) for part in state.parts]
    with contextlib.suppress(OSError):
        write(folder.state, state.model_copy(update={"phase": "stopped", "parts": parts}).model_dump_json(indent=2))


def _choose(folder: Folder, wanted: Wanted) -> Chosen:
    """What is to be started: kept, asked for, or found; with its files written. The lock is held."""
    before = folder.read_chosen()
    chosen = before or Chosen()
    if left := processes.end_all(f"{chosen.identity}/", 20.0):
        print(f"ended {left} processes of an earlier supervisor", file=sys.stderr)
    store = chosen.store if wanted.store is None else "" if wanted.store == LOCAL else wanted.store
    checkout = _checkout(wanted.checkout or (Path(chosen.checkout) if chosen.checkout else None))
    host = wanted.listen or chosen.host
    if not store:
        _check_s3()
    names = [name for name in parts.LISTENING if name not in wanted.without and (name != "s3" or not store)]
    for asked, known in ((wanted.ports, parts.LISTENING), (wanted.without, OPTIONAL)):
        if unknown := sorted(set(asked) - set(known)):
            found = f"no part {', '.join(unknown)}" if known is not OPTIONAL else f"without {', '.join(unknown)}"
            raise ConfigError("starting the stack", found=found, expected=f"one of {', '.join(known)}")
    ports = _ports(host, names, chosen.ports, wanted.ports)
    changes = {"ports": ports, "store": _absolute(store), "checkout": str(checkout), "host": host}
    chosen = chosen.model_copy(update=changes)
    try:
        write(folder.chosen, chosen.model_dump_json(indent=2))
        parts.write_mlflow_logins(folder)
        (folder.path / "home").mkdir(mode=0o700, exist_ok=True)
        folder.state.unlink(missing_ok=True)
    except OSError as error:
        raise SetupError(
            f"writing to the stack's folder {folder.path}", found=str(error), fix="free space there"
        ) from error
    write_shell(folder, chosen, make_credentials(folder))
    return chosen


def _absolute(store: str) -> str:
    return store if not store or "://" in store else str(Path(store).expanduser().absolute())


def _checkout(given: Path | None) -> Path:
    found = (given or Path(__file__).parents[2]).expanduser().absolute()
    if not (found / "infra" / "prefect.yaml").is_file():
        raise SetupError(
            "looking for the clone of modelpress, which holds the deployments",
            found=f"{found} without infra/prefect.yaml",
            fix="give the folder of a clone: modelpress up --checkout FOLDER",
        )
    return found


def _check_s3() -> None:
    if missing := [name for name in S3_PROGRAMS if shutil.which(name) is None]:
        raise SetupError(
            "looking for the programs of the local S3 server (Ceph RGW)",
            found=f"no {', '.join(missing)}",
            fix=f"{S3_INSTALL}; or `modelpress up --store s3://bucket/prefix`; or `--store FOLDER`, on this machine",
        )


def _ports(host: str, names: list[str], kept: Mapping[str, int], wanted: Mapping[str, int]) -> dict[str, int]:
    """A port for each part: the one that is asked for, else the one that it had, else the usual one, else a free one.

    Raises:
        SetupError: one that was asked for or kept is in use.
    """
    with contextlib.ExitStack() as held:  # so that no two get the same
        ports: dict[str, int] = {}
        for name in sorted(names, key=lambda name: not (wanted.get(name) or kept.get(name))):
            fixed = wanted.get(name, kept.get(name, 0))
            tries = [fixed] if fixed else [0] if name in wanted else [parts.USUAL_PORTS[name], 0]
            for port in tries:
                with contextlib.suppress(OSError):
                    ports[name] = held.enter_context(_bound(host, port))
                    break
            else:
                raise SetupError(
                    f"taking port {fixed} of {host} for {name}",
                    found="another program listens there, or the address is not this machine's",
                    fix=f"end it, or take a free one: modelpress up --port {name}=0",
                )
    return {name: ports[name] for name in names}


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[int]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        probe.listen(1)  # with that option, two may bind, and only one may listen
        yield int(probe.getsockname()[1])


def _launch(folder: Folder, chosen: Chosen, lock: int) -> subprocess.Popen[bytes]:
    """A supervisor in a session of its own, which inherits the lock."""
    command, environment = _supervisor(folder, chosen)
    try:
        log = os.open(folder.log(SUPERVISOR), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as error:
        raise SetupError(f"writing to the stack's folder {folder.path}", found=str(error)) from error
    try:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[lock],
        )
    finally:
        os.close(log)


def _supervisor(folder: Folder, chosen: Chosen) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, MARK: f"{chosen.identity}/{SUPERVISOR}"}
    return [sys.executable, "-m", "modelpress.stack", str(folder.path)], environment


def _refuse_changes(folder: Folder, wanted: Wanted) -> None:
    if wanted != Wanted():
        raise SetupError(
            f"starting the stack in {folder.path}",
            found="it runs already, and other options are asked for",
            fix="`modelpress down`, then `modelpress up` with them",
        )


def _follow(folder: Folder, supervisor: subprocess.Popen[bytes] | None, say: Say) -> State:
    """Wait for the end of a start, and say what happens meanwhile."""
    doing, end = f"starting the stack in {folder.path}", time.monotonic() + UP_SECONDS
    told: dict[str, str] = {}
    while time.monotonic() < end:
        gone = supervisor.poll() is not None if supervisor else not folder.is_held()
        state = folder.read_state()
        for part in state.parts if state else []:
            if part.status in ("healthy", "done") and told.get(part.name) != part.status:
                say(f"  {part.name}: {part.status}")
                told[part.name] = part.status
        if state is not None and state.phase == "up" and not gone and psutil.pid_exists(state.pid):
            return state
        if gone:
            log = folder.log(SUPERVISOR)
            why = state.why if state else ""
            if not why and state is not None and state.phase == "stopped":
                why = "it was stopped meanwhile"
            raise SetupError(
                doing,
                found=why or f"the supervisor ended; see {log}",
                expected="every part healthy",
                fix="nothing of it runs now; mend it and start again",
            )
        time.sleep(0.1)
    raise SetupError(
        doing, found=f"it is not up after {UP_SECONDS:g} s", fix="see `modelpress status` and `modelpress logs`"
    )
