"""Two hosts: Prefect, MLflow and S3 on one, the worker and the serving process on the other, joined by one cable.

The hosts are network namespaces of this machine, the cable is a veth pair (Linux, root, `ip`). The second host is given
an address, the logins, and a file with the publisher's key and one with the reader's. The servers' folder is hidden
from it (an empty file system lies over it), and so is every process of the first. They share the clone, no more.

`configs/digits-quick.yaml` is queued on the first host, as the UI would, and the second runs it as the deployment
`optimize`. Then the pack is asked for a prediction over the cable.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks._report import Row, main
from modelpress.config import parse_config
from modelpress.stack import control, processes
from modelpress.stack.credentials import client_environment, make_credentials, s3_environment
from modelpress.stack.layout import Chosen, Folder
from modelpress.stack.parts import QUIET, base_environment
from modelpress.workload import load_workload

CHECKOUT = Path(__file__).parents[1]
RECIPE = CHECKOUT / "configs" / "digits-quick.yaml"
SERVERS, WORKERS = "10.213.7.1", "10.213.7.2"
SERVING_PORT = 8080
DEADLINE_SECONDS = 1500.0
CLONE_NEWNET = 0x40000000
NOTE = (
    "Two network namespaces of one machine, joined by a veth pair: bytes are all that crossed it, Ethernet, IP and TCP "
    "headers too. `torch` counts processes that had loaded libtorch while "
    "the run went on. The second host sees neither the first one's folder nor its processes; both see the clone.\n"
)


@dataclass
class Seen:
    """What was there while the run went on."""

    torch: dict[str, int] = field(default_factory=lambda: {"servers": 0, "workers": 0})
    """Most processes at a time that had loaded libtorch, by host."""
    doors: set[int] = field(default_factory=set)
    """Ports of the first host that the second was connected to."""


def lacking() -> str:
    """What this machine lacks for it; empty: nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if missing := [
        name for name in ("ip", "ss", "unshare", "radosgw", "ceph-mon", "ceph-osd") if not shutil.which(name)
    ]:
        return f"no {', '.join(missing)}"
    name = f"mp{os.getpid()}x"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


def measure(quick: bool) -> Iterable[Row]:  # noqa: ARG001  there is one size
    """Rows of one run and one answer."""
    if reason := lacking():
        raise SystemExit(reason)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was made is removed then, too
    with contextlib.ExitStack() as stack:
        servers, workers = stack.enter_context(hosts())
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modelpress-two-hosts-")))
        stack.enter_context(_inside(servers))  # this process, and what it starts, is on the first host
        folder = Folder(home / "servers")
        chosen = stack.enter_context(_stack(folder))
        second = Second(workers, home, folder, chosen)
        stack.callback(second.stop)
        yield from _run(servers, workers, folder, chosen, second)


def _run(servers: str, workers: str, folder: Folder, chosen: Chosen, second: Second) -> Iterator[Row]:
    keys = make_credentials(folder)
    user, _, password = keys.prefect.partition(":")
    url = f"http://{SERVERS}:{chosen.ports['prefect']}/api"
    with httpx.Client(base_url=url, auth=(user, password), timeout=60, trust_env=False) as api:
        second.start("worker", "prefect", "worker", "start", "--pool", "cpu", "--type", "process", "--limit", "1")
        before = _crossed(servers)
        config = yaml.safe_load(RECIPE.read_text())
        deployment = api.get("/deployments/name/optimize/optimize").raise_for_status().json()["id"]
        asked = {"parameters": {"config": config}, "state": {"type": "SCHEDULED"}}
        run = api.post(f"/deployments/{deployment}/create_flow_run", json=asked).raise_for_status().json()["id"]
        seen = Seen()

        def ended() -> bool:
            _look(seen, servers, workers)
            state = api.get(f"/flow_runs/{run}").raise_for_status().json()["state"]
            if state["type"] in ("FAILED", "CRASHED", "CANCELLED"):
                raise RuntimeError(f"{state['name']}: {state['message']}\n{second.log('worker')}")
            return bool(state["type"] == "COMPLETED")

        _until(ended, "the run", second)
        after = _crossed(servers)
    for host, count in seen.torch.items():
        yield Row("the run", host, "torch", "processes", count)
        yield Row("the run", host, "sent", "B", after[host] - before[host])
    named = {name: port for name, port in chosen.ports.items() if port in seen.doors}
    yield Row("the run", "workers", "doors used", "of prefect, mlflow, s3", len(named))
    before = after
    yield from _answer(keys.serving, second, config)
    after = _crossed(servers)
    for host in ("servers", "workers"):
        yield Row("start of the server, and an answer", host, "sent", "B", after[host] - before[host])


def _answer(token: str, second: Second, config: dict[str, Any]) -> Iterator[Row]:
    second.serve()
    url = f"http://{WORKERS}:{SERVING_PORT}/v2"
    name = config["name"]
    with httpx.Client(headers={"Authorization": f"Bearer {token}"}, timeout=30, trust_env=False) as client:

        def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return client.get(f"{url}/models/{name}/ready").status_code == 200
            return False

        _until(ready, "the server", second)
        inputs = load_workload(parse_config(config).workload).example(1)
        tensors = [
            {"name": key, "shape": list(x.shape), "datatype": "FP32", "data": x.flatten().tolist()}
            for key, x in inputs.items()
        ]
        found = client.post(f"{url}/models/{name}/infer", json={"inputs": tensors}).raise_for_status().json()
        refused = httpx.get(f"{url}/models/{name}", trust_env=False).status_code
    yield Row("start of the server, and an answer", "workers", "numbers", "", len(found["outputs"][0]["data"]))
    yield Row("start of the server, and an answer", "workers", "without the token", "status", refused)


class Second:
    """The second host: programs that see one file of settings, the clone and the cable."""

    def __init__(self, namespace: str, home: Path, servers: Folder, chosen: Chosen) -> None:
        self._namespace, self._hidden, self._chosen = namespace, servers.path, chosen
        self._home = home / "workers"
        self._home.mkdir(mode=0o700)
        self._keys = make_credentials(servers)
        for source in (self._keys.s3_writer, self._keys.s3_reader, servers.keys / "serving"):
            shutil.copy(source, self._home / source.name)
        self._running: list[subprocess.Popen[bytes]] = []
        base = base_environment(os.environ, own_s3=True) | QUIET
        base.pop(processes.MARK, None)
        self._environment = base | client_environment(servers, chosen, self._keys) | self._own("s3-writer")

    def _own(self, key: str) -> dict[str, str]:
        return s3_environment(self._chosen, self._home / key) | {
            "MODELPRESS_HOME": str(self._home / "home"),
            "PREFECT_HOME": str(self._home / "prefect"),
        }

    def start(self, name: str, *module: str, **more: str) -> None:
        """Start `python -m module` there."""
        hide = 'mount -t tmpfs -o ro none "$0" && exec "$@"'
        command = ["ip", "netns", "exec", self._namespace]
        command += ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", hide]
        command += [str(self._hidden), sys.executable, "-m", *module]
        with (self._home / f"{name}.log").open("wb") as log:
            environment = {**self._environment, **more}
            self._running.append(
                subprocess.Popen(
                    command, cwd=self._home, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                )
            )

    def serve(self) -> None:
        """Start the serving process: with the reader's key, and no login of Prefect's or MLflow's."""
        self._environment = {
            name: value for name, value in self._environment.items() if not name.startswith(("PREFECT_", "MLFLOW_"))
        } | self._own("s3-reader")
        more = {"HOST": WORKERS, "PORT": str(SERVING_PORT), "TOKEN_FILE": str(self._home / "serving")}
        self.start("serving", "serving", **{f"MODELPRESS_SERVING_{name}": value for name, value in more.items()})

    def check(self) -> None:
        """Raise where a program ended."""
        for process in self._running:
            if process.poll() is not None:
                raise RuntimeError(f"{process.args!r} ended with {process.returncode}:\n{self.log('*')}")

    def log(self, name: str) -> str:
        """The last lines of a program's log."""
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self._home.glob(f"{name}.log")))

    def stop(self) -> None:
        """End what runs there; who is first in a process namespace takes all of it along."""
        for process in self._running:
            process.kill()
            process.wait()


@contextlib.contextmanager
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces, joined, with addresses; removed at the end."""
    servers, workers = (f"mp{os.getpid()}{letter}" for letter in "sw")
    with contextlib.ExitStack() as made:
        for name in (servers, workers):
            _ip("netns", "add", name)
            made.callback(_ip, "netns", "del", name)
        _ip("link", "add", "cable", "netns", servers, "type", "veth", "peer", "name", "cable", "netns", workers)
        for name, address in ((servers, SERVERS), (workers, WORKERS)):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", name, "link", "set", device, "up")
        yield servers, workers


@contextlib.contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """Move this thread, and what it starts, to a namespace and back."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(there, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"entering {namespace}")
        yield
    finally:
        libc.setns(here, CLONE_NEWNET)
        os.close(here)
        os.close(there)


@contextlib.contextmanager
def _stack(folder: Folder) -> Iterator[Chosen]:
    """The servers, by `modelpress up`, on the cable's address."""
    wanted = control.Wanted(listen=SERVERS, checkout=CHECKOUT, without=("worker", "serving"), store="local")
    try:
        control.up(folder, wanted, lambda line: print(line, file=sys.stderr))
        chosen = folder.read_chosen()
        assert chosen is not None
        yield chosen
    finally:
        control.down(folder, lambda line: print(line, file=sys.stderr))


def _look(seen: Seen, servers: str, workers: str) -> None:
    for host, namespace in (("servers", servers), ("workers", workers)):
        pids = [int(pid) for pid in _ip("netns", "pids", namespace).split() if int(pid) != os.getpid()]
        seen.torch[host] = max(seen.torch[host], sum(map(_has_torch, pids)))
    lines = subprocess.run(["ss", "-Htn"], capture_output=True, text=True, check=True).stdout.splitlines()
    for _state, _received, _sent, local, peer in (line.split()[:5] for line in lines):
        if peer.rpartition(":")[0] == WORKERS:
            seen.doors.add(int(local.rpartition(":")[2]))


def _has_torch(pid: int) -> bool:
    try:
        return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def _crossed(servers: str) -> dict[str, int]:
    """Bytes that each host has sent over the cable."""
    (link,) = json.loads(_ip("-n", servers, "-s", "-j", "link", "show", "dev", "cable"))
    counted = link["stats64"]
    return {"servers": counted["tx"]["bytes"], "workers": counted["rx"]["bytes"]}


def _until(done: Callable[[], bool], what: str, second: Second) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while not done():
        second.check()
        if time.monotonic() > end:
            raise RuntimeError(f"{what} did not end in {DEADLINE_SECONDS:g} s:\n{second.log('*')}")
        time.sleep(0.5)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main("two_hosts", measure, note=NOTE)
