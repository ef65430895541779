"""Numbers: what Prometheus' own parser reads of them, and that clients make no series."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from modelpress import keys, load, pointer
from modelpress.store import Store
from serving.audit import Audit
from serving.keyring import Keyring, Sources
from serving.main import ServingSettings, application
from serving.metrics import quantile
from serving.protocol import encode_request
from serving.repository import Repository
from serving.rpc.messages import SERVICE
from tests.serving.conftest import WIDTH, scale_model

Call = Callable[..., Any]
INFER, ROUTE = "/v2/models/scale/infer", "/v2/models/{name}/infer"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(client: TestClient) -> Samples:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}


def at(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((f"modelpress_{name}", frozenset(labels.items())))


@pytest.fixture
def client(press: Call, repository: Call) -> TestClient:
    press(scale_model(2.0))
    return client_of(repository("scale"))


def client_of(repository: Repository) -> TestClient:
    settings = ServingSettings(poll_seconds=0, workers=1)
    return TestClient(application(repository, settings, Keyring(Sources()), Audit()))


def test_requests_are_counted_by_model_route_and_status(client: TestClient) -> None:
    body = encode_request({"x": np.ones((1, WIDTH), np.float32)})
    for content in (body, body, b"{"):
        client.post(INFER, content=content)
    client.get("/v2/models/scale")
    found = read(client)
    assert at(found, "requests_total", model="scale", route=ROUTE, code="200") == 2
    assert at(found, "requests_total", model="scale", route=ROUTE, code="400") == 1
    assert at(found, "requests_total", model="scale", route="/v2/models/{name}", code="200") == 1
    assert at(found, "request_seconds_count", model="scale", route=ROUTE) == 3
    assert at(found, "request_seconds_bucket", model="scale", route=ROUTE, le="+Inf") == 3
    total = at(found, "request_seconds_sum", model="scale", route=ROUTE)
    assert total is not None
    assert total > 0
    assert at(found, "requests_in_flight") == 0
    assert at(found, "queue_length") == 0
    assert at(found, "requests_total", model="", route="/metrics", code="200") is None, "it is not over yet"
    assert at(read(client), "requests_total", model="", route="/metrics", code="200") == 1


def test_clients_make_no_series(client: TestClient) -> None:
    for number in range(20):
        client.post(f"/v2/models/made-up-{number}/infer", content=b"{}")
        client.get(f"/made/up/{number}")
    found = read(client)
    assert not [labels for _, labels in found if any("made" in value for _, value in labels)]
    assert at(found, "requests_total", model="", route=ROUTE, code="404") == 20
    assert at(found, "requests_total", model="", route="", code="404") == 20


def test_what_answers_and_what_can_not(store: Store, press: Call, repository: Call) -> None:
    first = press(scale_model(2.0))
    models = repository("scale")
    client = client_of(models)
    labels = {"model": "scale", "alias": "champion", "pack": first, "provider": "CPUExecutionProvider"}
    found = read(client)
    assert at(found, "model_info", **labels) == 1
    assert at(found, "pointer_number", model="scale") == 1
    assert at(found, "pointer_lag", model="scale") == 0
    assert at(found, "load_failures_total", model="scale") == 0
    second = press(scale_model(3.0), alias=None)
    key = keys.blob(load.load_manifest(store, "scale", second).shards[0].sha256)
    store.put(key, store.get(key)[:-1] + b"\xff")
    for pack in (second, first, second):
        pointer.append(store, "scale", "champion", pack, "promote")
    models.poll()
    found = read(client)
    assert at(found, "model_info", **labels) == 1
    assert at(found, "pointer_number", model="scale") == 1
    assert at(found, "pointer_lag", model="scale") == 3
    assert at(found, "load_failures_total", model="scale") == 1
    assert (at(found, "model_ready", model="scale"), at(found, "ready")) == (1, 1)
    client.post("/v2/repository/models/scale/unload")
    found = read(client)
    assert at(found, "model_ready", model="scale") == 0
    assert at(found, "model_info", **labels) is None


def test_the_process_and_the_keys_are_numbers(client: TestClient) -> None:
    found = read(client)
    if Path("/proc/self/stat").exists():
        assert found["process_resident_memory_bytes", frozenset()] > 2**20
    assert at(found, "access_files_stale") == 0


def test_latencies_of_the_last_answers(client: TestClient) -> None:
    metrics = client.app._metrics  # type: ignore[attr-defined]
    assert metrics.latency("scale") == {"p50_seconds": None, "p99_seconds": None, "samples": 0}
    for milliseconds in range(1, 101):
        metrics.began(ROUTE)
        metrics.answered(ROUTE, "scale", 200, milliseconds / 1000)
    for status, model in ((400, "scale"), (503, "scale"), (200, "made-up"), (200, None)):
        metrics.began(ROUTE)
        metrics.answered(ROUTE, model, status, 99.0)
    assert metrics.latency("scale") == {"p50_seconds": 0.05, "p99_seconds": 0.099, "samples": 100}
    assert metrics.outcomes("scale") == {"answered": 100, "refused": 1, "failed": 1}
    assert metrics.outcomes("made-up") == {"answered": 0, "refused": 0, "failed": 0}
    assert metrics.in_flight == 0


def test_calls_over_grpc_count_as_inference(client: TestClient) -> None:
    metrics = client.app._metrics  # type: ignore[attr-defined]
    for route in (ROUTE, f"/{SERVICE}/ModelInfer", f"/{SERVICE}/ModelMetadata"):
        metrics.began(route)
        metrics.answered(route, "scale", 200, 0.25)
    assert metrics.latency("scale")["samples"] == 2
    assert metrics.outcomes("scale")["answered"] == 2
    assert metrics.in_flight == 0


def test_a_model_behind_its_processing_is_the_same_model(client: TestClient) -> None:
    client.post("/v2/models/scale:processed/infer", content=b"{}")
    client.post("/v2/models/made-up:processed/infer", content=b"{}")
    found = read(client)
    labels = {"model": "scale", "route": ROUTE}
    assert sum(at(found, "requests_total", **labels, code=code) or 0 for code in ("404", "503")) == 1
    assert at(found, "requests_total", model="", route=ROUTE, code="404") == 1


def test_what_waits_is_what_does_not_run(client: TestClient) -> None:
    metrics = client.app._metrics  # type: ignore[attr-defined]
    for _ in range(3):
        metrics.began(ROUTE)
    metrics.began("/v2/models/{name}")
    found = read(client)
    assert (at(found, "requests_in_flight"), at(found, "queue_length")) == (3, 2)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_a_quantile_is_one_of_the_values_with_enough_at_or_below_it(values: list[float], share: float) -> None:
    found = quantile(sorted(values), share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) <= share * len(values)
