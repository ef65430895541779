"""Jobs for ranks: started here or elsewhere, watched, killed, gone on with, ended with everything they started."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from modelpress.checkpoint import Checkpoint, from_module
from modelpress.config import DistillConfig, PruneConfig, TrainConfig, WorkloadConfig
from modelpress.errors import ConfigError, CorruptionError, SetupError, StageError
from modelpress.parallel import jobs, launch, lease
from modelpress.parallel.states import States
from modelpress.progress import silent
from modelpress.reports import DistillReport
from modelpress.store import open_store
from modelpress.store.artifacts import save_artifact
from tests.conftest import ROOT
from tests.parallel.cases import Slow, be_rank, spread, work
from tests.parallel.forks import SECONDS, results, together
from tests.parallel.warm_ranks import warm_ranks

TRAIN = TrainConfig(epochs=4, batch_size=16, learning_rate=0.02)


def make_job(
    folder: Path, stage: str = "distill", pause: float = 0.0, train: TrainConfig = TRAIN, **ways: Any
) -> jobs.Job:
    store = open_store(str(folder / "work"))
    model = save_artifact(store, from_module(Slow().source()).to_bytes())
    train = train.model_copy(update={"parallel": spread(2, **ways)})
    return jobs.Job(
        stage=stage,  # type: ignore[arg-type]
        workload=WorkloadConfig(kind="custom", factory="tests.parallel.cases:Slow", options={"pause": pause}),
        model=model,
        config=DistillConfig(architecture={"width": 8}, train=train)
        if stage == "distill"
        else PruneConfig(method="wanda", recovery=train),
        states=States(store=store.uri, prefix="training/distill/key/", seconds=0.0, reuse=True),
    )


def without_states(job: jobs.Job) -> jobs.Job:
    return job.model_copy(update={"states": None})


def alone(job: jobs.Job) -> bytes:
    """The output of the same in one process."""
    change = {"train": TRAIN} if job.stage == "distill" else {"recovery": TRAIN}
    return jobs.work(job.model_copy(update={"config": job.config.model_copy(update=change)}), silent)[0]


def assert_close(found: bytes, expected: bytes) -> None:
    first, second = (Checkpoint.from_bytes(data).arrays() for data in (found, expected))
    assert first.keys() == second.keys()
    for name, value in second.items():
        np.testing.assert_allclose(first[name], value, rtol=1e-4, atol=1e-5)
        assert np.array_equal(first[name] == 0, value == 0), "zeros stay where they are"


def rank_of(agent: subprocess.Popen[bytes], rank: int) -> psutil.Process | None:
    for child in psutil.Process(agent.pid).children(recursive=True):
        try:
            if child.environ().get("RANK") == str(rank):
                return child
        except psutil.Error:
            continue
    return None


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_job_survives_the_death_of_a_rank_and_ends_with_the_same_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, pause=0.15)
    expected = results(together(2, work, without_states(job)))
    assert hashlib.sha256(expected[0]).digest() == hashlib.sha256(expected[1]).digest()
    seen: list[Any] = []
    killed: list[int] = []

    def kill(agent: subprocess.Popen[bytes]) -> None:
        state = tmp_path / "work" / "training" / "distill" / "key" / "0"
        end = time.monotonic() + SECONDS
        while not state.exists() and time.monotonic() < end:
            time.sleep(0.02)
        victim = rank_of(agent, 1)
        assert victim is not None
        killed.append(victim.pid)
        victim.kill()

    def started(agent: subprocess.Popen[bytes]) -> None:
        threading.Thread(target=kill, args=(agent,)).start()

    with warm_ranks(tmp_path, monkeypatch):
        output, result = launch.run_here(job, lambda *told: seen.append(told), started)
    assert killed, "nobody was killed: the test proves nothing"
    assert output == expected[0]
    report = DistillReport.model_validate(result.report).train
    assert report.parallel is not None
    assert (report.parallel.processes, report.parallel.restarts) == (2, 1)
    assert report.updates == 12
    assert 0 < report.parallel.updates < 12, "what was done before the kill was not repeated"
    assert len(result.told) == 1
    assert "goes on behind update" in result.told[0]
    assert seen[-1][1] == 12
    assert_close(output, alone(job))
    assert not psutil.pid_exists(killed[0])


@pytest.mark.distributed
def test_a_pruned_models_recovery_is_the_same_over_ranks(tmp_path: Path) -> None:
    job = without_states(make_job(tmp_path, "prune"))
    first, second = results(together(2, work, job))
    assert first == second
    assert_close(first, alone(job))
    assert sum(int((value == 0).sum()) for value in Checkpoint.from_bytes(first).arrays().values()) > 50


@pytest.mark.distributed
def test_ranks_that_others_start_are_waited_for_and_what_they_refuse_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "ELSEWHERE_ROUND_SECONDS", 0.05)
    job = without_states(make_job(tmp_path))
    with pytest.raises(ConfigError, match="machine's disk"):
        launch.wait_elsewhere(job, (tmp_path / "job").as_uri())
    monkeypatch.setattr(launch, "_on_disk", lambda _: False)  # as good as any store for ranks of this machine

    def go(job: jobs.Job, name: str) -> tuple[bytes, jobs.Result]:
        folder, told = (tmp_path / name).as_uri(), list[str]()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(launch.wait_elsewhere, job, folder, silent, told.append)
            while not told and not waiting.done():
                time.sleep(0.01)
            assert folder in told[0]
            together(2, be_rank, folder)
            return waiting.result(SECONDS)

    output, result = go(job, "good")
    assert output == results(together(2, work, job))[0]
    assert DistillReport.model_validate(result.report).train.parallel is not None
    wild = TRAIN.model_copy(update={"learning_rate": 1e30, "max_grad_norm": 0.0})
    with pytest.raises(StageError, match=r"rank [01] of 2(.|\n)*(nan|inf)(.|\n)*lower train.learning_rate"):
        go(without_states(make_job(tmp_path, train=wild)), "wild")


class Cancelled(BaseException):
    """As Prefect's own, which no handler of errors stops."""


@pytest.mark.distributed
@pytest.mark.faults
def test_ranks_elsewhere_end_with_the_run_that_waits_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "ELSEWHERE_ROUND_SECONDS", 0.05)
    monkeypatch.setattr(launch, "_on_disk", lambda _: False)
    job, folder = make_job(tmp_path, pause=0.5), (tmp_path / "job").as_uri()
    store, state = open_store(folder), tmp_path / "work" / "training" / "distill" / "key" / "0"

    def cancel(*_: object) -> None:
        if state.exists():
            raise Cancelled

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(launch.wait_elsewhere, job, folder, cancel)
        while store.info(jobs.JOB) is None:
            time.sleep(0.01)
        assert together(2, be_rank, folder) == [(None, "ended with 0")] * 2
        assert isinstance(waiting.exception(SECONDS), Cancelled)
    assert store.info(jobs.RESULT) is None
    assert b"cancelled" in store.get(lease.GONE)
    assert together(1, be_rank, folder) == [(None, "ended with 0")], "one that comes late begins nothing"
    store.delete(lease.GONE)  # now as if that run had been killed: it said something, and then no more
    assert together(2, be_rank, folder, 0.5) == [(None, "ended with 0")] * 2
    assert b"said nothing for 0.5 s" in store.get(lease.GONE)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(launch.wait_elsewhere, job, folder)
        while store.info(lease.GONE) is not None:
            time.sleep(0.01)
        results(together(2, be_rank, folder))
        _, result = waiting.result(SECONDS)
    assert "goes on behind update" in result.told[0]


def test_a_job_is_read_as_it_was_written_and_another_versions_is_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "job"))
    store.put(jobs.JOB, b'{"stage": "sing"}')
    with pytest.raises(CorruptionError, match=r"job\.json"):
        jobs.read(store, jobs.JOB, jobs.Job)
    for stage in ("distill", "prune"):
        job = make_job(tmp_path, stage)
        assert jobs.Job.model_validate_json(job.model_dump_json()) == job


@pytest.mark.skipif(torch.cuda.is_available(), reason="nccl is here")
def test_a_job_that_cannot_run_here_starts_nothing(tmp_path: Path) -> None:
    started: list[object] = []
    with pytest.raises(SetupError, match="CUDA or ROCm"):
        launch.run_here(make_job(tmp_path, backend="nccl"), started=started.append)
    assert not started


@pytest.mark.e2e
@pytest.mark.distributed
def test_what_ends_the_launcher_ends_the_ranks(tmp_path: Path) -> None:
    """Cancelled by an exception, and killed without a word."""
    job = make_job(tmp_path, pause=2.0)
    agents: list[subprocess.Popen[bytes]] = []
    ranks: list[psutil.Process] = []

    def cancel(*_: object) -> None:
        found = [rank_of(agents[0], rank) for rank in range(2)]
        assert None not in found
        ranks.extend(one for one in found if one is not None)
        raise Cancelled

    with pytest.raises(Cancelled):
        launch.run_here(job, cancel, agents.append)
    assert agents[0].poll() is not None
    assert not [one for one in ranks if one.is_running()]
    (tmp_path / "job.json").write_text(job.model_dump_json())
    code = (
        "import sys; from pathlib import Path; from modelpress.parallel import jobs, launch\n"
        "job = jobs.Job.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "launch.run_here(job, lambda *_: print('moves', flush=True), lambda agent: print(agent.pid, flush=True))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "job.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as launcher:
        assert launcher.stdout is not None
        agent = psutil.Process(int(launcher.stdout.readline()))
        assert launcher.stdout.readline() == "moves\n"
        tree = [agent, *agent.children(recursive=True)]
        assert len(tree) >= 3
        launcher.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(tree, timeout=60)
    assert not alive


@pytest.mark.e2e
@pytest.mark.distributed
def test_torchrun_elsewhere_ends_well_when_the_run_is_told_to_stop(tmp_path: Path) -> None:
    """Real processes on both sides, and Prefect's own handler, by which a run is cancelled; status 0 starts no rank
    again."""
    job, folder = make_job(tmp_path, pause=2.0), (tmp_path / "job").as_uri()
    (tmp_path / "job.json").write_text(job.model_dump_json())
    code = (
        "import sys; from pathlib import Path; from prefect.utilities.engine import capture_sigterm\n"
        "from modelpress.parallel import jobs, launch; launch._on_disk = lambda _: False\n"
        "job = jobs.Job.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "def say(text): print('waits', flush=True)\n"
        "def move(*_): print('moves', flush=True)\n"
        "with capture_sigterm(): launch.wait_elsewhere(job, sys.argv[2], move, say)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *("-m", "modelpress.parallel.rank", folder),
    ]
    waiting = [sys.executable, "-c", code, str(tmp_path / "job.json"), folder]
    with subprocess.Popen(waiting, stdout=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "waits\n"
        with subprocess.Popen(torchrun, env=environment | {"GLOO_SOCKET_IFNAME": "lo"}) as agent:
            assert run.stdout.readline() == "moves\n"
            tree = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
            run.terminate()
            assert run.wait(SECONDS) == -signal.SIGTERM
            assert agent.wait(SECONDS) == 0
    _, alive = psutil.wait_procs(tree, timeout=60)
    assert not alive
    assert open_store(folder).info(jobs.RESULT) is None


@pytest.mark.e2e
@pytest.mark.distributed
def test_ranks_that_die_again_and_again_are_an_error_that_says_how(tmp_path: Path) -> None:
    job = make_job(tmp_path, pause=1.0, restarts=1)

    def kill(agent: subprocess.Popen[bytes]) -> None:
        gone: set[int] = set()
        while agent.poll() is None:
            victim = rank_of(agent, 1)
            if victim is not None and victim.pid not in gone:
                gone.add(victim.pid)
                time.sleep(1.0)
                victim.kill()
            time.sleep(0.05)

    def started(agent: subprocess.Popen[bytes]) -> None:
        threading.Thread(target=kill, args=(agent,)).start()

    with pytest.raises(StageError, match=r"rank 1 by signal SIGKILL(.|\n)*1 restarts(.|\n)*memory"):
        launch.run_here(job, silent, started)
