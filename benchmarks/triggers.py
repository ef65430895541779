"""From a click in MLflow to the new model answering: `python -m benchmarks.triggers [--quick] [--json PATH]`.

MLflow's server, Prefect's, the receiver, a worker and the server of models run as their own processes on this machine,
with their defaults unless a row says otherwise. A click is the request that MLflow's UI sends; the end is the first
answer to an inference that the clicked pack gave. Clicks come at random moments of whatever polls. The parts lie
between timestamps of this one clock: `until the flow runs` (webhook, or waiting to be polled, and the start of whoever
runs it), `gate` (every byte read and judged, until the pointer is written), `serving` (its poll, load, warm-up, swap).
"""

from __future__ import annotations

import os
import random
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import onnx
from cryptography.fernet import Fernet
from mlflow import MlflowClient
from onnx import TensorProto, helper, numpy_helper
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_URL, temporary_settings

from benchmarks._report import Row, main
from modelpress import graph, pointer
from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import CompressConfig, ShardConfig
from modelpress.reports import SourceReport
from modelpress.shard import draft_manifest, write_shards
from modelpress.store import open_store
from registry import promotion, reconcile, runs
from serving.protocol import encode_request
from tests.integration.conftest import QUIET, free_port
from tests.packs import Pack
from tests.registry.shelf import Shelf

ROOT = Path(__file__).parents[1]
NAME, WIDTH = "clicked", 512
CLICKS = 10
START_SECONDS, CLICK_SECONDS = 300.0, 300.0
SMALL, LARGE = 1, 90
"""Layers of 1 MiB each; the large one is as large as a sentence encoder of 22.7 million parameters."""
NOTE = """Ways to run what a click asks for: `receiver` runs the flow in its own warm process (the default);
`worker` lets a worker start a process for it; `receiver polls` and `deployment polls` do without webhooks. Serving
polls its pointer every 2 seconds, so that a second of each figure, at the median, is waiting for that.
"""
POOL = ("work-pool", "create", "cpu", "--type", "process", "--base-job-template", "infra/pools/process.json")


@dataclass(frozen=True)
class Click:
    """Seconds of one click."""

    total: float
    start: float
    gate: float
    serving: float


class Stack:
    """The servers, and a model with a champion."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.home, self.mlflow, self.prefect = home, free_port(), free_port()
        self.secret, self.hooks, self.serving = secrets.token_urlsafe(32), free_port(), free_port()
        (home / "secret").write_text(self.secret)
        self.environment = {
            **os.environ,
            **QUIET,
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.prefect}/api",
            "MODELPRESS_HOME": str(home),
            "MODELPRESS_TRACKING_URI": f"http://127.0.0.1:{self.mlflow}",
            "MODELPRESS_CHECKOUT": str(ROOT),
            "MODELPRESS_HOOKS_SECRET_FILE": str(home / "secret"),
            "MODELPRESS_HOOKS_PORT": str(self.hooks),
            "MODELPRESS_SERVING_PORT": str(self.serving),
            "MODELPRESS_SERVING_MODELS": NAME,
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "https,http",
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
            "MLFLOW_WEBHOOK_CACHE_TTL": "1",
        }
        for name in ("MODELPRESS_STORE", "MODELPRESS_WORK"):
            self.environment.pop(name, None)
        stack.enter_context(
            self.running(["prefect", "server", "start", "--port", str(self.prefect)], self.prefect, "/api/health")
        )
        database = f"sqlite:///{home}/mlflow.db"
        command = ["mlflow", "server", "--port", str(self.mlflow), "--workers", "1", "--backend-store-uri", database]
        artifacts = ["--artifacts-destination", str(home / "artifacts")]
        stack.enter_context(self.running([*command, *artifacts], self.mlflow, "/health"))
        stack.enter_context(temporary_settings({PREFECT_API_URL: self.environment["PREFECT_API_URL"]}))
        self.client = MlflowClient(self.environment["MODELPRESS_TRACKING_URI"])
        self.store = open_store(str(home / "store"))

    @contextmanager
    def running(self, command: list[str], port: int | None, path: str, **more: str) -> Iterator[None]:
        """A Python module as a process, from its first healthy answer on."""
        with (self.home / f"{command[0]}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=ROOT, env={**self.environment, **more}, stdout=log, stderr=log
            )
        try:
            end = time.monotonic() + START_SECONDS
            while port is not None and not _healthy(f"http://127.0.0.1:{port}{path}"):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{command} did not become healthy, see {self.home}")
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait(60)

    def prefect_cli(self, *arguments: str) -> None:
        """One of Prefect's commands."""
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        subprocess.run(command, cwd=ROOT, env=self.environment, check=True, capture_output=True)

    def receiver(self, **more: str) -> AbstractContextManager[None]:
        """The receiver, as `python -m flows.hooks`."""
        return self.running(["flows.hooks"], self.hooks, "/health", **more)

    def register(self) -> None:
        """Tell MLflow of the receiver."""
        from flows.hooks.register import register

        register(self.client, f"http://127.0.0.1:{self.hooks}/mlflow", self.secret.encode())
        time.sleep(1.5)  # until MLflow reads its list of webhooks again

    def unregister(self) -> None:
        """Let no event come."""
        for hook in self.client.list_webhooks():
            self.client.delete_webhook(hook.webhook_id)
        time.sleep(1.5)

    def answering(self) -> str:
        """Digest of the pack that answers an inference now."""
        body = encode_request({"x": np.zeros((1, WIDTH), np.float32)})
        answer = httpx.post(f"http://127.0.0.1:{self.serving}/v2/models/{NAME}/infer", content=body, timeout=30)
        return str(answer.json().get("model_version"))


def measure(quick: bool) -> Iterator[Row]:
    """Rows of each way; quick: the receiver's alone, with fewer clicks."""
    os.chdir(ROOT)
    clicks = 3 if quick else CLICKS
    for layers in (SMALL,) if quick else (SMALL, LARGE):
        with tempfile.TemporaryDirectory(prefix="modelpress-") as folder, ExitStack() as servers:
            stack = Stack(Path(folder), servers)
            shards, made = Path(folder, "shards"), partial(layered, layers)
            shelf = Shelf(stack.store, stack.client, shards, NAME, made, press)
            # Two packs take turns: each is as good as the other, so that each click passes.
            packs = [shelf.publish(), shelf.publish()]
            promotion.promote(stack.store, stack.client, NAME, packs[0], None)
            servers.enter_context(stack.running(["serving"], stack.serving, "/v2/health/ready"))
            size = f"{layers} MiB of weights"
            if layers == SMALL and not quick:
                yield from _looks(stack)
            with stack.receiver(MODELPRESS_HOOKS_POLL_SECONDS="0"):
                stack.register()
                yield from _rows(f"webhook, receiver, {size}", _clicks(stack, shelf, packs, clicks, 2.0))
            if quick or layers != SMALL:
                continue
            stack.prefect_cli(*POOL)
            stack.prefect_cli("deploy", "--name", "reconcile", "--prefect-file", "infra/prefect.yaml")
            for seconds in ("10", "1"):
                worker = stack.running(
                    ["prefect", "worker", "start", "--pool", "cpu"], None, "", PREFECT_WORKER_QUERY_SECONDS=seconds
                )
                with stack.receiver(MODELPRESS_HOOKS_RUN="worker"), worker:
                    time.sleep(15)  # a worker says nowhere that it is ready
                    case = f"webhook, worker that asks every {seconds} s, {size}"
                    yield from _rows(case, _clicks(stack, shelf, packs, clicks, 10.0))
            stack.unregister()
            with stack.receiver(MODELPRESS_HOOKS_POLL_SECONDS="5"):
                yield from _rows(f"receiver polls every 5 s, {size}", _clicks(stack, shelf, packs, clicks, 5.0))
            stack.prefect_cli("deploy", "--name", "reconcile-poll", "--prefect-file", "infra/prefect.yaml")
            with stack.running(["prefect", "worker", "start", "--pool", "cpu"], None, ""):
                case = f"deployment polls each minute, {size}"
                yield from _rows(case, _clicks(stack, shelf, packs, clicks, 60.0))


def _clicks(stack: Stack, shelf: Shelf, packs: list[str], count: int, period: float) -> Iterator[Click]:
    """Clicks one after the other, each after the one before is served; the first is not counted."""
    chance = random.Random(0)
    for turn in range(count + 1):
        time.sleep(chance.uniform(0, period))
        clicked = next(pack for pack in packs if pack != shelf.served())
        clicked_at = time.time()
        shelf.click(clicked)
        while stack.answering() != clicked:
            if time.time() - clicked_at > CLICK_SECONDS:
                raise RuntimeError(f"a click was not served in {CLICK_SECONDS:.0f} s, see {stack.home}")
            time.sleep(0.02)
        done = time.time()
        entry = pointer.current(stack.store, NAME, "champion")
        assert entry is not None
        written = entry.created.timestamp()
        with get_client(sync_client=True) as client:
            started = _started(client, written)
        if turn:
            yield Click(done - clicked_at, started - clicked_at, written - started, done - written)


def _started(client: SyncPrefectClient, before: float) -> float:
    """When the flow run that wrote the pointer started: the last that did before."""
    begun = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.COMPLETED]))
    found = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=begun), sort=FlowRunSort.START_TIME_DESC, limit=20
    )
    return max(run.start_time.timestamp() for run in found if run.start_time and run.start_time.timestamp() < before)


def _rows(case: str, clicks: Iterator[Click]) -> Iterator[Row]:
    found = list(clicks)
    totals = [one.total for one in found]
    yield Row(case, "modelpress", "clicks", "", len(found))
    yield Row(case, "modelpress", "median", "s", statistics.median(totals))
    yield Row(case, "modelpress", "max", "s", max(totals))
    for part, metric in (("start", "until the flow runs"), ("gate", "gate"), ("serving", "serving")):
        yield Row(case, "modelpress", metric, "s", statistics.median(getattr(one, part) for one in found))


def _looks(stack: Stack) -> Iterator[Row]:
    """What a look costs that finds nothing: in a process that is there, and in a fresh one."""
    case = "a look at one model that finds nothing"
    runs.check_server(stack.environment["MODELPRESS_TRACKING_URI"])
    times = []
    for _ in range(CLICKS):
        before = time.perf_counter()
        if reconcile.look(stack.store, stack.client):
            raise RuntimeError("something differs")
        times.append(time.perf_counter() - before)
    yield Row(case, "in the receiver", "median", "s", statistics.median(times))
    before_cpu, spent = _children(), time.perf_counter()
    command = [sys.executable, "-c", "from flows.reconcile import reconcile; reconcile()"]
    subprocess.run(command, cwd=ROOT, env=stack.environment, check=True, capture_output=True)
    yield Row(case, "a flow run in a fresh process", "median", "s", time.perf_counter() - spent)
    yield Row(case, "a flow run in a fresh process", "processor", "s", _children() - before_cpu)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def press(folder: Path, checkpoint: Checkpoint, *, name: str) -> Pack:
    """As a run of the line does it, with its defaults."""
    coded, report = compress(checkpoint, CompressConfig())
    shards, _ = write_shards(coded, ShardConfig(), folder)
    source = SourceReport(parameters=report.raw_bytes // 4, size_bytes=report.raw_bytes, trained=False)
    manifest, blobs = draft_manifest(name, coded, shards, reports={"source": source})
    return Pack(manifest, shards, blobs, checkpoint)


def layered(layers: int, seed: int) -> Checkpoint:
    """Products of 512 × 512 floats, 1 MiB each."""
    chance, names = np.random.default_rng(seed), ["x", *[f"h{i}" for i in range(layers - 1)], "y"]
    weights = [
        numpy_helper.from_array((chance.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32), f"w{i}")
        for i in range(layers)
    ]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(layers)]
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["n", WIDTH]) for end in ("x", "y")]
    body = helper.make_graph(nodes, "layered", ends[:1], ends[1:], weights)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return graph.split(model)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    main("triggers", measure, note=NOTE)
