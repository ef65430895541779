"""A span for each request, in the trace that its sender began (`traceparent`, W3C); only where somebody wants them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from modelpress import otel

if TYPE_CHECKING:
    from starlette.types import Scope

    from serving.guard import Visit
    from serving.scopes import Door

log = logging.getLogger("modelpress.serving")
CARRIED = (b"traceparent", b"tracestate")


class Traces:
    """Makes spans, named as OpenTelemetry's conventions for HTTP have it."""

    @staticmethod
    def wanted() -> Traces | None:
        """None where the environment asks for no traces, or where nothing can send them (then the log says so)."""
        return Traces() if otel.wanted() and otel.provide("modelpress-serving", log.warning) else None

    @contextmanager
    def request(self, scope: Scope, door: Door, visit: Visit) -> Iterator[None]:
        """The span of one request. What a client made up stands in no name: a route's does."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        brought = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in CARRIED}
        parent = TraceContextTextMapPropagator().extract(brought)
        attributes = {"http.request.method": scope["method"], "url.scheme": scope.get("scheme", "http")}
        attributes |= {"http.route": door.path} if door.path else {}
        attributes |= {"modelpress.model": door.parameters["name"][:64]} if "name" in door.parameters else {}
        name = f"{scope['method']} {door.path}".rstrip()
        with otel.tracer().start_as_current_span(name, parent, SpanKind.SERVER, attributes=attributes) as span:
            try:
                yield
            finally:
                span.set_attribute("http.response.status_code", visit.status)
                if visit.status >= 500:
                    span.set_status(Status(StatusCode.ERROR))

    def close(self) -> None:
        """Send what was not sent yet."""
        otel.flush()
