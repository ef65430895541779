"""How several processes of pytest-xdist share the suite: which takes which files, and who reads which of them first.

Files that wait, for servers and for processes that they start, take turns with files that compute: all workers but the
last begin with the former, and the last with the latter. Else all of them would wait in the middle of the run, with a
Prefect server and an MLflow server for each, and compete for two cores in the rest of it.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

WAITING = (
    *("tests/integration/", "tests/docs/", "tests/faults/", "tests/infra/", "tests/stack/"),
    "tests/cli/test_doctor.py",
)


class Apart(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """`--dist loadfile`, but each worker prefers one kind of file; what is left over goes to whoever asks."""

    def _assign_work_unit(self, node: WorkerController) -> None:
        last = max(self.nodes, key=lambda one: int(one.gateway.id.removeprefix("gw")))  # they stand as they were ready
        computes = node is last
        liked = next((file for file in self.workqueue if file.startswith(WAITING) != computes), None)
        if liked is not None:
            self.workqueue.move_to_end(liked, last=False)
        super()._assign_work_unit(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Apart | None:
    """Ours, where files are shared out whole."""
    return Apart(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Import a worker's share of the whole suite, before it collects all.

    To rewrite the assertions of all files takes ten seconds of a core, unless it was done before; workers that go
    through the files in the same order each do it for all of them.
    """
    config = session.config
    worker: dict[str, Any] | None = getattr(config, "workerinput", None)
    if worker is None or config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    root = config.rootpath
    files = sorted(path for place in config.getini("testpaths") for path in (root / place).rglob("test_*.py"))
    for path in files[int(worker["workerid"].removeprefix("gw")) :: worker["workercount"]]:
        with suppress(Exception, pytest.skip.Exception):  # the collection tells of it
            importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
