"""What tests and the benchmark of recovery share: a Prefect server that can be killed, a worker, and a deployed run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from modelpress.config import OptimizeConfig

ROOT = Path(__file__).parents[2]
POOL = "kills"
ENTRY_POINT = "tests/integration/killed.py:optimize"
DEADLINE_SECONDS = 240.0
"""Stops a hang; nothing here takes as long."""
RECIPE: dict[str, Any] = {
    "name": "killed",
    "workload": {
        "kind": "custom",
        "factory": "tests.integration.small_workloads:Learning",
        "calibration_samples": 100,
    },
    "distill": {"architecture": {"hidden": 32}, "train": {"epochs": 3, "batch_size": 20}},
    "prune": {"sparsity": 0.3, "recovery": {"epochs": 2, "batch_size": 20}},
    "quantize": {"method": "dynamic"},
    "compress": {"min_decode_bytes_per_second": 0},
    "evaluate": {"batch_sizes": [1], "latency_seconds": 0.02, "max_quality_drop": 1.0},
    "promote": False,
}
CONFIG = OptimizeConfig.model_validate(RECIPE)


def until(what: str, true: Callable[[], Any], seconds: float = DEADLINE_SECONDS) -> Any:
    """Wait for something, and hand it on; the deadline only stops a hang."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:.0f} s for {what}")


class Server:
    """A Prefect server on SQLite, on one port and one database, however often it is killed."""

    def __init__(self, home: Path, port: int, environment: Mapping[str, str]) -> None:
        self.home, self.url = home, f"http://127.0.0.1:{port}/api"
        self._command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        self._environment = {**os.environ, **environment, "PREFECT_HOME": str(home)}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        with (self.home / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, cwd=self.home, stdout=log, stderr=log, start_new_session=True
            )
        until("the Prefect server", self._healthy)

    def kill(self) -> None:
        """SIGKILL, children too."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.TransportError:
            return False


class Place:
    """A fresh MODELPRESS_HOME with a deployment of the flow that strikes, and the workers that run it."""

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ,
            "MODELPRESS_HOME": str(home),
            "MODELPRESS_TRAINING_SECONDS": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "1",
            **environment,
        }
        self.workers: list[subprocess.Popen[bytes]] = []
        self.deployment: UUID

    def deploy(self, client: SyncPrefectClient, restarts: int) -> UUID:
        """A deployment on a pool of this place alone; its id."""
        pool = f"{POOL}-{self.home.name}"
        template = json.loads((ROOT / "infra/pools/process.json").read_text())
        client.create_work_pool(WorkPoolCreate(name=pool, type="process", base_job_template=template))
        flow = client.create_flow_from_name("optimize")
        return client.create_deployment(
            flow,
            name=self.home.name,
            entrypoint=ENTRY_POINT,
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}],
            work_pool_name=pool,
            parameters={"config": RECIPE},
            tags=[f"restarts:{restarts}"],
        )

    def start_worker_for(self, client: SyncPrefectClient, restarts: int = 0) -> None:
        """Deploy, and start a worker."""
        self.deployment = self.deploy(client, restarts)
        self.start_worker()

    def start_worker(self) -> subprocess.Popen[bytes]:
        """A process worker, in a session of its own."""
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", f"{POOL}-{self.home.name}"]
        with (self.home / "worker.log").open("ab") as log:
            worker = subprocess.Popen(
                command, env=self.environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
        self.workers.append(worker)
        return worker

    def order(self, *kills: tuple[str, str, int]) -> None:
        """Where processes die, in this order: before or after the n-th write under a key."""
        orders = [{"when": when, "key": key, "count": count} for when, key, count in kills]
        (self.home / "kill.json").write_text(json.dumps(orders))

    def pause(self) -> None:
        """Let the next training stand still."""
        (self.home / "paused").unlink(missing_ok=True)
        (self.home / "pause").touch()

    def wait_paused(self) -> None:
        """Wait until one does."""
        until("a training that stands still", (self.home / "paused").exists)

    def go_on(self) -> None:
        """Let it go on."""
        (self.home / "pause").unlink(missing_ok=True)

    def flow_processes(self, run: UUID) -> list[int]:
        """Processes of a flow run: whose environment names it."""
        return _processes(f"PREFECT__FLOW_RUN_ID={run}")

    def writes(self, prefix: str) -> int:
        """How often something was written under keys that begin so."""
        log = self.home / "writes.log"
        return sum(line.split()[1].startswith(prefix) for line in log.read_text().splitlines()) if log.exists() else 0

    def published(self) -> list[str]:
        """Digests of the packs in the store."""
        return [path.stem for path in (self.home / "store" / "packs").glob("*/*.json")]

    def close(self) -> None:
        """Kill what is left."""
        self.go_on()
        for worker in self.workers:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        for process in _processes(f"MODELPRESS_HOME={self.home}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _processes(variable: str) -> list[int]:
    """Living processes with this in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if not dead and variable.encode() in environment:
                found.append(int(entry.name))
    return found


@contextmanager
def prefect_at(url: str) -> Iterator[SyncPrefectClient]:
    """A client of a server, whatever this process is set to."""
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        yield client


def wait_for(client: SyncPrefectClient, run: UUID, *names: str, seconds: float = DEADLINE_SECONDS) -> FlowRun:
    """Wait until a flow run is in one of these states."""

    def there() -> FlowRun | None:
        try:
            found = client.read_flow_run(run)
        except httpx.TransportError:
            return None  # a server that was killed
        return found if found.state_name in names else None

    try:
        found: FlowRun = until(f"{run} to be {' or '.join(names)}", there, seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}; it is {client.read_flow_run(run).state!r}") from error
    return found
