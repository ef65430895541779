"""Starting a job's ranks on this machine, and waiting for those that others start.

On this machine: one child, torchrun's agent, and the ranks as its children. The agent starts all of them again when one
dies, and they go on from the state that is kept. The child's standard input is a pipe that nothing is written to: it
closes when this process ends, however it does, and the ranks end with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import psutil

from modelpress.cores import usable_cores
from modelpress.errors import ConfigError, ModelpressError, StageError
from modelpress.parallel import jobs, lease
from modelpress.progress import Progress, silent
from modelpress.store.base import Store, open_store

ROUND_SECONDS = 0.2
ELSEWHERE_ROUND_SECONDS = 5.0
GRACE_SECONDS = 10.0
"""Between asking processes to end and ending them."""
LOG_LINES = 15
"""Of the ranks' log that an error shows."""


def run_here(
    job: jobs.Job, progress: Progress = silent, started: Callable[[subprocess.Popen[bytes]], None] | None = None
) -> tuple[bytes, jobs.Result]:
    """Run a job by ranks on this machine: its output and its result.

    Cancelled (by an exception, a signal, or the death of this process), no rank stays.

    Args:
        job: what is to be done.
        progress: is told how far the first rank is.
        started: is told the agent's process.

    Raises:
        SetupError: the backend is not here; before anything is started.
        ModelpressError: what a rank refused, of the same class.
        StageError: a rank died, more often than it was started again.
    """
    from modelpress.parallel.ranks import require

    require(job.parallel, job.parallel.processes - 1)
    with tempfile.TemporaryDirectory(prefix="modelpress-ranks-") as made:
        folder = Path(made)
        store = open_store(str(folder / "job"))
        store.put(jobs.JOB, job.model_dump_json().encode())
        log = folder / "log"
        with log.open("wb") as output, _agent(job, store, output) as agent:
            if started is not None:
                started(agent)
            while agent.poll() is None:
                _pass_on(store, progress)
                if _refusals(store):
                    break
                time.sleep(ROUND_SECONDS)
        failed = _failed(job, store)
        if failed is not None:
            raise failed
        if agent.returncode:
            raise _died(job, log.read_text(errors="replace"), agent.returncode)
        return store.get(jobs.OUTPUT), jobs.read(store, jobs.RESULT, jobs.Result)


def wait_elsewhere(
    job: jobs.Job, folder: str, progress: Progress = silent, say: Callable[[str], None] = print, *, reuse: bool = True
) -> tuple[bytes, jobs.Result]:
    """Write a job down for ranks that somebody else starts, and wait for what they make.

    Cancelled (by an exception), the ranks are told so and end; where this process is killed, they find it out.

    Args:
        job: what is to be done.
        folder: a place in a store that all ranks reach, for this job alone.
        progress: is told how far the first rank is.
        say: is told what to start.
        reuse: take the result that is there, of an attempt whose waiting was cut off.

    Raises:
        ConfigError: the folder is on this machine's disk.
        ModelpressError: what a rank refused, of the same class.
    """
    if _on_disk(folder):
        raise ConfigError(
            "handing a job to ranks on other machines",
            found=f"a work store on this machine's disk ({folder})",
            expected="a store that all of them reach",
            fix="set MODELPRESS_WORK to s3://bucket/prefix, or parallel.where to here",
        )
    store = open_store(folder)
    gone = [info.key for info in store.list(jobs.ERRORS)]  # of an attempt before
    for key in gone if reuse else [*gone, jobs.RESULT]:
        store.delete(key)
    with lease.waiting(store) as beat:
        store.put(jobs.JOB, job.model_dump_json().encode())
        ranks = job.parallel.processes
        say(f"waits for {ranks} ranks; each machine runs: torchrun … -m modelpress.parallel.rank {folder}")
        return _awaited(job, store, progress, beat)


def _on_disk(folder: str) -> bool:
    return "://" not in folder or folder.startswith("file:")


def _awaited(job: jobs.Job, store: Store, progress: Progress, beat: lease.Beat) -> tuple[bytes, jobs.Result]:
    while store.info(jobs.RESULT) is None:
        beat()
        failed = _failed(job, store)
        if failed is not None:
            raise failed
        _pass_on(store, progress)
        time.sleep(ELSEWHERE_ROUND_SECONDS)
    return store.get(jobs.OUTPUT), jobs.read(store, jobs.RESULT, jobs.Result)


@contextlib.contextmanager
def _agent(job: jobs.Job, store: Store, output: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    ways = job.parallel
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", "1", "--nproc-per-node", str(ways.processes), "--max-restarts", str(ways.restarts)),
        # Port 0: one that is free, so that jobs beside each other do not meet.
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", uuid.uuid4().hex),
        *("--local-addr", "127.0.0.1", "--monitor-interval", "0.1"),
        *("-m", "modelpress.parallel.rank", store.uri),
    ]
    process = subprocess.Popen(
        command,
        env=_environment(ways.processes),
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a Ctrl-C in the terminal is this process' to pass on
    )
    try:
        yield process
    finally:
        _end(process)


def _environment(processes: int) -> dict[str, str]:
    """This process's, so that custom workloads are found; ranks share the cores, and meet on this machine alone."""
    threads = str(max(1, usable_cores() // processes))
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {
        "OMP_NUM_THREADS": threads,
        "GLOO_SOCKET_IFNAME": loopback,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see `ranks.joined`
        jobs.WATCHED: "1",
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the agent and its ranks, which are leaders of sessions of their own."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    assert process.stdin is not None
    process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    _, alive = psutil.wait_procs(below, timeout=GRACE_SECONDS)
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    if process.poll() is None:
        process.kill()
    process.wait()


def _pass_on(store: Store, progress: Progress) -> None:
    if store.info(jobs.PROGRESS) is not None:
        done, total, note = json.loads(store.get(jobs.PROGRESS))
        progress(done, total, note)


def _refusals(store: Store) -> list[str]:
    found = sorted(store.list(jobs.ERRORS), key=lambda info: info.modified)
    return [info.key for info in found]


def _failed(job: jobs.Job, store: Store) -> ModelpressError | None:
    """What a rank refused; of several the first: the others may only have missed it."""
    keys = _refusals(store)
    return jobs.read(store, keys[0], jobs.Refusal).raised(job.parallel.processes) if keys else None


_FAILURE = re.compile(r"^\s*rank\s*: (\d+) .*?exitcode\s*: (-?\d+)", re.MULTILINE | re.DOTALL)


def _died(job: jobs.Job, log: str, status: int) -> StageError:
    """An error from the agent's own summary, and the last of what the ranks said."""
    deaths = []
    for rank, code in sorted(set(_FAILURE.findall(log))):
        by = f"signal {signal.Signals(-int(code)).name}" if int(code) < 0 else f"exit status {code}"
        deaths.append(f"rank {rank} by {by}")
    said = [line for line in log.partition("=====")[0].splitlines() if line.strip()]  # before torchrun's own summary
    tail = "\n    ".join(said[-LOG_LINES:])
    return StageError(
        f"running {job.stage} on {job.parallel.processes} ranks",
        found=f"{', '.join(deaths) or f'torchrun ended with status {status}'}, and {job.parallel.restarts} restarts "
        f"did not help; they said last:\n    {tail}",
        expected="all of them to the end",
        fix="SIGKILL is mostly the kernel's, for memory: lower parallel.processes, or raise "
        "parallel.gradient_accumulation; started again, the run goes on from the state that was kept",
    )
