"""MLflow's and Prefect's databases, migrated once for all processes of tests: from nothing, each takes seconds."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Databases:
    """Templates of empty databases, in a folder that all processes of this run of tests share."""

    folder: Path

    @contextmanager
    def ready(self, kind: str, path: Path) -> Iterator[None]:
        """Start in this context what keeps its SQLite database of `kind` at `path`.

        The first one of a kind migrates it from nothing, while the others wait; they get a copy of what came out.
        Whoever starts looks at the version of what it finds, as always.
        """
        template = self.folder / f"{kind}.db"
        with (self.folder / f"{kind}.lock").open("w") as lock, contextlib.ExitStack() as held:
            fcntl.flock(lock, fcntl.LOCK_EX)
            held.callback(fcntl.flock, lock, fcntl.LOCK_UN)
            if template.exists():
                shutil.copyfile(template, path)
                held.close()
            yield
            if not template.exists():
                _copy(path, template)

    def seed(self, kind: str, path: Path) -> None:
        """Put a migrated database there if one of its kind was made by now; else whoever starts there makes it."""
        template = self.folder / f"{kind}.db"
        if template.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(template, path)

    def mlflow(self, folder: Path) -> str:
        """The address of an MLflow database of one's own, `mlflow.db` in `folder`."""
        from mlflow import MlflowClient  # seconds, which most tests don't need

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "mlflow.db"
        address = f"sqlite:///{path}"
        with self.ready("mlflow", path):
            MlflowClient(address, address).search_experiments(max_results=1)
        return address


def _copy(path: Path, template: Path) -> None:
    """Copy a database that may be in use."""
    part = template.with_suffix(".part")
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(part)) as target:
        source.backup(target)
        target.execute("PRAGMA journal_mode=DELETE")  # all of it in one file
    part.replace(template)
