"""What a killed run costs: `python -m benchmarks.recovery [--quick]`.

A small line with three trainings runs as a deployment, on a Prefect server, an MLflow server and a process worker of
this benchmark's own. Its process kills itself with SIGKILL: before and behind the record of each stage and of each
evaluation (inside a stage whose work is done, and between two), in the middle of each training, and before the first
write of each kind in the publication. Each time the worker sees it and the run starts again by its tag. At the end the
pack must be the one of a run that nobody disturbed, no stage may stand recorded twice, and nothing may say that it
still runs; else it fails.

Times are seconds from the kill. `running` is the new process beginning the flow; `resumed` is the interrupted stage, or
the one behind the boundary, running again: the stages before it were looked up by then. State is kept after each update
here, so no update is repeated; with the default setting, up to a minute's worth is.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import UUID

from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType

from benchmarks._report import Row, main
from registry import leftovers
from tests.integration.conftest import QUIET, free_port, serving
from tests.integration.killing import CONFIG, Place, Server, prefect_at, wait_for

Kill = tuple[str, str, int]
KILLS_PER_RUN = 15
"""A tag lets a run start again twenty times at most; further kills meet another run, over stores of its own."""


def measure(quick: bool) -> Iterable[Row]:
    """Rows by where the process was killed, and what was left at the end."""
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder, ExitStack() as stack:
        home = Path(folder)
        mlflow, server = _servers(home, stack)
        environment = {**QUIET, "PREFECT_API_URL": server.url, "MODELPRESS_TRACKING_URI": mlflow}
        calm = Place(home / "calm", environment)
        client = stack.enter_context(prefect_at(server.url))
        stack.callback(calm.close)
        calm.start_worker_for(client)
        _finish(client, client.create_flow_run_from_deployment(calm.deployment).id)
        (expected,) = calm.published()
        order = [line.split()[1] for line in (calm.home / "writes.log").read_text().splitlines()]
        calm.close()
        kills = _quick() if quick else _kills(order)
        found: list[tuple[Kill, list[float]]] = []
        places: list[Place] = []
        for start in range(0, len(kills), KILLS_PER_RUN):
            some = kills[start : start + KILLS_PER_RUN]
            place = Place(home / f"killed-{start}", environment)
            stack.callback(place.close)
            place.start_worker_for(client, KILLS_PER_RUN)
            place.order(*some)
            run = client.create_flow_run_from_deployment(place.deployment).id
            _finish(client, run)
            found += zip(some, _times(client, mlflow, place, run, len(some)), strict=True)
            places.append(place)
            place.close()
        yield from _rows(found)
        yield from _left(client, mlflow, places, expected, order, len(kills))


def _servers(home: Path, stack: ExitStack) -> tuple[str, Server]:
    (home / "mlflow").mkdir()
    (home / "server").mkdir()
    port = free_port()
    command = [
        *("mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{home}/mlflow/mlflow.db"),
        *("--artifacts-destination", str(home / "mlflow" / "artifacts")),
    ]
    stack.enter_context(serving(command, f"http://127.0.0.1:{port}/health", home / "mlflow", {}))
    server = Server(home / "server", free_port(), QUIET)
    server.start()
    stack.callback(server.kill)
    return f"http://127.0.0.1:{port}", server


def _quick() -> list[Kill]:
    return [("after", "training/source/", 7), ("before", "stages/distill/", 1), ("before", "packs/", 1)]


def _kills(order: list[str]) -> list[Kill]:
    """Where to strike, in the order in which an undisturbed run writes."""
    kills: list[Kill] = []
    for number, key in enumerate(order):
        kind = "/".join(key.split("/")[:2]) + "/"
        publishing = any(one.startswith("uploads/") for one in order[: number + 1])
        if key.startswith("training/"):
            states = [one for one in order if one.startswith(kind)]
            if order.index(key) == number and order[number - 1] != key:
                kills.append(("after", kind, len(states) // 2))
        elif key.startswith("stages/"):
            kills += [("before", kind, 1), ("after", kind, 1)]
        elif publishing and (strike := ("before", key.split("/")[0] + "/", 1)) not in kills:
            kills.append(strike)  # once each: how many blobs are left to send at a restart is the threads' affair
    return kills


def _finish(client: SyncPrefectClient, run: UUID) -> None:
    found = wait_for(client, run, "Completed", "Failed", seconds=3600)
    if found.state_name != "Completed":
        raise RuntimeError(f"the run did not come back: {found.state!r}")


def _times(client: SyncPrefectClient, mlflow: str, place: Place, run: UUID, kills: int) -> Iterator[list[float]]:
    """For each kill of a run: seconds to Crashed, to Running, and to the resumed stage; NaN where none was left."""
    deaths = [float(line.split()[0]) for line in (place.home / "deaths.log").read_text().splitlines()][-kills:]
    states = sorted(client.read_flow_run_states(run), key=lambda state: state.timestamp)
    api = MlflowClient(mlflow, mlflow)
    experiment = api.get_experiment_by_name(CONFIG.name)
    if experiment is None:
        raise RuntimeError(f"no experiment {CONFIG.name!r} in MLflow")
    condition = f"tags.`{leftovers.FLOW_RUN_TAG}` = '{run}'"
    starts = api.search_runs([experiment.experiment_id], condition, order_by=["attributes.start_time ASC"])
    if len(starts) != kills + 1:
        raise RuntimeError(f"{len(starts)} starts for {kills} kills")
    for death, start in zip(deaths, starts[1:], strict=True):
        parent = f"tags.`mlflow.parentRunId` = '{start.info.run_id}'"
        stages = api.search_runs([experiment.experiment_id], parent, order_by=["attributes.start_time ASC"])
        # Behind the last record nothing is left to run.
        resumed = next(
            (one.info.start_time / 1000 for one in stages if one.data.tags.get("reused") != "true"), math.nan
        )
        later = [(state.type, state.timestamp.timestamp()) for state in states if state.timestamp.timestamp() > death]
        yield [
            next(at for kind, at in later if kind == StateType.CRASHED) - death,
            next(at for kind, at in later if kind == StateType.RUNNING) - death,
            resumed - death,
        ]


def _rows(found: list[tuple[Kill, list[float]]]) -> Iterator[Row]:
    cases: dict[str, list[list[float]]] = {}
    for (when, key, _), times in found:
        if key.startswith("training/"):
            case = "inside a training"
        elif key.startswith("stages/"):
            case = "inside a stage" if when == "before" else "between two stages"
        else:
            case = "while publishing"
        cases.setdefault(case, []).append(times)
    for case, rows in cases.items():
        yield Row("seconds from kill -9", case, "kills", "", len(rows))
        for name, column in zip(("noticed", "running", "resumed"), zip(*rows, strict=True), strict=True):
            values = [value for value in column if not math.isnan(value)]
            yield Row("seconds from kill -9", case, f"{name}, median", "s", statistics.median(values))
            yield Row("seconds from kill -9", case, f"{name}, max", "s", max(values))


def _left(
    client: SyncPrefectClient, mlflow: str, places: list[Place], expected: str, order: list[str], kills: int
) -> Iterator[Row]:
    """What there is at the end, checked."""
    writes = [[line.split()[1] for line in (place.home / "writes.log").read_text().splitlines()] for place in places]
    records = [Counter(key for key in keys if key.startswith("stages/")) for keys in writes]
    updates, undisturbed = (
        sum(key.startswith("training/") for keys in many for key in keys) for many in (writes, [order] * len(places))
    )
    states = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    open_runs = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)))
    )
    figures = {
        "kills": kills,
        "packs beside the undisturbed one's": sum(len(set(place.published()) ^ {expected}) for place in places),
        "records written twice": sum(sum(one.values()) - len(one) for one in records),
        "states of trainings written twice": updates - undisturbed,
        "flow runs that say Running": len(open_runs),
        "MLflow runs that say RUNNING": len(list(leftovers.still_open(MlflowClient(mlflow, mlflow)))),
        "kills that never came": sum(len(json.loads((place.home / "kill.json").read_text())) for place in places),
    }
    for metric, value in figures.items():
        yield Row("what is left", "modelpress", metric, "", value)
    wrong = {name: value for name, value in figures.items() if name != "kills" and value}
    if wrong:
        raise RuntimeError(f"after {kills} kills: {wrong}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main("recovery", measure)
