"""Numbers for Prometheus, and the latencies of the last answers for the status page.

A model's name stands in a label only where this server serves it: names that clients make up must not make series.
"""

from __future__ import annotations

import math
import threading
from collections import Counter as Counts
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from serving.keyring import Keyring
from serving.repository import Repository, ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds."""
LAST = 2048
"""Inferences whose latencies are kept, by model."""
INFER = "/infer"


class Metrics:
    """Counts what is asked. Safe to call from threads.

    Args:
        repository: what is served; looked at when somebody asks for the numbers.
        keyring: who counts; whether its files are what counts is a number, too.
        workers: inferences that run at a time.
    """

    def __init__(self, repository: Repository, keyring: Keyring, workers: int) -> None:
        self._repository, self._workers = repository, workers
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "modelpress_requests", "Requests that were answered.", ["model", "route", "code"], registry=self._registry
        )
        self._seconds = Histogram(
            "modelpress_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["model", "route"],
            buckets=BUCKETS,
            registry=self._registry,
        )
        self._lock = threading.Lock()
        self._inside = 0
        self._last: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=LAST))
        self._outcomes: defaultdict[str, Counts[str]] = defaultdict(Counts)
        ProcessCollector(registry=self._registry)
        self._registry.register(_State(self, repository, keyring))

    def began(self, route: str) -> None:
        """A request came in; `answered` must follow."""
        if route.endswith(INFER):
            with self._lock:
                self._inside += 1

    def answered(self, route: str, model: str | None, status: int, seconds: float) -> None:
        """A request was answered.

        Args:
            route: the path of its route, with parameters by name (or another word, for another way in); empty: none.
            model: its model's name, as the client wrote it; None: it has none.
            status: HTTP's.
            seconds: how long it took.
        """
        known = model if model is not None and self._repository.serves(model) else ""
        self._requests.labels(known, route, str(status)).inc()
        self._seconds.labels(known, route).observe(seconds)
        if not route.endswith(INFER):
            return
        with self._lock:
            self._inside -= 1
            if known:
                outcome = "answered" if status < 400 else "refused" if status < 500 else "failed"
                self._outcomes[known][outcome] += 1
                if status < 400:
                    self._last[known].append(seconds)

    @property
    def in_flight(self) -> int:
        """Requests for inference that are inside."""
        return self._inside

    @property
    def waiting(self) -> int:
        """Those of them that can't run yet."""
        return max(0, self._inside - self._workers)

    def latency(self, model: str) -> dict[str, float | int | None]:
        """Of the last `LAST` answers of a model: `p50_seconds` and `p99_seconds` (None: there were none), `samples`."""
        with self._lock:
            seconds = sorted(self._last.get(model, ()))
        return {"p50_seconds": quantile(seconds, 0.5), "p99_seconds": quantile(seconds, 0.99), "samples": len(seconds)}

    def outcomes(self, model: str) -> dict[str, int]:
        """Requests for inference since the start: `answered`, `refused` (the client's fault), `failed` (ours)."""
        with self._lock:
            counts = self._outcomes.get(model, Counts())
            return {name: counts[name] for name in ("answered", "refused", "failed")}

    def text(self) -> bytes:
        """Everything, in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)

    async def endpoint(self, _request: Request) -> Response:
        """`GET /metrics`."""
        return Response(self.text(), headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest of sorted values that at least `share` of them do not exceed (nearest rank); None of none."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else None


class _State(Collector):
    """What is looked up when it is asked for."""

    def __init__(self, metrics: Metrics, repository: Repository, keyring: Keyring) -> None:
        self._metrics, self._repository, self._keyring = metrics, repository, keyring

    def collect(self) -> Iterator[Metric]:
        models = self._repository.models()
        yield _gauge("requests_in_flight", "Requests for inference that are inside.", self._metrics.in_flight)
        yield _gauge("queue_length", "Requests for inference that wait.", self._metrics.waiting)
        yield _gauge("ready", "Whether every model answers.", float(self._repository.ready))
        stale = self._keyring.stale is not None
        yield _gauge("access_files_stale", "Whether changed files of keys could not be read.", float(stale))
        info = GaugeMetricFamily(
            "modelpress_model_info", "What answers.", labels=["model", "alias", "pack", "provider"]
        )
        for model in models:
            if loaded := model.loaded:
                info.add_metric([model.name, model.alias, loaded.engine.pack, loaded.engine.provider], 1)
        yield info
        yield _by_model("model_ready", "Whether it answers.", models, _answers)
        yield _by_model("pointer_number", "Number of the entry whose pack answers.", models, _number)
        yield _by_model("pointer_lag", "Entries of the pointer that stand in front of what answers.", models, lag)
        failures = CounterMetricFamily("modelpress_load_failures", "Loads that failed.", labels=["model"])
        for model in models:
            failures.add_metric([model.name], model.failed_loads)
        yield failures


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"modelpress_{name}", text, value=value)


def _by_model(
    name: str, text: str, models: Sequence[ServedModel], value: Callable[[ServedModel], float | None]
) -> Metric:
    family = GaugeMetricFamily(f"modelpress_{name}", text, labels=["model"])
    for model in models:
        if (found := value(model)) is not None:
            family.add_metric([model.name], found)
    return family


def _answers(model: ServedModel) -> float:
    return float(model.loaded is not None and not model.loaded.engine.broken)


def _number(model: ServedModel) -> float | None:
    return float(model.loaded.pointer.number) if model.loaded and model.loaded.pointer else None


def lag(model: ServedModel) -> int | None:
    """Entries from the one whose pack answers to the newest, which was seen and can't be loaded; None: unknown."""
    entry = model.loaded.pointer if model.loaded else None
    if entry is None or (model.failure is not None and model.failure.number is None):
        return None
    newest = model.failure.number if model.failure and model.failure.number else entry.number
    return max(0, newest - entry.number)
