"""From `modelpress promote --canary` to the end, by real servers, flows, MLflow and requests over HTTP."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client

from flows.canary import canary, promote_canary
from modelpress.canary import log, tally
from modelpress.checkpoint import Checkpoint
from modelpress.config import CanaryConfig
from modelpress.errors import GateError
from modelpress.store.local import LocalStore
from registry import promotion
from serving.protocol import decode_response, encode_request
from tests.integration.deploying import at_home
from tests.registry.shelf import Shelf
from tests.serving.conftest import WIDTH, Server, scale_model

NAME = "tried"
WAIT_SECONDS = 180
CONFIG = CanaryConfig.model_validate(
    {
        "steps": [
            {"mode": "shadow", "share": 1.0, "min_requests": 20, "hold_seconds": 0},
            {"mode": "canary", "share": 0.5, "min_requests": 60, "hold_seconds": 0},
        ],
        # A busy machine answers slowly now and then, whoever is asked: here time decides nothing.
        "slow_seconds": 600,
        "compare": "values",
        "max_disagreement": 0.3,
        "error_floor": 0.2,
        "slow_floor": 0.3,
    }
)


def weights(number: int) -> Checkpoint:
    """The first and the second answer nearly the same; the third doubles it."""
    return scale_model({1: 2.0, 2: 2.01, 3: 4.0}[number])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, prefect_server: str, mlflow_server: str) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("canary")
    with at_home(home, prefect_server, mlflow_server):
        yield home


@pytest.fixture(scope="module")
def shelf(home: Path, mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    client = MlflowClient(mlflow_server, mlflow_server)
    store = LocalStore(Path(os.environ.get("MODELPRESS_STORE") or home / "store"))
    return Shelf(store, client, tmp_path_factory.mktemp("packs"), NAME, weights)


class Traffic:
    """Requests, one after the other, until it is told to stop; which pack each named, and what it answered."""

    def __init__(self, server: Server) -> None:
        self.answers: list[tuple[str, float]] = []
        self.failures: list[str] = []
        self._server, self._ended = server, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(30)

    def _run(self) -> None:
        body = encode_request({"x": np.ones((1, WIDTH), np.float32)})
        # A connection each: a server ends idle ones, and on a busy machine this thread may be idle for seconds.
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=self._server.url, timeout=60, limits=limits) as client:
            while not self._ended.is_set():
                answer = client.post(f"/v2/models/{NAME}/infer", content=body)
                if answer.status_code != 200:
                    self.failures.append(answer.text)
                    continue
                value = float(decode_response(answer.content)["y"].flat[0]) / WIDTH
                self.answers.append((answer.json()["model_version"], round(value, 3)))


def looked_until(ended: Callable[[log.Standing], bool], shelf: Shelf) -> list[str]:
    """Run the deployment's flow, as its schedule would, until the canary is where it should be; what each look did."""
    done: list[str] = []
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        done += [one.action for one in canary(NAME)]
        standing = log.current(shelf.store, NAME, "champion")
        assert standing is not None
        if ended(standing):
            return done
        time.sleep(0.5)
    raise AssertionError(f"it never came: {done}")


def over(standing: log.Standing) -> bool:
    return not standing.running


def test_a_candidate_takes_over_while_a_server_dies_and_the_next_one_goes_back(shelf: Shelf, home: Path) -> None:
    first = shelf.publish()
    assert promotion.promote(shelf.store, shelf.client, NAME, first, None).promote
    second = shelf.publish()
    server, dying = (Server(shelf.store, NAME) for _ in range(2))
    try:
        with Traffic(server) as traffic:
            assert promote_canary(NAME, second, CONFIG).promote
            eventually(lambda: servers(shelf) == 2)
            dying.process.kill()
            done = looked_until(over, shelf)
            assert set(done) == {"wait", "step", "promote"} or done == ["step", "promote"]
            assert shelf.served() == shelf.named() == second
            eventually(lambda: traffic.answers[-1][0] == second)
            third = shelf.publish()
            assert promote_canary(NAME, third, CONFIG).promote
            assert looked_until(over, shelf)[-1] == "rollback"
            assert shelf.served() == shelf.named() == second
        assert not traffic.failures
        assert set(traffic.answers) == {(first, 2.0), (second, 2.01)}, "the shadow of the third was never returned"
        assert shelf.tags(third)["canary.phase"] == "rolled back"
        assert "disagreement" in shelf.tags(third)["canary.why"]
    finally:
        dying.process.kill()
        server.stop()
    with pytest.raises(GateError, match="quality"):
        promote_canary(NAME, shelf_bad(shelf), CONFIG)
    with get_client(sync_client=True) as client:
        artifacts: list[Any] = client.read_artifacts()
    assert f"{NAME}-champion-canary" in {one.key for one in artifacts}


def servers(shelf: Shelf) -> int:
    """How many have written what they count."""
    standing = log.current(shelf.store, NAME, "champion")
    return tally.read(shelf.store, NAME, standing.state.id).servers if standing is not None else 0


def shelf_bad(shelf: Shelf) -> str:
    shelf.made = 0
    return shelf.publish(quality=0.1)


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
