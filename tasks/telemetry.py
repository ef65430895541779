"""Traces by OpenTelemetry: the flow run, its stages, and what they ask of stores; only where somebody wants them.

`OTEL_EXPORTER_OTLP_ENDPOINT` switches them on, with all that OpenTelemetry's own variables say. Without it nothing is
imported. A provider that the process has already (`opentelemetry-instrument`) is used as it is. Prefect's client makes
a span for each task run where there is a provider: a stage's stands in its task's.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prefect.logging import get_run_logger

from modelpress import __version__
from modelpress.settings import without_logins
from modelpress.store import observe

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

SWITCHES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
EXPORTER = "opentelemetry.exporter.otlp.proto.http"
FLUSH_MILLISECONDS = 5000
"""How long the end of a run waits for a collector."""
Attribute = str | bool | int | float


def wanted() -> bool:
    """Whether the environment asks for traces."""
    return any(os.environ.get(name) for name in SWITCHES)


@contextmanager
def traced(name: str, attributes: dict[str, Attribute]) -> Iterator[None]:
    """The trace of a flow run; what it made is sent when it ends, also when it fails."""
    if not wanted() or not _provided():
        yield
        return
    from opentelemetry import context, trace

    with _sent(), span(name, attributes):
        here = context.get_current()

        @contextmanager
        def asked(operation: str, uri: str) -> Iterator[None]:
            # Threads of an upload have no context of their own; without a parent their spans would be traces.
            parent = None if trace.get_current_span().get_span_context().is_valid else here
            values = {"modelpress.store.uri": without_logins(uri)}
            with _tracer().start_as_current_span(f"store {operation}", parent, attributes=values):
                yield

        observe.watch(asked)
        try:
            yield
        finally:
            observe.watch(None)


@contextmanager
def _sent() -> Iterator[None]:
    from opentelemetry import trace

    try:
        yield
    finally:
        flush = getattr(trace.get_tracer_provider(), "force_flush", None)
        if flush is not None:
            flush(FLUSH_MILLISECONDS)


@contextmanager
def span(name: str, attributes: dict[str, Attribute]) -> Iterator[Span | None]:
    """A span within the run's trace; None where there is no trace. An error that passes is recorded in it."""
    if not wanted():
        yield None
        return
    with _tracer().start_as_current_span(name, attributes=attributes) as opened:
        yield opened


def _tracer() -> Tracer:
    from opentelemetry import trace

    return trace.get_tracer("modelpress", __version__)


def _provided() -> bool:
    """Whether spans go anywhere; makes the provider of this process where it has none."""
    from opentelemetry import trace

    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return True
    if importlib.util.find_spec("opentelemetry.exporter") is None or importlib.util.find_spec(EXPORTER) is None:
        # A cluster sets the variable for everything that runs in it: no reason to refuse the work.
        missing = "traces are asked for (%s) and not sent: pip install 'modelpress[otel]'"
        get_run_logger().warning(missing, next(name for name in SWITCHES if os.environ.get(name)))
        return False
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "modelpress"}
    provider = TracerProvider(resource=Resource.create({**named, "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return True
