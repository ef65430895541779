"""Which worker takes which files of tests, where pytest-xdist has several.

Files that wait, for servers and for processes that they start, take turns with files that compute: all workers but the
last begin with the former, and the last with the latter. Else all of them would wait in the middle of the run, with a
Prefect server and an MLflow server for each, and compete for two cores in the rest of it.
"""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

WAITING = (
    *("tests/integration/", "tests/docs/", "tests/faults/", "tests/infra/", "tests/stack/"),
    "tests/cli/test_doctor.py",
)


class Apart(LoadFileScheduling):
    """`--dist loadfile`, but each worker prefers one kind of file; what is left over goes to whoever asks."""

    def _assign_work_unit(self, node: WorkerController) -> None:
        computes = node is self.nodes[-1]
        liked = next((file for file in self.workqueue if file.startswith(WAITING) != computes), None)
        if liked is not None:
            self.workqueue.move_to_end(liked, last=False)
        super()._assign_work_unit(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Apart | None:
    """Ours, where files are shared out whole."""
    return Apart(config, log) if config.getvalue("dist") == "loadfile" else None
