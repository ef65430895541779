"""Where OpenTelemetry's spans of this process go; only where somebody wants them.

`OTEL_EXPORTER_OTLP_ENDPOINT` switches them on, with all that OpenTelemetry's own variables say. Without it nothing is
imported. A provider that the process has already (`opentelemetry-instrument`) is used as it is.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from modelpress import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

SWITCHES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
EXPORTER = "opentelemetry.exporter.otlp.proto.http"
FLUSH_MILLISECONDS = 5000
"""How long the end of a run, or of a server, waits for a collector."""


def wanted() -> bool:
    """Whether the environment asks for traces."""
    return any(os.environ.get(name) for name in SWITCHES)


def tracer() -> Tracer:
    """What makes spans."""
    from opentelemetry import trace

    return trace.get_tracer("modelpress", __version__)


def provide(service: str, warn: Callable[[str], object]) -> bool:
    """Whether spans go anywhere; makes the provider of this process where it has none.

    Args:
        service: `service.name` of the spans, unless `OTEL_SERVICE_NAME` says another.
        warn: is told what is missing. A cluster sets the variable for everything that runs in it, so that is no reason
            to refuse the work.
    """
    if importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec("opentelemetry.exporter") is None:
        return _missing(warn)
    from opentelemetry import trace

    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return True
    if importlib.util.find_spec(EXPORTER) is None:
        return _missing(warn)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    provider = TracerProvider(resource=Resource.create({**named, "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return True


def flush() -> None:
    """Send what was not sent yet; a collector that does not answer costs `FLUSH_MILLISECONDS`."""
    from opentelemetry import trace

    flush = getattr(trace.get_tracer_provider(), "force_flush", None)
    if flush is not None:
        flush(FLUSH_MILLISECONDS)


def _missing(warn: Callable[[str], object]) -> bool:
    switch = next(name for name in SWITCHES if os.environ.get(name))
    warn(f"traces are asked for ({switch}) and not sent: pip install 'modelpress[otel]'")
    return False
