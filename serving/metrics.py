"""Numbers for Prometheus, and the latencies of the last answers for the status page.

A model's name stands in a label only where this server serves it: names that clients make up must not make series.
"""

from __future__ import annotations

import itertools
import math
import threading
from bisect import bisect_left
from collections import Counter as Counts
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from serving.keyring import Keyring
from serving.repository import Repository, ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds."""
LAST = 2048
"""Answers whose latencies are kept, by model and route."""
INFER = ("/infer", "/ModelInfer")


@dataclass
class _Series:
    """Requests of one model by one route."""

    codes: Counts[int] = field(default_factory=Counts)
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    """How many took at most so long, and longer than the bound before; the last: longer than all."""
    seconds: float = 0.0
    last: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))


class Metrics:
    """Counts what is asked. Safe to call from threads.

    A request costs a lock and some additions: a histogram of `prometheus_client`'s goes through all its buckets, so
    counts are put into its form only when somebody asks for them.

    Args:
        repository: what is served; looked at when somebody asks for the numbers.
        keyring: who counts; whether its files are what counts is a number, too.
        workers: inferences that run at a time.
    """

    def __init__(self, repository: Repository, keyring: Keyring, workers: int) -> None:
        self._repository, self._workers = repository, workers
        self._registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._inside = 0
        self._series: dict[tuple[str, str], _Series] = {}
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
        name = (model or "").partition(":")[0]  # NAME:processed is the same model, asked in another way
        known = name if self._repository.serves(name) else ""
        with self._lock:
            series = self._series.get((known, route))
            if series is None:
                series = self._series[known, route] = _Series()
            series.codes[status] += 1
            series.buckets[bisect_left(BUCKETS, seconds)] += 1
            series.seconds += seconds
            if route.endswith(INFER):
                self._inside -= 1
                if status < 400:
                    series.last.append(seconds)

    def counted(self) -> Iterator[Metric]:
        """Requests by model, route and status, and how long they took."""
        requests = CounterMetricFamily(
            "modelpress_requests", "Requests that were answered.", labels=["model", "route", "code"]
        )
        seconds = HistogramMetricFamily(
            "modelpress_request_seconds",
            "From the head of a request to the end of its answer.",
            labels=["model", "route"],
        )
        with self._lock:
            for (model, route), series in self._series.items():
                for code, count in series.codes.items():
                    requests.add_metric([model, route, str(code)], count)
                bounds = [*map(str, BUCKETS), "+Inf"]
                sums = zip(bounds, itertools.accumulate(series.buckets), strict=True)
                seconds.add_metric([model, route], [(bound, float(count)) for bound, count in sums], series.seconds)
        yield requests
        yield seconds

    @property
    def in_flight(self) -> int:
        """Requests for inference that are inside."""
        return self._inside

    @property
    def waiting(self) -> int:
        """Those of them that can't run yet."""
        return max(0, self._inside - self._workers)

    def latency(self, model: str) -> dict[str, float | int | None]:
        """Of the last answers of a model: `p50_seconds` and `p99_seconds` (None: there were none), `samples`."""
        with self._lock:
            seconds = sorted(one for series in self._inferences(model) for one in series.last)
        return {"p50_seconds": quantile(seconds, 0.5), "p99_seconds": quantile(seconds, 0.99), "samples": len(seconds)}

    def outcomes(self, model: str) -> dict[str, int]:
        """Requests for inference since the start: `answered`, `refused` (the client's fault), `failed` (ours)."""
        found = {"answered": 0, "refused": 0, "failed": 0}
        with self._lock:
            for code, count in ((code, count) for one in self._inferences(model) for code, count in one.codes.items()):
                found["answered" if code < 400 else "refused" if code < 500 else "failed"] += count
        return found

    def _inferences(self, model: str) -> list[_Series]:
        return [one for (name, route), one in self._series.items() if name == model and route.endswith(INFER)]

    def add(self, collector: Collector) -> None:
        """Take in what another part counts."""
        self._registry.register(collector)

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
        yield from self._metrics.counted()
        yield _gauge("requests_in_flight", "Requests for inference that are inside.", self._metrics.in_flight)
        yield _gauge("queue_length", "Requests for inference that wait.", self._metrics.waiting)
        yield _gauge("ready", "Whether every model answers.", float(self._repository.ready))
        stale = self._keyring.stale is not None
        answers = float(self._repository.lost is None)
        yield _gauge("store_answers", "Whether the store did when it was asked last.", answers)
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
