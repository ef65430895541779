"""The loop that keeps the parts: start in order, look after, start again, give up, stop in reverse order.

One thread, one loop; a look at a part's health waits `LOOK_SECONDS` at most. What it knows stands in `state.json` after
each change, for `status` and for `up`, which waits for it.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from modelpress.stack import processes
from modelpress.stack.layout import Folder, PartState, Phase, State, Status, write
from modelpress.stack.processes import MARK

SUPERVISOR = "supervisor"
"""Its log, and its part in the mark."""
TAIL_LINES = 15
LOOK_SECONDS = 3.0
"""How long a part may take to answer."""


@dataclass(frozen=True)
class Part:
    """One program of the stack."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """All of it; the mark is added."""
    needs: tuple[str, ...] = ()
    """Parts that are healthy before it starts."""
    health: str = ""
    """Address that answers with a status below 500 once it can be used; empty: it is healthy while it runs."""
    address: str = ""
    """What a user is told."""
    orphans_end: bool = True
    """Whether what a program leaves when it dies is ended before it starts again: it may hold the port. Else it goes
    on, until a stop."""
    once: bool = False
    """It does its work and ends with 0, and is not started again."""
    start_seconds: float = 300.0
    """How long it may take to become healthy, or, where `once`, to end."""
    stop_seconds: float = 30.0
    """How long it may take to end when it is asked to."""


@dataclass(frozen=True)
class Policy:
    """How patient the supervisor is."""

    turn_seconds: float = 0.2
    look_seconds: float = 5.0
    """Between two looks at a healthy part."""
    unhealthy_looks: int = 24
    """Failed looks in a row after which a part that runs is ended and started again."""
    first_wait_seconds: float = 1.0
    """Before the first restart; it doubles with each one in the window."""
    most_wait_seconds: float = 30.0
    deaths: int = 5
    window_seconds: float = 300.0
    """A part that died `deaths` times in so many seconds is given up."""
    log_bytes: int = 8 * 2**20
    """A log is cut when it is larger; one older piece is kept."""


class Keeper:
    """One part, and what the supervisor remembers of it."""

    def __init__(self, part: Part, folder: Folder, identity: str, policy: Policy) -> None:
        self.part, self._folder, self._policy = part, folder, policy
        self.mark = f"{identity}/{part.name}"
        self.state = PartState(name=part.name, status="waiting", address=part.address)
        self._process: subprocess.Popen[bytes] | None = None
        self._deaths: deque[float] = deque()
        self._next_look = self._failed_looks = 0.0
        self._until = 0.0
        """End of the time to become healthy, or of the wait before a restart."""

    @property
    def settled(self) -> bool:
        """What needs this part may start."""
        return self.state.status in ("healthy", "done")

    def become(self, status: Status, why: str = "", **changes: object) -> None:
        """Note a change of status."""
        changed = {"status": status, "why": why, "since": datetime.now(UTC), **changes}
        self.state = self.state.model_copy(update=changed)
        print(f"{_now()} {self.part.name}: {status}{f', {why}' if why else ''}", flush=True)

    def start(self) -> None:
        """Start the program; one that can't be started counts as one that died."""
        now = time.monotonic()
        environment = {**self.part.environment, MARK: self.mark}
        try:
            log = self._folder.log(self.part.name)
            self._process = processes.spawn(self.part.command, environment, log, self._folder.empty)
        except OSError as error:
            self._process = None
            self._died(f"it can't be started: {error}")
            return
        self._until, self._next_look, self._failed_looks = now + self.part.start_seconds, now, 0
        self.become("starting", pid=self._process.pid)

    def turn(self) -> None:
        """Look whether it lives and is well, and do what follows."""
        now = time.monotonic()
        if self.state.status == "backing off" and now >= self._until:
            self.state = self.state.model_copy(update={"restarts": self.state.restarts + 1})
            self.start()
        elif self._process is not None and (code := self._process.poll()) is not None:
            self._ended(code)
        elif self._process is not None and now >= self._next_look:
            self._look(now)

    def stop(self) -> None:
        """End the program and all that it started."""
        process, self._process = self._process, None
        if process is not None:
            if process.stdin:
                process.stdin.close()
            process.terminate()
            try:
                process.wait(self.part.stop_seconds)
            except subprocess.TimeoutExpired:
                print(f"{_now()} {self.part.name}: did not end in {self.part.stop_seconds:g} s, killed", flush=True)
                process.kill()
                process.wait()
        processes.end_all(self.mark, 5.0)
        if self.state.status not in ("gave up", "done"):
            self.become("stopped", pid=None)

    def _look(self, now: float) -> None:
        answer = "" if not self.part.health or self.part.once else _answer(self.part.health)
        if self.part.once or answer:
            if self.state.status == "starting":
                self._next_look = now + self._policy.turn_seconds
                if now > self._until:
                    self._kill(f"not {'done' if self.part.once else 'healthy'} after {self.part.start_seconds:g} s")
                return
            self._failed_looks += 1
            self._next_look = now + self._policy.look_seconds
            if self.state.status == "healthy":
                self.become("unhealthy", answer)
            if self._failed_looks >= self._policy.unhealthy_looks:
                self._kill(f"unhealthy: {answer}")
            return
        self._failed_looks, self._next_look = 0, now + self._policy.look_seconds
        if self.state.status != "healthy":
            self.become("healthy")

    def _kill(self, why: str) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._died(why)

    def _ended(self, code: int) -> None:
        if self.part.once and code == 0:
            self._process = None
            self.become("done", pid=None)
            return
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._died(how)

    def _died(self, why: str) -> None:
        now = time.monotonic()
        if self._process is not None and self._process.stdin:
            self._process.stdin.close()
        if self.part.orphans_end:
            processes.end_all(self.mark, 2.0)
        self._process = None
        self._deaths.append(now)
        while self._deaths[0] < now - self._policy.window_seconds:
            self._deaths.popleft()
        if self.part.once or len(self._deaths) >= self._policy.deaths:
            times = f"{len(self._deaths)} times in {self._policy.window_seconds / 60:g} min, the last time: "
            self.become("gave up", why if self.part.once else times + why, pid=None)
            return
        wait = min(self._policy.first_wait_seconds * 2 ** (len(self._deaths) - 1), self._policy.most_wait_seconds)
        self._until = now + wait
        self.become("backing off", f"{why}; starts again in {wait:g} s", pid=None)


class Supervisor:
    """Keeps parts until it is told to stop (SIGTERM or SIGINT).

    Args:
        folder: the stack's; its lock is held by the caller.
        identity: marks the processes.
        parts: in an order in which each comes after what it needs.
        policy: how patient to be.
    """

    def __init__(self, folder: Folder, identity: str, parts: Sequence[Part], policy: Policy | None = None) -> None:
        self._folder, self._policy = folder, policy or Policy()
        self._keepers = [Keeper(part, folder, identity, self._policy) for part in parts]
        self._phase: Phase = "starting"
        self._why = ""
        self._stopping = False
        self._written = self._trouble = ""

    def run(self) -> bool:
        """Start, keep and stop the parts; False where the start failed, and then nothing runs any more."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask_to_stop)
        self._say("starting")
        try:
            while not self._stopping and not self._why:
                self._turn()
                time.sleep(self._policy.turn_seconds)
        finally:  # also where this very code is wrong: no part outlives it
            self._say("stopping")
            for keeper in reversed(self._keepers):
                keeper.stop()
                self._note()
            self._say("failed" if self._why else "stopped")
        return not self._why

    def _turn(self) -> None:
        for keeper in self._keepers:
            if self._stopping:
                return
            if keeper.state.status == "waiting":
                if all(other.settled for other in self._keepers if other.part.name in keeper.part.needs):
                    keeper.start()
            else:
                keeper.turn()
            self._note()
            cut(self._folder.log(keeper.part.name), self._policy.log_bytes)
        cut(self._folder.log(SUPERVISOR), self._policy.log_bytes)
        if self._phase == "starting":
            lost = [one for one in self._keepers if one.state.status in ("backing off", "gave up")]
            if lost:
                self._fail(lost[0])
            elif all(keeper.settled for keeper in self._keepers):
                self._say("up")

    def _fail(self, keeper: Keeper) -> None:
        why = keeper.state.why.partition("; starts again")[0]
        log = self._folder.log(keeper.part.name)
        self._why = f"{keeper.part.name}: {why}\n{log}:\n{tail(log, TAIL_LINES)}"
        keeper.become("gave up", why)

    def _ask_to_stop(self, *_: object) -> None:
        self._stopping = True

    def _say(self, phase: Phase) -> None:
        self._phase = phase
        print(f"{_now()} {phase}", flush=True)
        self._note()

    def _note(self) -> None:
        """Write the state where it changed. A full disk must not end what runs: it is tried again at each turn."""
        parts = [keeper.state for keeper in self._keepers]
        text = State(phase=self._phase, pid=os.getpid(), parts=parts, why=self._why).model_dump_json(indent=2)
        if text == self._written:
            return
        try:
            write(self._folder.state, text)
            self._written = text
        except OSError as error:
            if self._trouble != str(error):
                print(f"{_now()} {self._folder.state} can't be written: {error}", flush=True)
            self._trouble = str(error)


def cut(log: Path, most: int) -> None:
    """Move a log aside that is larger; who writes it goes on at its new end. A full disk is tried again."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > most:
            shutil.copyfile(log, log.with_suffix(".log.1"))
            os.truncate(log, 0)


def tail(log: Path, lines: int) -> str:
    """The last lines of a log; empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 2**16 - 200 * lines))
            found = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(found[-lines:]) if lines else ""


def _answer(address: str) -> str:
    """What is wrong with the answer from there; empty: nothing."""
    try:
        with _OPENER.open(address, timeout=LOOK_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        return "" if error.code < 500 else f"{address} answers with status {error.code}"
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        return f"{address} does not answer: {reason}"


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Without proxies: what is looked at is on this machine."""


def _now() -> str:
    return datetime.now(UTC).isoformat(" ", "seconds")
