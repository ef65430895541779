"""Traces by OpenTelemetry: the flow run, its stages, and what they ask of stores; only where somebody wants them.

Where they go is `modelpress.otel`'s. Prefect's client makes a span for each task run where there is a provider: a
stage's stands in its task's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prefect.logging import get_run_logger

from modelpress import otel
from modelpress.settings import without_logins
from modelpress.store import observe

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Attribute = str | bool | int | float


@contextmanager
def traced(name: str, attributes: dict[str, Attribute]) -> Iterator[None]:
    """The trace of a flow run; what it made is sent when it ends, also when it fails."""
    if not otel.wanted() or not otel.provide("modelpress", get_run_logger().warning):
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
            with otel.tracer().start_as_current_span(f"store {operation}", parent, attributes=values):
                yield

        observe.watch(asked)
        try:
            yield
        finally:
            observe.watch(None)


@contextmanager
def _sent() -> Iterator[None]:
    try:
        yield
    finally:
        otel.flush()


@contextmanager
def span(name: str, attributes: dict[str, Attribute]) -> Iterator[Span | None]:
    """A span within the run's trace; None where there is no trace. An error that passes is recorded in it."""
    if not otel.wanted():
        yield None
        return
    with otel.tracer().start_as_current_span(name, attributes=attributes) as opened:
        yield opened
