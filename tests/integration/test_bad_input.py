"""Bad input at the real command line, over a champion that is being served.

Each case: the documented exit code, a message with the way out and no traceback, nothing published, and the old
champion still answering.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from flows.optimize import optimize
from modelpress import keys, load, pointer
from modelpress.config import OptimizeConfig
from modelpress.store import Store, open_store
from registry import versions
from serving.protocol import encode_request
from tests.conftest import ROOT, OpenS3, S3Server
from tests.integration.small_workloads import WIDTH
from tests.serving.conftest import Server
from tests.store.gateway import Proxy
from tests.warm import Warm, flows

NAME = "small"
RECIPE = {
    "name": NAME,
    "workload": {"kind": "custom", "factory": "tests.integration.small_workloads:Small", "calibration_samples": 100},
    "compress": {"min_decode_bytes_per_second": 0},
    "evaluate": {"batch_sizes": [1], "latency_seconds": 0.02},
    "gate": {"margin": 0.3, "min_compression_ratio": 0.1},
}
COMMAND = str(Path(sys.executable).with_name("modelpress"))
LIMITED = (
    "import resource, os, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000)); os.execv(*eval(sys.argv[1]))"
)
SECONDS = 240
"""Patience with a command, which takes seconds on a machine that is not busy."""


@dataclass(frozen=True)
class Place:
    """A store with a served champion and a published candidate, and the environment of every command."""

    folder: Path
    environment: dict[str, str]
    store: Store
    mlflow: MlflowClient
    warm: Warm

    def recipe(self, name: str = "recipe", **changes: object) -> str:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**RECIPE, **changes}))
        return str(path)

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        (found,) = self.together([*arguments], **environment)
        return found

    def together(self, *commands: list[str], **environment: str) -> list[tuple[int, str, str]]:
        """The outcomes of commands that run side by side."""
        env = self.environment | environment
        running = [self.warm.start(*command, env=env, cwd=self.folder) for command in commands]
        ended = [process.communicate(timeout=SECONDS) for process in running]
        return [(process.wait(), *texts) for process, texts in zip(running, ended, strict=True)]

    def run_limited(self, *arguments: str) -> tuple[int, str, str]:
        """As the installed command, where no file may grow beyond some bytes."""
        command = [sys.executable, "-c", LIMITED, repr((COMMAND, [COMMAND, *arguments]))]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, cwd=self.folder, timeout=SECONDS, check=False
        )
        return done.returncode, done.stdout, done.stderr

    def packs(self) -> list[str]:
        return [info.key for info in self.store.list(keys.PACKS)]


def refused(found: tuple[int, str, str], code: int, *words: str) -> None:
    """The command ended with `code`, and said `words` without a traceback."""
    assert found[0] == code, found[2]
    assert "Traceback" not in found[2]
    assert found[2].count("error: ") == 1, found[2]
    last = found[2][found[2].index("error: ") :]
    assert not [word for word in words if word not in last], last


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, prefect_server: str, mlflow_server: str) -> Place:
    folder = tmp_path_factory.mktemp("bad")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MODELPRESS_", "AWS_"))}
    environment = clean | {
        "MODELPRESS_HOME": str(folder / "home"),
        "MODELPRESS_TRACKING_URI": mlflow_server,
        "PREFECT_API_URL": prefect_server,
        "PYTHONPATH": str(ROOT),
    }
    store = open_store(str(folder / "home" / "store"))
    return Place(folder, environment, store, MlflowClient(mlflow_server, mlflow_server), flows())


@pytest.fixture(scope="module")
def champion(place: Place) -> str:
    """Published and promoted."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.environment.items():
            patch.setenv(name, value)
        result = optimize(OptimizeConfig.model_validate(RECIPE))
    assert result.decision is not None
    assert result.decision.promote, result.decision.line()
    return result.pack


@pytest.fixture(scope="module")
def candidate(place: Place, champion: str) -> str:
    """Published and registered by the command, not promoted; its shards are its own."""
    recipe = place.recipe(shard={"max_shard_size": 16_384}, promote=False)
    code, out, err = place.run("run", recipe, "--json")
    assert code == 0, err
    return str(json.loads(out)["pack"])


@pytest.fixture(scope="module")
def server(place: Place, champion: str) -> Iterator[Server]:
    """The serving process on the champion."""
    running = Server(place.store, NAME)
    yield running
    assert running.stop() == 0


@pytest.fixture(autouse=True)
def unharmed(place: Place, champion: str, candidate: str, server: Server) -> Iterator[None]:
    """After each case: nothing more in packs/, and the old champion answers."""
    before = place.packs()
    yield
    assert place.packs() == before
    entry = pointer.current(place.store, NAME, "champion")
    assert entry is not None
    assert entry.pack == champion
    body = encode_request({"input": np.ones((1, WIDTH), np.float32)})
    answer = server.client.post(f"/v2/models/{NAME}/infer", content=body)
    assert (answer.status_code, answer.json()["model_version"]) == (200, champion)
    assert "failure" not in server.client.get(f"/v2/models/{NAME}").json()["parameters"]


SMALL = RECIPE["workload"]


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"quantise": {"method": "static"}}, 2, ["quantise", "unknown field", "quantize"]),
        (
            {"workload": {**SMALL, "options": {"branching": True}}},  # type: ignore[dict-item]
            5,
            ["export"],
        ),
        (
            {"workload": {**SMALL, "options": {"overlap": True}}},  # type: ignore[dict-item]
            4,
            ["calibration and evaluation", "1 shared samples", "remove them from the calibration split"],
        ),
    ],
    ids=["a typo", "a model without a graph", "overlapping splits"],
)
def test_a_recipe_that_cannot_be_run(place: Place, changes: dict[str, object], code: int, words: Sequence[str]) -> None:
    refused(place.run("run", place.recipe("bad", **changes)), code, *words)


def test_a_dead_tracking_server_is_said_in_seconds(place: Place, candidate: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
        started = time.monotonic()
        commands = [["run", place.recipe()], ["promote", NAME, candidate]]
        for found in place.together(*commands, MODELPRESS_TRACKING_URI=dead):
            refused(found, 3, dead, "MODELPRESS_TRACKING_URI", "mlflow server")
        assert time.monotonic() - started < 40


def blobs(place: Place, pack: str) -> list[str]:
    return [keys.blob(shard.sha256) for shard in load.load_manifest(place.store, NAME, pack).shards]


def flip(place: Place, first: str, second: str) -> None:
    data = place.store.get(first)
    place.store.put(first, data[:-1] + bytes([data[-1] ^ 1]))


def cut(place: Place, first: str, second: str) -> None:
    place.store.put(first, place.store.get(first)[:-1])


def swap(place: Place, first: str, second: str) -> None:
    one, other = place.store.get(first), place.store.get(second)
    place.store.put(first, other)
    place.store.put(second, one)


def remove(place: Place, first: str, second: str) -> None:
    place.store.delete(first)


@pytest.mark.parametrize(("damage", "code"), [(flip, 7), (cut, 7), (swap, 7), (remove, 8)])
def test_a_damaged_candidate_is_neither_verified_nor_promoted(
    place: Place, candidate: str, damage: Callable[[Place, str, str], None], code: int
) -> None:
    first, second = blobs(place, candidate)[:2]
    good = {key: place.store.get(key) for key in (first, second)}
    damage(place, first, second)
    try:
        for found in place.together(["verify", f"{NAME}@{candidate}"], ["promote", NAME, candidate]):
            refused(found, code, first.removeprefix(keys.BLOBS)[:12])
            assert found[1] == ""
    finally:
        for key, data in good.items():
            place.store.put(key, data)


def test_a_manifest_of_a_newer_format(place: Place, candidate: str, tmp_path: Path) -> None:
    manifest = json.loads(place.store.get(keys.manifest(NAME, candidate))) | {"format_version": 99}
    data = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    newer = hashlib.sha256(data).hexdigest()
    standing = versions.find(place.mlflow, NAME, candidate)
    assert standing is not None
    experiment = place.mlflow.get_run(standing.run_id).info.experiment_id
    versions.register(
        place.mlflow,
        NAME,
        pack=newer,
        uri="s3://x/y",
        run_id=standing.run_id,
        tags={},
        measured={},
        description="",
        log=lambda: place.mlflow.create_logged_model(experiment, name=NAME, source_run_id=standing.run_id),
    )
    place.store.put(keys.manifest(NAME, newer), data)
    try:
        ref = f"{NAME}@{newer}"
        commands = [["verify", ref], ["pull", ref, "--to", str(tmp_path / "pulled")], ["promote", NAME, newer]]
        for found in place.together(*commands):
            refused(found, 7, "version 99", "update modelpress")
        assert not (tmp_path / "pulled").exists()
    finally:
        place.store.delete(keys.manifest(NAME, newer))


def test_a_full_disk(place: Place, tmp_path: Path) -> None:
    """No file may grow beyond some bytes: writing fails as it does on a full disk."""
    found = place.run_limited("run", place.recipe(), "--store", str(tmp_path / "full"))
    refused(found, 8, "free space")
    assert list(open_store(str(tmp_path / "full")).list(keys.PACKS)) == []


@pytest.mark.s3
def test_a_store_without_conditional_writes(place: Place, open_s3: OpenS3, s3_server: S3Server) -> None:
    store, proxy = open_s3("writer"), Proxy(s3_server, drop_header="If-None-Match")
    environment = s3_server.environment() | {"MODELPRESS_S3_ENDPOINT_URL": proxy.endpoint}
    try:
        found = place.run("run", place.recipe(), "--store", store.uri, **environment)
    finally:
        proxy.close()
    refused(found, 8, "If-None-Match", store.uri, "modelpress doctor")
    assert list(store.list()) == []


@pytest.mark.s3
def test_a_wrong_key(place: Place, open_s3: OpenS3, s3_server: S3Server) -> None:
    store = open_s3("writer")
    secret = "no-such-secret"
    environment = s3_server.environment() | {"AWS_SECRET_ACCESS_KEY": secret}
    commands = [["run", place.recipe(), "--store", store.uri], ["verify", NAME, "--store", store.uri]]
    for found in place.together(*commands, **environment):
        refused(found, 8, s3_server.endpoint)
        assert secret not in found[2]
    assert list(store.list()) == []


def test_a_port_in_use(place: Place, server: Server) -> None:
    port = server.url.rpartition(":")[2]
    refused(place.run("serve", NAME, "--port", port), 3, f"127.0.0.1:{port}", "--port")
