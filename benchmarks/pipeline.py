"""Bytes, quality and latency after each stage of the shipped recipes, and what was published.

One run per recipe on empty stores, ephemeral Prefect, MLflow on SQLite. The source model in ONNX Runtime, fp32, is the
peer: it is what one serves without any of this.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks._report import Row, main
from benchmarks._servers import QUIET
from benchmarks.orchestration import CONFIGS
from flows.result import OptimizeResult, StageRow
from registry.gates import Check

SYSTEMS = {"source": "torch fp32", "source (onnx)": "onnxruntime fp32"}
CHILD = """
import sys
from flows.optimize import optimize
from modelpress.config import load_config
print("RESULT", optimize(load_config(sys.argv[1])).model_dump_json())
"""


def measure(quick: bool) -> Iterable[Row]:
    """Rows of two shipped recipes."""
    for recipe in ("digits-quick",) if quick else ("digits", "minilm"):
        yield from rows(recipe)


def rows(recipe: str) -> Iterator[Row]:
    """Rows of each stage of a shipped recipe and of the published pack."""
    with tempfile.TemporaryDirectory(prefix="modelpress-") as home:
        result = _run(recipe, Path(home))
        parameters = _parameters(Path(home))
    for stage in result.stages:
        yield from _stage(recipe, stage)
    yield from _published(recipe, result, parameters)


def _run(recipe: str, home: Path) -> OptimizeResult:
    environment = {**os.environ, **QUIET, "PREFECT_HOME": str(home / "prefect"), "MODELPRESS_HOME": str(home)}
    command = [sys.executable, "-c", CHILD, str(CONFIGS / f"{recipe}.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(f"{recipe} failed:\n{done.stderr[-3000:]}")
    return OptimizeResult.model_validate(json.loads(line.removeprefix("RESULT ")))


def _parameters(home: Path) -> int:
    """Parameters of the source model, from the source stage's record in the work store."""
    (record,) = (home / "work" / "stages" / "source").glob("*.json")
    return int(json.loads(record.read_text())["report"]["parameters"])


def _stage(recipe: str, stage: StageRow) -> Iterator[Row]:
    case, system = f"{recipe}: {stage.stage}", SYSTEMS.get(stage.stage, "modelpress")
    if stage.size_bytes is not None:
        yield Row(case, system, "bytes", "B", float(stage.size_bytes))
    if stage.quality is not None:
        yield Row(case, system, stage.quality.metric, "", stage.quality.value)
        yield Row(case, system, f"{stage.quality.metric} low", "", stage.quality.low)
        yield Row(case, system, f"{stage.quality.metric} high", "", stage.quality.high)
    for latency in stage.latency:
        yield Row(case, system, f"p50 at batch {latency.batch_size}", "ms", latency.p50_seconds * 1000)
        yield Row(case, system, f"p99 at batch {latency.batch_size}", "ms", latency.p99_seconds * 1000)
        yield Row(case, system, f"throughput at batch {latency.batch_size}", "/s", latency.throughput_per_second)
    yield Row(case, system, "time", "s", stage.seconds)


def _published(recipe: str, result: OptimizeResult, parameters: int) -> Iterator[Row]:
    case = f"{recipe}: published against the source"
    served = [row.quality for row in result.stages if row.quality is not None][-1]
    yield Row(case, "modelpress", "source parameters", "", float(parameters))
    yield Row(case, "modelpress", "bytes", "B", float(result.published_bytes))
    yield Row(case, "modelpress", "compression ratio", "×", result.compression_ratio)
    yield Row(case, "modelpress", "throughput ratio", "×", result.speedup)
    yield Row(case, "modelpress", f"{served.metric} difference", "", served.difference)
    quality = _check(result, "quality against the source")
    low, high = _bounds(quality)
    yield Row(case, "modelpress", f"{served.metric} difference low, one-sided", "", low)
    yield Row(case, "modelpress", f"{served.metric} difference high, one-sided", "", high)
    yield Row(case, "modelpress", "samples", "", float(served.samples))
    yield Row(
        case, "modelpress", "non-inferior (1 yes, 0 no)", "", float(quality.verdict == "pass") if quality else None
    )


def _bounds(check: Check | None) -> tuple[float | None, float | None]:
    """The gate's one-sided bounds of the paired difference, which it states only in words."""
    found = re.search(r"difference \S+ \[(\S+), (\S+)\] on ", check.reason) if check else None
    return (float(found[1]), float(found[2])) if found else (None, None)


def _check(result: OptimizeResult, name: str) -> Check | None:
    checks = result.decision.checks if result.decision else []
    return next((check for check in checks if check.name == name), None)


if __name__ == "__main__":
    main("pipeline", measure)
