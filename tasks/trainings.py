"""Trainings under way: `training/<stage>/<key>/<number>` in the work store, until the stage is recorded.

In the work store, and not on a disk of the machine, because whoever goes on with a run may be another machine; its
objects are whole or not there. The key is the stage's own: what decides its output decides where its trainings lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prefect.logging import get_run_logger

from modelpress.errors import StoreError
from modelpress.parallel.states import States
from modelpress.settings import Settings
from modelpress.store.base import Store
from tasks.records import find_record

FOLDER = "training/"
RESUMED_TAG = "resumed"
"""Tag of a stage's MLflow run: what its trainings found of an earlier one's."""


class StageShelf:
    """A `modelpress.resume.Shelf` for one stage."""

    def __init__(self, store: Store, stage: str, key: str, settings: Settings, tag: Callable[[str, str], None]) -> None:
        self.stage, self.key, self.seconds = stage, key, settings.training_seconds
        self._store, self._reuse, self._tag = store, settings.reuse, tag
        self._saved = False
        self._told: list[str] = []

    def load(self, number: int) -> bytes | None:
        """The state that an earlier run left; None where none did, and where nothing is reused."""
        place = self._place(number)
        if not self._reuse or self._store.info(place) is None:
            return None
        self._saved = True
        return self._store.get(place)

    def save(self, number: int, data: bytes) -> None:
        """Keep a state. A store that refuses it costs what it would have saved, and not the training."""
        try:
            self._store.put(self._place(number), data)
        except StoreError as error:
            get_run_logger().warning(
                "%s: the training's state was not kept; killed now, it would repeat what it did since the last: %s",
                self.stage,
                error,
                extra={"stage": self.stage},
            )
        else:
            self._saved = True

    def lend(self) -> States:
        """The place of this shelf's states, for ranks that keep and find them there themselves."""
        self._saved = True
        return States(store=self._store.uri, prefix=self._place(""), seconds=self.seconds, reuse=self._reuse)

    def tell(self, text: str) -> None:
        """In the log, and as a tag of the stage's run."""
        get_run_logger().warning("%s: %s", self.stage, text, extra={"stage": self.stage})
        self._told.append(text)
        self._tag(RESUMED_TAG, "; ".join(self._told))

    def clear(self) -> None:
        """Remove what is kept: the stage is recorded."""
        if not self._saved:
            return
        for info in list(self._store.list(f"{FOLDER}{self.stage}/{self.key}/")):
            self._store.delete(info.key)

    def _place(self, number: int | str) -> str:
        return f"{FOLDER}{self.stage}/{self.key}/{number}"


def clear_finished(store: Store) -> Iterator[str]:
    """Remove states of stages that are recorded, which a run left that was killed between the two; their keys."""
    kept = list(store.list(FOLDER))
    for stage, key in sorted({tuple(info.key.split("/")[1:3]) for info in kept if info.key.count("/") == 3}):
        if find_record(store, stage, key) is not None:
            for info in kept:
                if info.key.startswith(f"{FOLDER}{stage}/{key}/"):
                    store.delete(info.key)
                    yield info.key
