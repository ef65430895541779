"""Spans of a real server process, as a collector gets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from modelpress import otel
from serving.protocol import encode_request
from serving.rpc.messages import METHODS, SERVICE
from tests.integration.collector import attributes, collecting
from tests.serving.conftest import WIDTH, Server, scale_model
from tests.serving.rpc.test_service import free_port

Call = Callable[..., Any]
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def call(port: int, method: str, traceparent: str, **fields: Any) -> Any:
    asked, answered = METHODS[method]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        made = channel.unary_unary(f"/{SERVICE}/{method}", asked.SerializeToString, answered.FromString)
        return made(asked(**fields), timeout=60, metadata=(("traceparent", traceparent),))


def test_a_request_is_a_span_in_its_sender_s_trace(press: Call, serve: Call) -> None:
    press(scale_model(2.0))
    with collecting() as collector:
        port = free_port()
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "MODELPRESS_SERVING_GRPC_PORT": str(port)}
        server: Server = serve("scale", **environment, OTEL_SERVICE_NAME="")
        body = encode_request({"x": np.ones((1, WIDTH), np.float32)})
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert server.client.post("/v2/models/scale/infer", content=body, headers=headers).status_code == 200
        server.client.get("/v2/models/made-up")
        server.client.get("/made/up", headers={"traceparent": "00-nonsense"})
        call(port, "ModelMetadata", headers["traceparent"], name="scale")
        assert server.stop() == 0, "what was not sent yet is sent at the end"
    (span,) = collector.named("POST /v2/models/{name}/infer")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    found = attributes(span)
    assert found["modelpress.model"] == "scale"
    assert (found["http.response.status_code"], found["http.route"]) == (200, "/v2/models/{name}/infer")
    assert collector.services == {"modelpress-serving"}
    (missing,) = collector.named("GET /v2/models/{name}")
    assert attributes(missing)["http.response.status_code"] == 404
    (called,) = collector.named(f"{SERVICE}/ModelMetadata")
    assert (called.trace_id.hex(), called.parent_span_id.hex()) == (TRACE, PARENT)
    assert (attributes(called)["rpc.system"], attributes(called)["modelpress.model"]) == ("grpc", "scale")
    (nowhere,) = collector.named("GET")
    assert nowhere.trace_id.hex() != TRACE
    assert "http.route" not in attributes(nowhere)


def test_a_collector_that_is_away_costs_no_request(press: Call, serve: Call) -> None:
    press(scale_model(2.0))
    server: Server = serve("scale", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", OTEL_EXPORTER_OTLP_TIMEOUT="1")
    assert server.client.get("/v2/models/scale").status_code == 200
    assert server.stop() == 0


def test_what_is_missing_is_said_and_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(otel, "EXPORTER", "opentelemetry.exporter.none")
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", None)
    told: list[str] = []
    assert otel.wanted()
    assert not otel.provide("x", told.append)
    assert told == ["traces are asked for (OTEL_EXPORTER_OTLP_ENDPOINT) and not sent: pip install 'modelpress[otel]'"]
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    assert not otel.wanted()
