"""Numbers of the last run of each pack, for Prometheus: a file that the node exporter's textfile collector reads.

A run is a process that is gone when somebody scrapes it, and so is its endpoint. The file stays, and says what the last
run said until there is another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from flows.result import StageRow
from modelpress.reports import UploadReport
from modelpress.store.local import local_errors
from registry.gates import Decision


def write(
    folder: Path,
    pack: str,
    rows: Sequence[StageRow],
    published: UploadReport | None,
    decision: Decision | None,
    *,
    began: float,
    success: bool,
) -> None:
    """Write what a run of the line did, whole or not at all.

    Args:
        folder: the collector's.
        pack: name; the file has it, too.
        rows: the stages that ran.
        published: None where it came to nothing.
        decision: None where no gate was asked.
        began: when the run began, by the clock of the wall.
        success: whether it ended without an error.

    Raises:
        StoreFullError, AccessDeniedError: the folder takes no file.
    """
    gauges = _Gauges(pack)
    for row in rows:
        _stage(gauges, row)
    if published is not None:
        gauges.set("published_bytes", "All bytes of the pack", published.published_bytes)
        gauges.set("compression_ratio", "Bytes of the source by bytes of the pack", published.compression_ratio)
    if decision is not None:
        gauges.set("gate_promoted", "1 where the gate let the pack through", decision.promote)
    now = time.time()
    gauges.set("run_success", "1 where the run ended without an error", success)
    gauges.set("run_seconds", "Time that the run took", now - began)
    gauges.set("run_end_timestamp_seconds", "When the run ended", now)
    path = folder / f"modelpress_{pack}.prom"
    with local_errors(f"writing {path}", writing=True):
        folder.mkdir(parents=True, exist_ok=True)
        write_to_textfile(str(path), gauges.registry)


def _stage(gauges: _Gauges, row: StageRow) -> None:
    stage = {"stage": row.stage}
    gauges.set("stage_seconds", "Time that the stage took when it ran, evaluation included", row.seconds, stage)
    gauges.set("stage_reused", "1 where a finished output was taken", row.reused, stage)
    if row.size_bytes is not None:
        gauges.set("stage_bytes", "Bytes of the stage's output", row.size_bytes, stage)
    if row.quality is not None:
        quality = {**stage, "metric": row.quality.metric}
        gauges.set("quality", "The workload's metric after the stage", row.quality.value, quality)
    for found in row.latency:
        for quantile, seconds in (("0.5", found.p50_seconds), ("0.99", found.p99_seconds)):
            call = {**stage, "batch": str(found.batch_size), "quantile": quantile}
            gauges.set("latency_seconds", "Time of a call after the stage", seconds, call)


class _Gauges:
    """Gauges with the pack's name on each."""

    def __init__(self, pack: str) -> None:
        self.registry = CollectorRegistry()
        self._pack = pack
        self._made: dict[str, Gauge] = {}

    def set(self, name: str, says: str, value: float, labels: dict[str, str] | None = None) -> None:
        whole = {"pack": self._pack, **(labels or {})}
        if name not in self._made:
            self._made[name] = Gauge(f"modelpress_{name}", says, list(whole), registry=self.registry)
        self._made[name].labels(**whole).set(value)
