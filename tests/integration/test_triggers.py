"""From a click in MLflow to the served model: real MLflow, Prefect, receiver, worker and server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import approval
from flows.hooks.app import Hint
from flows.hooks.lookers import ByWorker
from flows.hooks.register import register
from flows.hooks.signed import DELIVERY, SIGNATURE, TIMESTAMP, sign
from flows.promote import promote
from modelpress import pointer
from modelpress.config import GateConfig
from modelpress.errors import GateError, SetupError
from modelpress.store.local import LocalStore
from registry import promotion, versions
from tests.conftest import ROOT
from tests.databases import Databases
from tests.integration.conftest import free_port
from tests.integration.deploying import deploy, make_pools, worker
from tests.packs import onnx_checkpoint
from tests.registry.shelf import Shelf

NAME = "clicked"
SECRET = "a secret that only these two know"
WAIT_SECONDS = 180
"""For what takes a second or two on a machine that is not busy."""


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, prefect_server: str, mlflow_server: str, databases: Databases
) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("triggers")
    databases.seed("prefect", home / "prefect" / "prefect.db")  # for the server that a flow without one starts
    (home / "secret").write_text(SECRET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELPRESS_HOME", str(home))
        patch.setenv("MODELPRESS_TRACKING_URI", mlflow_server)
        patch.setenv("MODELPRESS_HOOKS_SECRET_FILE", str(home / "secret"))
        patch.setenv("PREFECT_API_URL", prefect_server)
        patch.setenv("PREFECT_HOME", str(home / "prefect"))
        patch.setenv("PYTHONPATH", str(ROOT))
        for name in ("MODELPRESS_STORE", "MODELPRESS_WORK", "MODELPRESS_CHECKOUT"):
            patch.delenv(name, raising=False)
        yield home


@pytest.fixture(scope="module")
def shelf(home: Path, mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """A model with a champion."""
    client = MlflowClient(mlflow_server, mlflow_server)
    shelf = Shelf(LocalStore(home / "store"), client, tmp_path_factory.mktemp("packs"), NAME, onnx_checkpoint)
    assert promotion.promote(shelf.store, client, NAME, shelf.publish(), None).promote
    return shelf


@contextmanager
def process(module: str, log: Path, health: str, **environment: str) -> Iterator[None]:
    """A module of ours that serves, until it is told to stop."""
    with log.open("ab") as output:
        running = subprocess.Popen(
            [sys.executable, "-m", module], cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=output
        )
    try:
        eventually(lambda: healthy(health), lambda: f"{running.poll()}: {log.read_text()[-3000:]}")
        yield
    finally:
        running.terminate()
        running.wait(30)


def healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def eventually(condition: Callable[[], bool], said: Callable[[], object] = str) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, said()
        time.sleep(0.1)


@contextmanager
def receiving(home: Path, port: int) -> Iterator[Path]:
    log = home / "hooks.log"
    settings = {"MODELPRESS_HOOKS_PORT": str(port), "MODELPRESS_HOOKS_POLL_SECONDS": "0"}
    with process("flows.hooks", log, f"http://127.0.0.1:{port}/health", **settings):
        yield log


@pytest.fixture(scope="module")
def receiver(home: Path, shelf: Shelf) -> Iterator[str]:
    """Address of a receiver that runs the flow itself, and that MLflow knows."""
    port = free_port()
    with receiving(home, port):
        url = f"http://127.0.0.1:{port}/mlflow"
        assert register(shelf.client, url, SECRET.encode()).made
        yield url


@pytest.fixture(scope="module")
def served(home: Path, shelf: Shelf) -> Iterator[Callable[[], str]]:
    """Digest of the pack that a server answers from, which knows the store alone."""
    port = free_port()
    settings = {"MODELPRESS_SERVING_PORT": str(port), "MODELPRESS_SERVING_POLL_SECONDS": "0.2"}
    settings |= {"MODELPRESS_SERVING_MODELS": NAME, "MODELPRESS_TRACKING_URI": "", "PREFECT_API_URL": ""}
    with process("serving", home / "serving.log", f"http://127.0.0.1:{port}/v2/health/ready", **settings):
        yield lambda: str(httpx.get(f"http://127.0.0.1:{port}/v2/models/{NAME}").json()["versions"][0])


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


def runs(client: SyncPrefectClient, flow: str) -> list[FlowRun]:
    return client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])))


def here(client: SyncPrefectClient) -> list[FlowRun]:
    """Those that the receiver runs itself, and no worker."""
    return [run for run in runs(client, "reconcile") if run.deployment_id is None]


def test_a_click_is_served(shelf: Shelf, receiver: str, served: Callable[[], str], home: Path) -> None:
    pack = shelf.publish()
    shelf.click(pack)
    eventually(lambda: served() == pack, (home / "hooks.log").read_text)
    entry = pointer.current(shelf.store, NAME, "champion")
    assert entry is not None
    assert (entry.pack, entry.reason) == (pack, "promote by alias")
    assert entry.decision is not None
    assert entry.decision["promote"]


def test_what_the_gate_refuses_is_undone_though_the_ui_took_it(
    shelf: Shelf, receiver: str, served: Callable[[], str], mlflow_server: str, home: Path
) -> None:
    before, worse = served(), shelf.publish(quality=0.1)
    number = versions.carrying(shelf.client, NAME, worse).number
    asked = {"name": NAME, "alias": "champion", "version": number}
    answer = httpx.post(f"{mlflow_server}/ajax-api/2.0/mlflow/registered-models/alias", json=asked)  # as MLflow's UI
    assert answer.status_code == 200
    eventually(lambda: "undone.why" in shelf.tags(worse), (home / "hooks.log").read_text)
    eventually(lambda: shelf.named() == before)
    assert "the gate said fail" in shelf.description(worse)
    assert shelf.served() == served() == before


def test_a_deleted_alias_comes_back_by_an_event(shelf: Shelf, receiver: str, home: Path) -> None:
    before = shelf.named()
    shelf.client.delete_registered_model_alias(NAME, "champion")
    eventually(lambda: shelf.named() == before, (home / "hooks.log").read_text)


def test_what_mlflow_did_not_sign_starts_nothing(shelf: Shelf, receiver: str, client: SyncPrefectClient) -> None:
    before = len(here(client))
    body = b'{"entity":"model_version_alias","action":"created","data":{"name":"clicked"}}'
    now = str(int(time.time()))
    forged = {
        DELIVERY: "forged",
        TIMESTAMP: now,
        SIGNATURE: sign(b"another secret, as long as the other", "forged", now, body),
    }
    assert httpx.post(receiver, content=body, headers=forged).status_code == 401
    assert httpx.post(receiver, content=body).status_code == 401
    right = {**forged, SIGNATURE: sign(SECRET.encode(), "forged", now, body)}
    assert [httpx.post(receiver, content=body, headers=right).status_code for _ in range(2)] == [202, 409]
    assert httpx.post(receiver, content=b"x" * 100_000, headers=right).status_code == 413
    assert len(here(client)) == before, "what is signed is looked at, and nothing differs"


def test_a_second_registration_makes_no_second_webhook(shelf: Shelf, receiver: str) -> None:
    assert not register(shelf.client, receiver, SECRET.encode()).made
    assert [hook.url for hook in shelf.client.list_webhooks() if hook.name == "modelpress"] == [receiver]


def test_a_secret_that_differs_is_found_when_it_is_registered(shelf: Shelf, receiver: str) -> None:
    with pytest.raises(SetupError, match="not signed by MLflow"):
        register(shelf.client, receiver, b"a secret that the receiver has not")
    with pytest.raises(SetupError, match="MLFLOW_WEBHOOK_ALLOWED_SCHEMES"):
        register(shelf.client, "ftp://127.0.0.1/mlflow", SECRET.encode())
    assert not register(shelf.client, receiver, SECRET.encode()).made, "and mended"


def test_clicks_that_nobody_heard_are_made_up_for_at_the_start(
    home: Path, shelf: Shelf, receiver: str, served: Callable[[], str]
) -> None:
    for hook in shelf.client.list_webhooks():
        shelf.client.update_webhook(hook.webhook_id, status="DISABLED")
    time.sleep(1.2)  # MLflow keeps the list of webhooks for a second
    pack = shelf.publish()
    shelf.click(pack)
    with receiving(home, free_port()):
        eventually(lambda: served() == pack)


@pytest.fixture(scope="module")
def deployed(home: Path, receiver: str) -> None:
    """The deployments that a worker runs here."""
    make_pools("cpu")
    deploy("reconcile", "promote")


@contextmanager
def working(home: Path) -> Iterator[Callable[[FlowRun, str], None]]:
    """A worker; what it yields waits until a run is in a state."""
    settings = {"MODELPRESS_CHECKOUT": str(ROOT), "PREFECT_WORKER_QUERY_SECONDS": "0.5"}
    with get_client(sync_client=True) as client, worker("cpu", home, **settings) as log:

        def until(run: FlowRun, name: str) -> None:
            def reached() -> bool:
                state = client.read_flow_run(run.id).state
                assert state is not None
                assert state.name == name or not state.is_final(), f"{state!r}\n{log.read_text()[-3000:]}"
                return state.name == name

            eventually(reached, log.read_text)

        yield until


def test_without_webhooks_the_deployment_finds_it(
    deployed: None, shelf: Shelf, home: Path, client: SyncPrefectClient
) -> None:
    """A worker, as for `reconcile-poll`; the run is made as the receiver makes it for a worker. The gate asks for
    approval: the answer comes by the request that Prefect's form sends."""
    looker = ByWorker("reconcile/reconcile")
    looker.check()
    with pytest.raises(SetupError, match="infra/prefect"):
        ByWorker("reconcile/another").check()
    pack, before = shelf.publish(approval=True), shelf.served()
    shelf.click(pack)
    for _ in range(2):
        looker.look(Hint(NAME, "the same delivery"))
    (look,) = [run for run in runs(client, "reconcile") if "webhook" in run.tags]
    with working(home) as until:
        until(look, "Completed")
        assert shelf.named() == shelf.served() == before
        (ask,) = [run for run in runs(client, "promote") if run.parameters.get("candidate") == pack]
        assert f"the run {ask.name} asks for it in Prefect" in shelf.description(pack)
        until(ask, "Suspended")
        form = client.request("GET", "/flow_runs/{id}/input/{key}", path_params=described(client, ask))
        assert f"Shall pack `{pack}` of **{NAME}** be served?" in form.text
        assert resume(client, ask, {}) == "REJECT", "who answers has a name"
        assert resume(client, ask, {"approve": True, "name": "Anna", "reason": "seen on the staging site"}) == "ACCEPT"
        until(ask, "Completed")
    entry = pointer.current(shelf.store, NAME, "champion")
    assert entry is not None
    assert entry.pack == pack == shelf.named()
    assert entry.decision is not None
    assert "yes by Anna at" in entry.decision["reasons"][-1]
    assert "seen on the staging site" in entry.decision["reasons"][-1]


def resume(client: SyncPrefectClient, run: FlowRun, answer: dict[str, Any]) -> str:
    """What the form in Prefect's UI sends."""
    path = {"id": run.id}
    answered = client.request("POST", "/flow_runs/{id}/resume", path_params=path, json={"run_input": answer})
    return str(answered.json()["status"])


def described(client: SyncPrefectClient, run: FlowRun) -> dict[str, Any]:
    """Where the form of a run that waits has its description."""
    waiting = client.read_flow_run(run.id).state
    assert waiting is not None
    keyset = waiting.state_details.run_input_keyset
    assert keyset is not None
    return {"id": run.id, "key": keyset["description"]}


def test_a_no_and_no_answer_promote_nothing(
    shelf: Shelf, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a deployment the process waits."""
    monkeypatch.setattr(approval, "POLL_SECONDS", 0.2)
    pack, before = shelf.publish(), shelf.served()
    gate = GateConfig(approval=True, approval_hours=1, min_compression_ratio=0, margin=0.3)
    asking = threading.Thread(target=answer_no, args=(client,))
    asking.start()
    with pytest.raises(GateError, match=r"approval: fail, no by Bert at .*: not on a Friday"):
        promote(NAME, pack, gate)
    asking.join()
    with pytest.raises(GateError, match=r"approval: fail, no by nobody at .*: no answer in 0.0003 hours"):
        promote(NAME, pack, gate.model_copy(update={"approval_hours": 0.0003}))
    assert shelf.named() == shelf.served() == before
    assert shelf.tags(pack)["gate.verdict"] == "fail"
    judged = promotion.judge(shelf.store, shelf.client, NAME, pack, gate).decision
    with temporary_settings({PREFECT_API_URL: None}):  # a server of this process, with nobody to look at it
        assert approval.approved(NAME, pack, gate, judged) == judged


def answer_no(client: SyncPrefectClient) -> None:
    def answered() -> bool:
        for run in runs(client, "promote"):
            if run.state is not None and run.state.name == "Paused":
                no = {"approve": False, "name": "Bert", "reason": "not on a Friday"}
                if resume(client, run, no) == "ACCEPT":  # not before the form is there, a moment after the pause
                    return True
        return False

    eventually(answered)
