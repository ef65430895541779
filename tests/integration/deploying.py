"""The documented commands that deploy `infra/prefect.yaml`, with the arguments that a user types."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests import warm
from tests.conftest import ROOT


def prefect(*arguments: str, **environment: str) -> str:
    """Run Prefect's command line in the clone's root; what it printed."""
    env = {**os.environ, **environment}
    done = warm.flows().run(*arguments, program=warm.PREFECT, env=env, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def make_pools(*names: str) -> None:
    """Make work pools for processes; one that is there gets the template again."""
    template = str(ROOT / "infra/pools/process.json")
    for name in names:
        prefect("work-pool", "create", name, "--type", "process", "--base-job-template", template, "--overwrite")


def deploy(*which: str) -> None:
    """Deploy some of the file's deployments by name, or `--all`."""
    chosen = ["--all"] if which == ("--all",) else [part for name in which for part in ("--name", name)]
    prefect("--no-prompt", "deploy", *chosen, "--prefect-file", "infra/prefect.yaml")


@contextmanager
def worker(pool: str, home: Path, **environment: str) -> Iterator[Path]:
    """A process worker of a pool, as it is started by hand; its log."""
    env = {**os.environ, **environment}
    log = home / f"{pool}.log"
    with log.open("ab") as output:
        command = ("worker", "start", "--pool", pool)
        running = warm.flows().start(*command, program=warm.PREFECT, env=env, cwd=ROOT, output=output)
    try:
        yield log
    finally:
        _end(running)


def _end(running: warm.Process) -> None:
    """Kill a process and all that it started. A worker that is asked to end first waits for the runs that it has."""
    with suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(running.pid).children(recursive=True), running]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    running.wait()


@contextmanager
def at_home(home: Path, prefect_server: str, mlflow_server: str) -> Iterator[None]:
    """Flows of this process, and workers that it starts, keep their stores below `home` and use these servers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELPRESS_HOME", str(home))
        patch.setenv("MODELPRESS_TRACKING_URI", mlflow_server)
        patch.setenv("PREFECT_API_URL", prefect_server)
        patch.setenv("PREFECT_HOME", str(home / "prefect"))
        patch.setenv("PYTHONPATH", str(ROOT))
        for name in ("MODELPRESS_CHECKOUT", "MODELPRESS_STORE", "MODELPRESS_WORK"):
            patch.delenv(name, raising=False)
        yield
