"""A span for each request, in the trace that its sender began (`traceparent`, W3C); only where somebody wants them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from modelpress import otel

if TYPE_CHECKING:
    from opentelemetry.trace import Span
    from starlette.types import Scope

    from serving.scopes import Door

log = logging.getLogger("modelpress.serving")

CARRIED = ("traceparent", "tracestate")
MAX_MODEL_CHARACTERS = 64


class Ending(Protocol):
    """What says how a request ended."""

    status: int
    """HTTP's, also of what came another way."""


class Traces:
    """Makes spans, named as OpenTelemetry's conventions have it. What a client made up stands in no name."""

    @staticmethod
    def wanted() -> Traces | None:
        """None where the environment asks for no traces, or where nothing can send them (then the log says so)."""
        return Traces() if otel.wanted() and otel.provide("modelpress-serving", log.warning) else None

    @contextmanager
    def request(self, scope: Scope, door: Door, ending: Ending) -> Iterator[None]:
        """The span of a request over HTTP."""
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        brought = {name: value for name, value in headers if name in CARRIED}
        attributes = {"http.request.method": scope["method"], "url.scheme": scope.get("scheme", "http")}
        attributes |= {"http.route": door.path} if door.path else {}
        with self._span(f"{scope['method']} {door.path}".rstrip(), brought, attributes, ending) as span:
            if model := door.parameters.get("name"):
                span.set_attribute("modelpress.model", model[:MAX_MODEL_CHARACTERS])
            try:
                yield
            finally:
                span.set_attribute("http.response.status_code", ending.status)

    @contextmanager
    def call(self, route: str, model: str, metadata: Mapping[str, str], ending: Ending) -> Iterator[None]:
        """The span of a call over gRPC; `route` is `/SERVICE/METHOD`."""
        service, _, method = route.strip("/").partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        brought = {name: value for name, value in metadata.items() if name in CARRIED}
        with self._span(route.strip("/"), brought, attributes, ending) as span:
            if model:
                span.set_attribute("modelpress.model", model[:MAX_MODEL_CHARACTERS])
            yield

    @contextmanager
    def _span(
        self, name: str, brought: Mapping[str, str], attributes: Mapping[str, str], ending: Ending
    ) -> Iterator[Span]:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(brought)
        with otel.tracer().start_as_current_span(name, parent, SpanKind.SERVER, attributes=attributes) as span:
            try:
                yield span
            finally:
                if ending.status >= 500:
                    span.set_status(Status(StatusCode.ERROR))

    def close(self) -> None:
        """Send what was not sent yet."""
        otel.flush()
