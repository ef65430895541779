"""A canary between two packs on a server without a socket, for the tests of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import numpy as np
import pytest

from modelpress.canary import log, tally
from modelpress.canary.log import Standing
from modelpress.canary.tally import Tallies
from modelpress.checkpoint import Checkpoint
from modelpress.store import Store
from serving import canary as serving_canary
from serving.canary import Canaries
from serving.protocol import decode_response, encode_request
from serving.repository import Repository
from tests.canary.states import config, state
from tests.serving.conftest import CLASSES, WIDTH, client_of, scale_model

Call = Callable[..., Any]
INFER = "/v2/models/scale/infer"
HALF = {"mode": "canary", "share": 0.5}
SHADOW = {"mode": "shadow", "share": 1.0}


class Place:
    """A server without a socket, a store, and a canary between two packs."""

    def __init__(self, store: Store, repository: Repository, first: str, second: str) -> None:
        self.store, self.repository, self.first, self.second = store, repository, first, second
        self.canaries = Canaries(store, repository, poll_seconds=0.0)
        self.canaries._mirror.start()
        self.standing: Standing | None = None

    def begin(self, *steps: dict[str, Any], **more: Any) -> None:
        made = state(0, config(*steps, **more), candidate=self.second, champion=self.first)
        self.standing = log.write(self.store, "scale", made, 0, self.first)
        self.canaries.poll()

    def step(self) -> None:
        assert self.standing is not None
        later = self.standing.state.model_copy(update={"step": self.standing.state.step + 1})
        self.standing = log.write(self.store, "scale", later, self.standing.entry.number, self.first)
        self.canaries.poll()

    def end(self, phase: Any, who_stands: str) -> None:
        assert self.standing is not None
        log.end(self.store, "scale", self.standing, phase, ["by the test"], who_stands)
        self.canaries.poll()

    def seen(self) -> Tallies:
        """What was written of it, with all that is counted by now."""
        for trial in self.canaries._trials.values():
            self.canaries._report(trial, at_once=True)
        return tally.read(self.store, "scale", "1" * 32)

    def client(self) -> AbstractAsyncContextManager[httpx.AsyncClient]:
        return client_of(self.repository, canaries=self.canaries)


@pytest.fixture
def place(store: Store, press: Call, repository: Call) -> Callable[..., Place]:
    def make(second: Checkpoint | None = None, first: Checkpoint | None = None) -> Place:
        packs = press(first or scale_model(2.0)), press(second or scale_model(3.0), alias=None)
        return Place(store, repository("scale"), *packs)

    return make


async def ask(client: httpx.AsyncClient, times: int = 1, key: str | None = None) -> list[tuple[str, float]]:
    """For each answer the pack that it names, and the weight that its numbers show."""
    headers = {} if key is None else {"modelpress-canary-key": key}
    found = []
    for _ in range(times):
        body = encode_request({"x": np.ones((2, WIDTH), np.float32)})
        answer = await client.post(INFER, content=body, headers=headers)
        assert answer.status_code == 200, answer.text
        pack, y = answer.json()["model_version"], decode_response(answer.content)["y"]
        assert answer.headers["modelpress-pack"] == pack
        assert y.shape == (2, CLASSES)
        assert (y == y.flat[0]).all()
        found.append((pack, float(y.flat[0]) / WIDTH))
    return found


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coins of these requests are always the same ones."""
    import random

    monkeypatch.setattr(serving_canary.random, "random", random.Random(7).random)


async def until(reached: Callable[[], bool]) -> None:
    for _ in range(6000):
        if reached():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")
