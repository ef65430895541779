"""A real S3 server on loopback without Docker: one-node Ceph RGW (mon + osd + radosgw), as an ordinary user.

::

    python infra/s3/server.py start     # installs (apt) if missing, starts, prints `export` lines; again: prints them
    python infra/s3/server.py user NAME # one more user of the running server, without rights; see policies.py
    python infra/s3/server.py stop      # stops it and removes its folder
    python infra/s3/server.py run       # start, print, stop when standard input closes (what the tests use)

Data lies in memory (memstore) and is gone after `stop`; with `--keep` it lies on disk (bluestore, in one sparse file),
`run` leaves it there, and the next start with `--keep` goes on with it, also after a kill. `stop` removes both kinds.
It listens on 127.0.0.1 alone, on ports that were free, unless `--listen` names others. Two keys: one that writes, one
that may only read what the first wrote; made here, or taken from files as AWS's tools have them (`--writer FILE
--reader FILE`, profile `default`). It is a server for development and tests.

Its folder is new or empty at the start; a marker file says that it is the server's, and without it nothing is removed.
"""

from __future__ import annotations

import argparse
import base64
import configparser
import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph-authtool", "monmaptool")
PACKAGES = ("radosgw", "ceph-mon", "ceph-osd")
DAEMONS = ("radosgw", "ceph-osd", "ceph-mon")
MARKER = ".modelpress-s3"
RUN_PREFIX = "modelpress-s3-"
DEADLINE_SECONDS = 120.0
DEFAULT_FOLDER = Path(os.environ.get("MODELPRESS_HOME", ".modelpress")) / "s3"

# cephx with keyrings: with authentication off, radosgw hangs. One copy of everything, no manager: nothing here needs
# one. The gc_* lines free deleted space within seconds instead of two hours.
CONFIG = """\
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon_port}]
mon_initial_members = a
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
keyring = {folder}/keyring
run_dir = {run}
admin_socket = {run}/$name.asok
pid_file = {folder}/$name.pid
log_file = {folder}/$name.log
crash_dir = {folder}
err_to_stderr = false
mon_data = {folder}/mon
mon_cluster_log_file = {folder}/cluster.log
mon_allow_pool_size_one = true
mon_allow_pool_delete = true
mon_data_avail_crit = 1
auth_allow_insecure_global_id_reclaim = false
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv4 = true
osd_data = {folder}/osd
{objects}
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
rgw_frontends = beast endpoint={host}:{port}
rgw_gc_obj_min_wait = 3
rgw_gc_processor_period = 3
rgw_lc_debug_interval = -1
"""
IN_MEMORY = "osd_objectstore = memstore\nmemstore_device_bytes = {capacity}"
ON_DISK = "osd_objectstore = bluestore\nbluestore_block_size = {capacity}\nosd_memory_target = 1073741824"


class StartError(Exception):
    """The server cannot be had here; the text says why."""


Pair = tuple[str, str]
"""Access key and secret key."""


@dataclass(frozen=True)
class Options:
    """What a server can be told; the tests leave all of it out."""

    capacity: int = 8 * 2**30
    """Bytes of memory for objects."""
    listen: str = ""
    """`HOST:PORT` of the S3 endpoint; empty: loopback, a free port."""
    writer: Pair | None = None
    """The key that writes; None makes one."""
    reader: Pair | None = None
    """The key that reads; None makes one."""
    keep: bool = False
    """Objects lie on disk."""


def read_pair(path: Path) -> Pair:
    """The key of the profile `default` in a credentials file.

    Raises:
        StartError: it can't be read, or has no such key.
    """
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text())
        return parser["default"]["aws_access_key_id"], parser["default"]["aws_secret_access_key"]
    except (OSError, UnicodeDecodeError, configparser.Error, KeyError) as error:
        # Not the error's own text: a parser's shows the line, which may be the key.
        expected = "[default] with aws_access_key_id and aws_secret_access_key"
        raise StartError(f"{path} is no credentials file ({type(error).__name__}): it needs {expected}") from None


def install() -> None:
    """Install the Ceph programs with apt where they are missing; of several processes, one does."""
    with Path(tempfile.gettempdir(), f"modelpress-install-{os.geteuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _install()


def _install() -> None:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise StartError(f"{', '.join(missing)} not found, and no apt-get here: install Ceph's radosgw, mon and osd")
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if prefix and shutil.which("sudo") is None:
        raise StartError(f"not root and no sudo: ask for `apt-get install {' '.join(PACKAGES)}`")
    environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
    for command in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run([*prefix, *environment, "apt-get", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise StartError(f"apt-get {' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")


def start(folder: Path, options: Options) -> dict[str, str]:
    """Start the server below `folder` and return its environment; one that runs there already is taken as it is.

    Raises:
        StartError: it does not start, or the folder holds something that is not the server's, or what another kind of
            server keeps. Whatever ends the start, an interrupt too, leaves no daemon behind.
    """
    folder = folder.absolute()
    state = folder / "environment.json"
    if state.exists() and _is_kept(folder):
        if not options.keep:
            raise StartError(f"{folder} holds objects that are kept: start it with --keep, or `stop` removes them")
        return dict(json.loads(state.read_text())) | _start_again(folder, options)
    if state.exists() and set(DAEMONS) <= set(_running(folder).values()):
        return dict(json.loads(state.read_text()))
    stop(folder)
    install()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    try:
        environment = _start(folder, options)
        state.touch(mode=0o600)
        state.write_text(json.dumps(environment))
    except (StartError, OSError) as error:
        logs = "".join(f"\n--- {log.name}\n{_tail(log)}" for log in sorted(folder.glob("*.log")))
        stop(folder)
        raise StartError(f"{error}{logs}") from error
    except BaseException:
        stop(folder)
        raise
    return environment


def _start(folder: Path, options: Options) -> dict[str, str]:
    run = _sockets(folder)
    mon_port, port = _free_ports(2)
    host, endpoint = "127.0.0.1", f"http://127.0.0.1:{port}"
    if options.listen:
        host, port, endpoint = _listening(options.listen)
    fsid = str(uuid.uuid4())
    objects = (ON_DISK if options.keep else IN_MEMORY).format(capacity=options.capacity)
    config = CONFIG.format(fsid=fsid, folder=folder, run=run, mon_port=mon_port, host=host, port=port, objects=objects)
    (folder / "ceph.conf").write_text(config)
    _write_keyring(folder)
    for name in ("mon", "osd"):
        (folder / name).mkdir()
    monmap = str(folder / "monmap")
    _call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", monmap)
    _ceph(folder, "ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", str(folder / "keyring"))
    _ceph(folder, "ceph-mon", "-i", "a")
    _ceph(folder, "ceph", "osd", "new", str(uuid.uuid4()))
    _ceph(folder, "ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", _osd_uuid(folder))
    _ceph(folder, "ceph", "auth", "import", "-i", str(folder / "keyring"))
    _ceph(folder, "ceph-osd", "-i", "0")
    _ceph(folder, "radosgw", "-n", "client.rgw")
    _wait(lambda: _answers(endpoint), f"{endpoint} does not answer")
    return {"MODELPRESS_TEST_S3_ENDPOINT": endpoint} | _make_users(folder, options)


def _start_again(folder: Path, options: Options) -> dict[str, str]:
    """Start the daemons over what they left on disk; whatever goes wrong, it stays there."""
    end_daemons(folder)
    config = (folder / "ceph.conf").read_text()
    config = re.sub(r"(?m)^(run_dir = ).*$|^(admin_socket = ).*(?=/\$name)", rf"\g<1>\g<2>{_sockets(folder)}", config)
    host, port, endpoint = _listening(options.listen or re.findall(r"(?m)^rgw_frontends = .*endpoint=(.*)$", config)[0])
    config = re.sub(r"(?m)^(rgw_frontends = .*endpoint=).*$", rf"\g<1>{host}:{port}", config)
    (folder / "ceph.conf").write_text(config)
    try:
        _ceph(folder, "ceph-mon", "-i", "a")
        _ceph(folder, "ceph-osd", "-i", "0")
        _ceph(folder, "radosgw", "-n", "client.rgw")
        _wait(lambda: _answers(endpoint), f"{endpoint} does not answer")
    except BaseException:
        end_daemons(folder)
        raise
    return {"MODELPRESS_TEST_S3_ENDPOINT": endpoint}


def _is_kept(folder: Path) -> bool:
    return "osd_objectstore = bluestore" in (folder / "ceph.conf").read_text()


def _sockets(folder: Path) -> Path:
    """A new folder for sockets: they have short names (108 bytes), whatever the folder's length."""
    link = folder / "run"
    if link.is_symlink():
        _remove_sockets(link)
        link.unlink()
    run = Path(tempfile.mkdtemp(prefix=RUN_PREFIX))
    link.symlink_to(run)
    return run


def _listening(listen: str) -> tuple[str, int, str]:
    """Host, port and URL."""
    host, _, port = listen.rpartition(":")
    return host, int(port), f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def _make_users(folder: Path, options: Options) -> dict[str, str]:
    """A user that writes, and a key of the same user that may only read; the keys that were made for them."""
    given = {"writer": options.writer, "reader": options.reader}
    keys = {role: pair or (secrets.token_hex(10).upper(), secrets.token_hex(20)) for role, pair in given.items()}
    _ceph(folder, "radosgw-admin", "user", "create", "--uid", "modelpress", "--display-name", "modelpress")
    # By standard input: a key on a command line would be everybody's to see.
    user = json.loads(_ceph(folder, "radosgw-admin", "metadata", "get", "user:modelpress"))
    user["data"]["subusers"] = [{"id": "modelpress:reader", "permissions": "read"}]
    user["data"]["keys"] = [
        {"user": name, "access_key": keys[role][0], "secret_key": keys[role][1]}
        for role, name in (("writer", "modelpress"), ("reader", "modelpress:reader"))
    ]
    _ceph(folder, "radosgw-admin", "metadata", "put", "user:modelpress", given=json.dumps(user))
    made: dict[str, str] = {}
    for role, prefix in (("writer", "MODELPRESS_TEST_S3"), ("reader", "MODELPRESS_TEST_S3_READER")):
        if given[role] is None:  # a key that came from a file is known to who gave it, and in no log
            made |= {f"{prefix}_KEY": keys[role][0], f"{prefix}_SECRET": keys[role][1]}
    return made


def add_user(folder: Path, name: str) -> dict[str, str]:
    """A user of its own beside the bucket's owner, with no right but what a policy gives to `arn:aws:iam:::user/NAME`.

    Raises:
        StartError: the server does not run, or has this user.
    """
    folder = folder.absolute()
    if not _running(folder):
        raise StartError(f"no server runs below {folder}")
    (key,) = json.loads(_ceph(folder, "radosgw-admin", "user", "create", "--uid", name, "--display-name", name))["keys"]
    return {"AWS_ACCESS_KEY_ID": key["access_key"], "AWS_SECRET_ACCESS_KEY": key["secret_key"]}


def stop(folder: Path) -> None:
    """Stop the daemons that were started below `folder` and remove it; no folder, or an empty one, is left as it is.

    Raises:
        StartError: the folder holds something and no marker; nothing was touched.
    """
    folder = folder.absolute()
    if not (folder / MARKER).is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StartError(f"{folder} holds something and no {MARKER}: it is not the server's; choose a new folder")
        return
    end_daemons(folder)
    run = folder / "run"
    if run.is_symlink():
        _remove_sockets(run)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_sockets(link: Path) -> None:
    if (sockets := Path(os.readlink(link))).name.startswith(RUN_PREFIX):
        shutil.rmtree(sockets, ignore_errors=True)


def end_daemons(folder: Path) -> None:
    """Kill the daemons that were started below `folder`: what is in memory is to go, what is on disk is journaled."""
    end = time.monotonic() + 10
    while (pids := _running(folder)) and time.monotonic() < end:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _write_keyring(folder: Path) -> None:
    # Each entry: type 1 (AES), time, 16 random bytes, as `ceph-authtool --gen-key` writes it.
    def key() -> str:
        return base64.b64encode(struct.pack("<hiih", 1, int(time.time()), 0, 16) + secrets.token_bytes(16)).decode()

    everything = ('\tcaps mon = "allow *"', '\tcaps osd = "allow *"', '\tcaps mgr = "allow *"')
    names = ("mon.", "client.admin", "client.rgw", "osd.0")
    lines = [line for name in names for line in (f"[{name}]", f"\tkey = {key()}", *everything)]
    path = folder / "keyring"
    path.touch(mode=0o600)
    path.write_text("\n".join(lines) + "\n")


def _osd_uuid(folder: Path) -> str:
    dump = json.loads(_ceph(folder, "ceph", "osd", "dump", "--format", "json"))
    return str(dump["osds"][0]["uuid"])


def _ceph(folder: Path, program: str, *arguments: str, given: str = "") -> str:
    return _call(program, "--conf", str(folder / "ceph.conf"), *arguments, given=given)


def _call(*command: str, given: str = "") -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=DEADLINE_SECONDS, input=given
        )
    except subprocess.TimeoutExpired as error:
        raise StartError(f"{' '.join(command[:4])} … did not end within {DEADLINE_SECONDS:.0f} s") from error
    if done.returncode:
        raise StartError(f"{' '.join(command[:4])} … failed: {done.stderr[-2000:]}")
    return done.stdout


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [int(item.getsockname()[1]) for item in sockets]


def _answers(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(endpoint, timeout=1):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _wait(ready: Callable[[], bool], failure: str) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while not ready():
        if time.monotonic() > end:
            raise StartError(f"{failure} after {DEADLINE_SECONDS:.0f} s")
        time.sleep(0.05)


def _running(folder: Path) -> dict[int, str]:
    """Ceph's processes that were started with this folder's configuration: process id → program.

    By what runs and not by process id files: a daemon that was interrupted while it started has written none.
    """
    found: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            program, *arguments = (entry / "cmdline").read_bytes().split(b"\0")
            name = os.path.basename(program).decode(errors="replace")
            if name in PROGRAMS and str(folder / "ceph.conf").encode() in arguments:
                found[int(entry.name)] = name
    return found


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=["start", "stop", "run", "user"])
    parser.add_argument("name", nargs="?", help="of the new user")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where it keeps its files")
    parser.add_argument("--capacity-bytes", type=int, default=Options.capacity, help="memory for objects")
    parser.add_argument("--listen", default="", metavar="HOST:PORT", help="of the endpoint; else loopback, a free port")
    parser.add_argument("--writer", type=Path, help="credentials file with the key that writes; else one is made")
    parser.add_argument("--reader", type=Path, help="credentials file with the key that reads; else one is made")
    parser.add_argument("--keep", action="store_true", help="objects lie on disk, and outlive `run`")
    arguments = parser.parse_args()
    # As on Ctrl-C: a start that is ended from outside must take its daemons with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if arguments.command == "stop":
            stop(arguments.folder)
            return 0
        if arguments.command == "user":
            if not arguments.name:
                parser.error("user: give a name")
            environment = add_user(arguments.folder, arguments.name)
        else:
            if arguments.listen and not re.fullmatch(r"[A-Za-z0-9.-]+:\d{1,5}", arguments.listen):
                parser.error(f"--listen: {arguments.listen!r} is not HOST:PORT")
            options = Options(
                arguments.capacity_bytes,
                arguments.listen,
                *[read_pair(path) if path else None for path in (arguments.writer, arguments.reader)],
                arguments.keep,
            )
            environment = start(arguments.folder, options)
    except StartError as error:
        print(f"no S3 server: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    for name, value in environment.items():
        print(f"export {name}={value}")
    sys.stdout.flush()
    if arguments.command == "run":
        try:
            sys.stdin.read()
        except KeyboardInterrupt:
            pass
        finally:
            (end_daemons if arguments.keep else stop)(arguments.folder.absolute())
    elif arguments.command == "start":
        print(f"# python {sys.argv[0]} stop --folder {arguments.folder}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
