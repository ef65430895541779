"""What the orchestration costs: a flow's time minus the time of the stage functions inside it.

Each case runs in a process of its own, on empty stores: with Prefect's ephemeral server, and with a Prefect server that
is up already. `start` is counted apart: what a process pays once (the ephemeral server), a new database once (MLflow's
tables), and plain functions pay as well (importing torch, loading the data). `repeat` is the same flow again with every
stage reused: all of it is orchestration.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks._report import Row, main
from benchmarks._servers import QUIET, prefect_server

CONFIGS = Path(__file__).parents[1] / "configs"
CHILD = """
import json, sys, time
started = time.perf_counter()
from prefect import flow
from flows.optimize import optimize
from modelpress.config import load_config

@flow
def nothing():
    pass

nothing()
config = load_config(sys.argv[1])
import modelpress.compress, modelpress.evaluate, modelpress.export, modelpress.prune, modelpress.quantize
from modelpress.settings import Settings
from registry.runs import open_client
from tasks.runner import open_workload
open_workload(config.workload).identity()
open_client(Settings()).search_experiments()
ready = time.perf_counter()
times = []
for _ in range(2):
    before = time.perf_counter()
    result = optimize(config)
    spent = time.perf_counter() - before
    times.append((spent, sum(row.seconds for row in result.stages if not row.reused), len(result.recomputed)))
print("TIMES", json.dumps({"start": ready - started, "times": times}))
"""


def measure(quick: bool) -> Iterable[Row]:
    """Rows of a short flow on an ephemeral server; unless quick, of a long one too, and on a server that is up."""
    for recipe in ("digits-quick",) if quick else ("digits-quick", "digits"):
        with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
            yield from _case(f"{recipe}, ephemeral server", recipe, Path(folder), {})
        if quick:
            return
        with tempfile.TemporaryDirectory(prefix="modelpress-") as folder, prefect_server(Path(folder)) as url:
            yield from _case(f"{recipe}, own server", recipe, Path(folder), {"PREFECT_API_URL": url})
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        yield from _case("minilm, ephemeral server", "minilm", Path(folder), {})


def _case(case: str, recipe: str, home: Path, more: dict[str, str]) -> Iterator[Row]:
    environment = {**os.environ, **QUIET, "PREFECT_HOME": str(home), "MODELPRESS_HOME": str(home), **more}
    command = [sys.executable, "-c", CHILD, str(CONFIGS / f"{recipe}.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("TIMES ")), None)
    if line is None:
        raise RuntimeError(f"{case} failed:\n{done.stderr[-3000:]}")
    found = json.loads(line.removeprefix("TIMES "))
    (flow, stages, _), (again, _, recomputed) = found["times"]
    if recomputed:
        raise RuntimeError(f"{case}: the second run repeated {recomputed} stages")
    for metric, unit, value in (
        ("start", "s", found["start"]),
        ("flow", "s", flow),
        ("stages", "s", stages),
        ("overhead", "s", flow - stages),
        ("overhead share", "%", 100 * (flow - stages) / flow),
        ("repeat", "s", again),
    ):
        yield Row(case, "modelpress", metric, unit, value)


if __name__ == "__main__":
    main("orchestration", measure)
