"""What a stack's folder holds: what was chosen, how the parts are, and the lock against a second supervisor."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelpress.errors import ConfigError, SetupError

Status = Literal["waiting", "starting", "healthy", "unhealthy", "backing off", "gave up", "done", "stopped"]
Phase = Literal["starting", "up", "stopping", "stopped", "failed"]

Document = TypeVar("Document", bound=BaseModel)


class Chosen(BaseModel):
    """`stack.json`: what was chosen at the first start and is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    identity: str = Field(default_factory=lambda: secrets.token_hex(8))
    """Marks the processes of this stack."""
    host: str = "127.0.0.1"
    """Address that every part listens on, and is reached at."""
    ports: dict[str, int] = {}
    """By part."""
    checkout: str = ""
    """The clone that holds flows/ and infra/."""
    store: str = ""
    """Where packs are published; empty: the stack's own S3 server."""
    deployed: str = ""
    """Digest of the deployments that the Prefect server was given."""


class PartState(BaseModel):
    """How a part is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    status: Status
    pid: int | None = None
    address: str = ""
    since: datetime = Field(default_factory=lambda: datetime.now(UTC))
    """When it came to this status."""
    restarts: int = 0
    why: str = ""
    """What is wrong, if anything."""


class State(BaseModel):
    """`state.json`: how the stack is, by its supervisor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: Phase
    pid: int
    """The supervisor's."""
    parts: list[PartState]
    why: str = ""
    """Of a start that failed: the part, and its log's last lines."""

    @property
    def healthy(self) -> bool:
        """Whether every part is."""
        return self.phase == "up" and all(part.status in ("healthy", "done") for part in self.parts)


class Folder:
    """The places in a stack's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self.chosen, self.state, self.lock = (self.path / name for name in ("stack.json", "state.json", "lock"))
        self.keys, self.logs, self.empty = (self.path / name for name in ("keys", "logs", "run"))

    def make(self) -> None:
        """Make what is missing, for this user alone.

        Raises:
            SetupError: it can't be made or written, or belongs to something else.
        """
        doing = f"making the stack's folder {self.path}"
        try:
            ours = {"lock", *(folder.name for folder in (self.keys, self.logs, self.empty))}
            foreign = self.path.is_dir() and any(item.name not in ours for item in self.path.iterdir())
            if foreign and not self.chosen.is_file():
                raise SetupError(
                    doing,
                    found="a folder with something in it that is no stack's",
                    fix="choose a new one with --folder or MODELPRESS_STACK",
                )
            for folder in (self.path, self.keys, self.logs, self.empty):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)
        except OSError as error:
            raise SetupError(
                doing, found=str(error), expected="a folder that this user may write", fix="give --folder another"
            ) from error

    def log(self, part: str) -> Path:
        """Where a part's output goes."""
        return self.logs / f"{part}.log"

    def read_chosen(self) -> Chosen | None:
        """What was chosen; None before the first start.

        Raises:
            ConfigError: the file is damaged.
        """
        return _read(self.chosen, Chosen)

    def read_state(self) -> State | None:
        """The supervisor's last words; None before the first start.

        Raises:
            ConfigError: the file is damaged.
        """
        return _read(self.state, State)

    @contextlib.contextmanager
    def locked(self, seconds: float = 0.0) -> Iterator[int | None]:
        """The lock's file descriptor, or None where another has it for so long. Who inherits it has it, too."""
        try:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SetupError(f"locking the stack's folder {self.path}", found=str(error)) from error
        try:
            yield descriptor if _locked(descriptor, time.monotonic() + seconds) else None
        finally:
            os.close(descriptor)

    def is_held(self) -> bool:
        """Whether somebody starts or supervises this stack now."""
        if not self.lock.exists():
            return False
        with self.locked() as lock:
            return lock is None


def _locked(descriptor: int, end: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        else:
            return True


def write(path: Path, text: str) -> None:
    """Write a file of mode 0600 whole or not at all.

    Raises:
        OSError: the disk is full, or the folder can't be written; what was there stays.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read(path: Path, kind: type[Document]) -> Document | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"reading {path}",
            found=str(error),
            expected="what `modelpress up` writes there",
            fix="`modelpress down --delete` removes the stack with its data",
        ) from error
