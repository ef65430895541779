"""How far each pointer's log was seen: what a store that lost, or gave back, its newest entries cannot undo.

One small file per alias in the home folder. It is for readers with a trust file: they alone can tell an entry that was
forged from one that was written.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelpress import keys, strictjson
from modelpress.errors import CorruptionError
from modelpress.manifest import Sha256
from modelpress.store.local import local_errors

MAX_BYTES = 2**16


class Mark(BaseModel):
    """The newest entry that was seen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str
    name: str
    alias: str
    number: int = Field(ge=1)
    entry: Sha256
    """sha256 (hex) of the entry's bytes."""


@dataclass(frozen=True)
class Seen:
    """The marks of one home folder."""

    folder: Path

    def read(self, store: str, name: str, alias: str) -> Mark | None:
        """The mark of a log; None where it was never seen.

        Raises:
            CorruptionError: the file is no mark of this log.
            StoreError: it can't be read.
        """
        path = self._path(store, name, alias)
        doing = f"reading {path}, how far {name}@{alias} was seen"
        fix = "look at the log with `modelpress history`; if it is right, `modelpress trust forget` starts anew"
        with local_errors(doing):
            if not path.exists():
                return None
            data = path.read_bytes()[:MAX_BYTES]
        try:
            mark = Mark.model_validate(strictjson.loads(data, doing))
        except ValidationError as error:
            raise CorruptionError(doing, found=str(error.errors(include_url=False)[0]), fix=fix) from error
        if (mark.store, mark.name, mark.alias) != (store, name, alias):
            found = f"the mark of {mark.name}@{mark.alias} in {mark.store}"
            raise CorruptionError(doing, found=found, fix=fix)
        return mark

    def note(self, mark: Mark) -> None:
        """Keep a mark, unless a later one is kept already.

        Two processes that note at the same moment may leave the earlier one; the next reading mends that.

        Raises:
            StoreError: it can't be written; nothing is used whose mark is not kept.
        """
        before = self.read(mark.store, mark.name, mark.alias)
        if before is not None and before.number >= mark.number:
            return
        path = self._path(mark.store, mark.name, mark.alias)
        partial = path.with_name(f".{uuid.uuid4().hex}.partial")
        with local_errors(f"writing {path}, how far {mark.name}@{mark.alias} was seen", writing=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("xb") as file:
                    file.write(mark.model_dump_json().encode())
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def forget(self, store: str, name: str, alias: str) -> bool:
        """Drop a mark: the log counts as it is at the next reading. True: there was one."""
        path = self._path(store, name, alias)
        with local_errors(f"removing {path}"):
            there = path.exists()
            path.unlink(missing_ok=True)
        return there

    def _path(self, store: str, name: str, alias: str) -> Path:
        keys.pointers(name, alias)  # refuses names that would lead elsewhere
        return self.folder / hashlib.sha256(store.encode()).hexdigest()[:16] / f"{name}@{alias}.json"
