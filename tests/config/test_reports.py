"""Reports flatten to what a tracker takes, and leave out what was not measured."""

from __future__ import annotations

from modelpress.reports import EvaluationReport, LatencyReport, QualityReport


def report(peak: int | None) -> EvaluationReport:
    quality = QualityReport(metric="accuracy", samples=900, value=0.98, low=0.97, high=0.99)
    latency = LatencyReport(batch_size=32, calls=9, p50_seconds=0.1, p99_seconds=0.2, throughput_per_second=320.0)
    return EvaluationReport(
        stage="prune", runtime="torch", quality=quality, size_bytes=10, latency=[latency], peak_memory_bytes=peak
    )


def test_metrics_are_flat_floats() -> None:
    metrics = report(7).metrics()
    assert metrics["quality.value"] == 0.98
    assert metrics["latency.b32.p99_seconds"] == 0.2
    assert metrics["peak_memory_bytes"] == 7.0
    assert all(type(value) is float for value in metrics.values())


def test_not_measured_is_left_out() -> None:
    metrics = report(None).metrics()
    assert "peak_memory_bytes" not in metrics
    assert "quality.baseline" not in metrics
