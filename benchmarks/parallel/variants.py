"""Variants of a recipe over worker processes: what a second one gains, and what is lost with one that is killed.

Each row begins with an empty work store and its own Prefect server. With as many threads each, all must make the same
bytes of each variant, or the benchmark fails. MLflow is a local database, as it is where nobody set one up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks._report import Row, main
from benchmarks._servers import QUIET, prefect_server
from modelpress.config import load_config
from modelpress.reports import VariantsReport

ROOT = Path(__file__).parents[2]

CHILD = """
import json, os, signal, sys, threading, time
import psutil
from flows.variants import optimize_variants
from modelpress.config import load_config, parse_variants

recipe, variants, kill = load_config(sys.argv[1]), parse_variants(json.loads(sys.argv[2])), float(sys.argv[3])

def strike():
    time.sleep(kill)
    children = [one for one in psutil.Process().children() if "flows.variant_process" in one.cmdline()]
    if children:
        os.kill(max(children, key=lambda one: one.cpu_times().user).pid, signal.SIGKILL)

if kill:
    threading.Thread(target=strike, daemon=True).start()
before = time.perf_counter()
report = optimize_variants(recipe, variants)
print("DONE", json.dumps([time.perf_counter() - before, report.model_dump(mode="json")]))
"""


def measure(quick: bool) -> Iterable[Row]:
    """Rows of one worker and two, and of two of which one is killed in the middle."""
    recipe = ROOT / "configs" / ("digits-quick.yaml" if quick else "digits.yaml")
    sparsities = [0.25, 0.5] if quick else [0.25, 0.375, 0.5, 0.75]
    grid = {"prune.sparsity": sparsities, "quantize": [None, load_config(recipe).model_dump(mode="json")["quantize"]]}
    case = f"{2 * len(sparsities)} variants of {recipe.stem}"
    alone, made = _run(recipe, {"grid": grid, "workers": 1, "threads": 1})
    yield Row(case, "1 worker, 1 core", "whole", "s", alone)
    two, second = _run(recipe, {"grid": grid, "workers": 2, "threads": 1})
    yield Row(case, "2 workers, 1 core each", "whole", "s", two)
    yield Row(case, "2 workers, 1 core each", "speed-up", "×", alone / two)
    _check_same(made, second)
    wide, _ = _run(recipe, {"grid": grid, "workers": 1, "threads": 2})
    yield Row(case, "1 worker, 2 cores", "whole", "s", wide)
    yield Row(case, "1 worker, 2 cores", "speed-up", "×", alone / wide)
    killed, third = _run(recipe, {"grid": grid, "workers": 2, "threads": 1}, kill=two / 2)
    yield Row(case, "2 workers, one killed half-way", "whole", "s", killed)
    _check_same(made, third)
    yield from _sums(case, made)


def _sums(case: str, made: VariantsReport) -> Iterator[Row]:
    alone = sum(one.seconds or 0.0 for one in made.variants)
    yield Row(case, "1 worker, 1 core", "of which variants without what they share", "s", alone)


def _check_same(one: VariantsReport, other: VariantsReport) -> None:
    """The same bytes of each variant, each once."""
    first, second = ([(row.number, row.artifact and row.artifact.sha256) for row in of.variants] for of in (one, other))
    if first != second:
        raise RuntimeError(f"another number of workers made other bytes: {first} and {second}")


def _run(recipe: Path, variants: dict[str, Any], kill: float = 0.0) -> tuple[float, VariantsReport]:
    """Seconds and the report of a run from an empty store; `kill` seconds from the start on a worker is killed."""
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder, prefect_server(Path(folder)) as url:
        environment = {**os.environ, **QUIET, "PREFECT_HOME": folder, "MODELPRESS_HOME": folder, "PREFECT_API_URL": url}
        command = [sys.executable, "-c", CHILD, str(recipe), json.dumps(variants), str(kill)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("DONE ")), None)
    if line is None:
        raise RuntimeError(f"the run of variants failed:\n{done.stderr[-3000:]}")
    seconds, report = json.loads(line.removeprefix("DONE "))
    return seconds, VariantsReport.model_validate(report)


if __name__ == "__main__":
    main("parallel.variants", measure)
