"""The supervisor over real processes: order, death, patience, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from modelpress.stack import control, processes
from modelpress.stack.layout import PartState, State, write
from tests.stack.conftest import DEADLINE_SECONDS, Bench

SLEEP = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
)
PARENT = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], start_new_session=True)
print("ready", flush=True)
time.sleep(600)
"""


def part(state: State, name: str) -> PartState:
    (found,) = [one for one in state.parts if one.name == name]
    return found


def gone(bench: Bench) -> bool:
    end = time.monotonic() + DEADLINE_SECONDS
    while bench.left() and time.monotonic() < end:
        time.sleep(0.02)
    return not bench.left()


def test_parts_start_after_what_they_need_and_stop_in_reverse_order(bench: Bench) -> None:
    once = bench.program(
        "prepare", f"open({str(bench.notes)!r}, 'a').write('once prepare\\n')", needs=("a",), once=True
    )
    bench.start(bench.server("a"), once, bench.server("b", needs=("prepare",)))
    state = bench.wait(lambda state: state.phase == "up")
    assert state.healthy
    assert [one.status for one in state.parts] == ["healthy", "done", "healthy"]
    assert bench.folder.state.stat().st_mode & 0o777 == 0o600
    assert bench.stop() == 0
    assert bench.noted() == ["start a", "once prepare", "start b", "stop b", "stop a"]
    assert bench.left() == []
    state = bench.wait(lambda state: state.phase == "stopped")
    assert not state.healthy
    assert [one.pid for one in state.parts] == [None, None, None]


def test_what_dies_is_started_again_and_the_rest_goes_on(bench: Bench) -> None:
    bench.start(bench.server("a"), bench.server("b", needs=("a",)))
    before = bench.wait(lambda state: state.phase == "up")
    killed = part(before, "a").pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    state = bench.wait(lambda state: part(state, "a").restarts == 1 and state.healthy)
    assert part(state, "a").pid != killed
    assert part(state, "b").pid == part(before, "b").pid
    assert "a: backing off, ended by SIGKILL; starts again in" in bench.said


def test_what_dies_again_and_again_is_given_up_with_growing_waits(bench: Bench) -> None:
    first = bench.path / "first"
    code = f"""
import pathlib, sys, time
first = pathlib.Path({str(first)!r})
if first.exists():
    sys.exit(9)
first.touch()
time.sleep(600)
"""
    bench.start(bench.program("weak", code), bench.server("strong"), deaths=4)
    state = bench.wait(lambda state: state.phase == "up")
    pid = part(state, "weak").pid
    assert pid is not None
    while not first.exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    state = bench.wait(lambda state: part(state, "weak").status == "gave up")
    assert part(state, "weak").why == "4 times in 5 min, the last time: ended with exit code 9"
    assert part(state, "weak").restarts == 3
    waits = [line.rpartition(" in ")[2] for line in bench.said.splitlines() if "weak: backing off" in line]
    assert waits == ["0.05 s", "0.1 s", "0.2 s"]
    assert state.phase == "up"
    assert not state.healthy
    assert part(state, "strong").status == "healthy"
    assert bench.stop() == 0


@pytest.mark.parametrize(
    ("code", "options", "why"),
    [
        ("import sys; print('no database'); sys.exit(7)", {"health": "http://127.0.0.1:9/"}, "ended with exit code 7"),
        (SLEEP, {"health": "http://127.0.0.1:9/", "start_seconds": 0.5}, "not healthy after 0.5 s"),
        (SLEEP, {"once": True, "start_seconds": 0.5}, "not done after 0.5 s"),
        (STUBBORN, {"health": "http://127.0.0.1:9/", "start_seconds": 0.5}, "not healthy after 0.5 s"),
    ],
)
def test_a_start_that_fails_says_which_part_and_leaves_nothing(
    bench: Bench, code: str, options: dict[str, object], why: str
) -> None:
    bench.start(
        bench.server("a"), bench.program("bad", code, needs=("a",), **options), bench.server("c", needs=("bad",))
    )
    assert bench.process is not None
    assert bench.process.wait(DEADLINE_SECONDS) == 3
    state = bench.wait(lambda state: state.phase == "failed")
    assert state.why.startswith(f"bad: {why}\n{bench.folder.log('bad')}:\n")
    assert bench.left() == []
    assert bench.noted() == ["start a", "stop a"]
    if "database" in code:
        assert state.why.endswith("no database")


def test_a_program_that_is_not_there_fails_the_start(bench: Bench) -> None:
    bench.start({"name": "lost", "command": ["/nowhere/program"], "environment": {}})
    state = bench.wait(lambda state: state.phase == "failed")
    assert "lost: it can't be started" in state.why
    assert "/nowhere/program" in state.why


def test_what_runs_and_is_ill_for_long_is_started_again(bench: Bench) -> None:
    bench.start(bench.server("a"), unhealthy_looks=3)
    before = bench.wait(lambda state: state.phase == "up")
    sick = bench.path / "a.sick"
    sick.touch()
    state = bench.wait(lambda state: part(state, "a").status == "unhealthy")
    assert "status 503" in part(state, "a").why
    assert not state.healthy
    bench.wait(lambda state: part(state, "a").restarts == 1)
    sick.unlink()
    state = bench.wait(lambda state: state.healthy)
    assert part(state, "a").pid != part(before, "a").pid


def test_an_illness_that_passes_restarts_nothing(bench: Bench) -> None:
    bench.start(bench.server("a"), unhealthy_looks=10_000)
    before = bench.wait(lambda state: state.phase == "up")
    (bench.path / "a.sick").touch()
    bench.wait(lambda state: part(state, "a").status == "unhealthy")
    (bench.path / "a.sick").unlink()
    state = bench.wait(lambda state: state.healthy)
    assert part(state, "a").pid == part(before, "a").pid
    assert part(state, "a").restarts == 0


def test_children_in_sessions_of_their_own_and_deaf_ones_are_ended(bench: Bench) -> None:
    bench.start(bench.program("parent", PARENT), bench.program("deaf", STUBBORN, stop_seconds=0.3))
    bench.wait(lambda state: state.phase == "up")
    while not all("deaf" in bench.folder.log(name).read_text() for name in ("parent", "deaf")):
        time.sleep(0.02)
    assert len(bench.left()) == 4, "supervisor, parent, child, deaf"
    assert bench.stop() == 0
    assert bench.left() == []
    assert "deaf: did not end in 0.3 s, killed" in bench.said


def test_a_stop_while_it_starts_leaves_nothing(bench: Bench) -> None:
    bench.start(bench.server("a"), bench.program("slow", SLEEP, health="http://127.0.0.1:9/", needs=("a",)))
    bench.wait(lambda state: part(state, "slow").status == "starting")
    assert bench.stop() == 0
    assert bench.left() == []
    assert bench.wait(lambda state: state.phase == "stopped").why == ""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for a signal when the parent ends")
def test_a_supervisor_that_is_killed_takes_its_parts_with_it(bench: Bench) -> None:
    bench.start(bench.server("a"), bench.program("quiet", SLEEP))
    bench.wait(lambda state: state.phase == "up")
    assert bench.process is not None
    bench.process.kill()
    bench.process.wait()
    assert gone(bench)
    state = control.look(bench.folder)
    assert state is not None
    assert state.phase == "failed"
    assert "the supervisor was killed" in state.why
    assert not state.healthy


def test_down_clears_up_after_a_killed_supervisor_and_touches_nobody_else(bench: Bench) -> None:
    """Also where a number in the state is another process's by now."""
    bench.start(bench.program("deaf", STUBBORN))
    state = bench.wait(lambda state: state.phase == "up")
    while "deaf" not in bench.folder.log("deaf").read_text():
        time.sleep(0.02)
    assert bench.process is not None
    bench.process.kill()
    bench.process.wait()
    with subprocess.Popen([sys.executable, "-c", SLEEP]) as bystander:
        recycled = state.parts[0].model_copy(update={"pid": bystander.pid})
        write(
            bench.folder.state, state.model_copy(update={"pid": bystander.pid, "parts": [recycled]}).model_dump_json()
        )
        said: list[str] = []
        assert control.down(bench.folder, said.append) == 1
        assert said == ["ended what a killed supervisor had left: 1 processes"]
        assert bench.left() == []
        assert bystander.poll() is None
        bystander.kill()
    after = bench.folder.read_state()
    assert after is not None
    assert after.phase == "stopped"


def test_a_state_that_cant_be_written_ends_nothing_and_is_written_later(bench: Bench) -> None:
    bench.start(bench.server("a"))
    before = bench.wait(lambda state: state.phase == "up")
    bench.folder.state.unlink()
    bench.folder.state.mkdir()
    pid = part(before, "a").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while "can't be written" not in bench.said:
        time.sleep(0.02)
    bench.folder.state.rmdir()
    state = bench.wait(lambda state: part(state, "a").restarts == 1 and state.healthy)
    assert psutil.pid_exists(part(state, "a").pid or 0)
    assert bench.said.count("can't be written") == 1


def test_logs_are_cut_while_they_are_written(bench: Bench) -> None:
    code = "import time\nfor i in range(10**9):\n print(f'line {i:06d} ' + 'x' * 1000, flush=True)\n time.sleep(0.001)"
    bench.start(bench.program("talker", code), log_bytes=100_000)
    log, older = bench.folder.log("talker"), Path(f"{bench.folder.log('talker')}.1")
    bench.wait(lambda state: state.phase == "up")
    end = time.monotonic() + DEADLINE_SECONDS
    while not older.exists() and time.monotonic() < end:
        time.sleep(0.02)
    while not log.stat().st_size and time.monotonic() < end:
        time.sleep(0.02)
    assert log.read_bytes().startswith(b"line "), "written at the new end, not at the old one"
    assert bench.stop() == 0
    assert older.stat().st_size > 100_000


def test_the_caller_is_never_among_the_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEP], env={**os.environ, processes.MARK: "abc/x"}) as child:
        try:
            assert [found.pid for found in processes.marked("abc/")] == [child.pid]
            assert [found.pid for found in processes.marked("abc/x")] == [child.pid]
            assert processes.marked("abc/xy") == processes.marked("ab") == processes.marked("other/") == []
        finally:
            child.kill()
