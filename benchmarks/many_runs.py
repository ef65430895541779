"""Many small runs at a time on one Prefect server, on SQLite and on PostgreSQL: transitions per second, none lost.

One process runs 200 flows at a time, each with one task that does nothing, against a server of its own on loopback;
both share the cores with the database. Counted is what the server holds afterwards: the states of each flow run and of
each task run. `settled` is when the last of them is there (task runs reach the server as events, behind the flow).
A run is lost that is not there, not Completed, or lacks a state on the way.
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
from benchmarks._servers import QUIET, free_port, prefect_server
from tests.integration import postgres

RUNS = 200
CHILD = """
import asyncio, json, sys, time
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags, TaskRunFilter, TaskRunFilterId
from prefect.context import tags

EXPECTED = ["PENDING", "RUNNING", "COMPLETED"]
TAG = "many"

@task
async def nothing():
    pass

@flow
async def small():
    await nothing()

@flow
async def first():
    await nothing()

async def pages(read):
    found, size = [], 200
    while len(page := await read(size, len(found))) == size:
        found += page
    return found + page

async def missing(client, number):
    '''Runs of flows and of tasks that lack a state, and the states that are there.'''
    kinds = ("/flow_run_states/", "flow_run_id"), ("/task_run_states/", "task_run_id")
    of_flows = await pages(lambda limit, offset: client.read_flow_runs(
        flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[TAG])), limit=limit, offset=offset))
    ours = {run.id for run in of_flows}
    of_tasks = [run for run in await pages(lambda limit, offset: client.read_task_runs(limit=limit, offset=offset))
                if run.flow_run_id in ours]
    lost, states = 2 * number - len(of_flows) - len(of_tasks), 0
    for (path, key), found in zip(kinds, (of_flows, of_tasks)):
        for run in found:
            answer = await client._client.get(path, params={key: str(run.id)})
            names = [state["type"] for state in answer.json()]
            states += len(names)
            lost += not set(EXPECTED) <= set(names) or run.state.type.value != "COMPLETED"
    return lost, states

async def all_of_it(number):
    await first()
    started = time.perf_counter()
    with tags(TAG):
        results = await asyncio.gather(*(small() for _ in range(number)), return_exceptions=True)
    done = time.perf_counter() - started
    errors = [repr(result) for result in results if result is not None]
    async with get_client() as client:
        end = time.perf_counter() + 60
        while True:
            looked = time.perf_counter() - started
            lost, states = await missing(client, number)
            if not lost or time.perf_counter() > end:
                break
            await asyncio.sleep(0.2)
    print("FOUND", json.dumps({"done": done, "settled": looked, "lost": lost, "states": states, "errors": errors[:3],
                               "failed": len(errors)}))

asyncio.run(all_of_it(int(sys.argv[1])))
"""


def measure(quick: bool) -> Iterable[Row]:
    """Rows of SQLite, and of PostgreSQL where it is installed."""
    number = 20 if quick else RUNS
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        yield from _case("SQLite", number, Path(folder), {})
    if why := postgres.lacking():
        print(f"PostgreSQL: {why}", file=sys.stderr)
        yield Row(f"{number} runs at a time", "PostgreSQL", "flows done", "s", None)
        return
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder, postgres.running(free_port()) as address:
        url = address.replace("postgresql://", "postgresql+asyncpg://")
        yield from _case("PostgreSQL", number, Path(folder), {"PREFECT_API_DATABASE_CONNECTION_URL": url})


def _case(database: str, number: int, home: Path, more: dict[str, str]) -> Iterator[Row]:
    with prefect_server(home, more) as url:
        environment = {**os.environ, **QUIET, "PREFECT_HOME": str(home / "client"), "PREFECT_API_URL": url}
        command = [sys.executable, "-c", CHILD, str(number)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    if line is None:
        raise RuntimeError(f"{database} failed:\n{done.stderr[-3000:]}")
    found = json.loads(line.removeprefix("FOUND "))
    if found["errors"]:
        print(f"{database}: {found['errors']}", file=sys.stderr)
    for metric, unit, value in (
        ("flows done", "s", found["done"]),
        ("settled", "s", found["settled"]),
        ("state transitions", "1", found["states"]),
        ("transitions per second", "1/s", found["states"] / found["settled"]),
        ("runs failed", "1", found["failed"]),
        ("runs lost", "1", found["lost"]),
    ):
        yield Row(f"{number} runs at a time", database, metric, unit, value)


if __name__ == "__main__":
    main("many_runs", measure)
