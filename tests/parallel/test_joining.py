"""Who the ranks are, what they lack, and whom they wait for."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from torch import nn

from modelpress.config import OptimizeConfig, ParallelConfig, TrainConfig, parse_config
from modelpress.errors import ConfigError, SetupError, StageError
from modelpress.parallel.ranks import device_of, joined
from modelpress.parallel.traffic import Traffic, open_sockets, sent_bytes
from modelpress.train import train_
from tests.parallel.cases import spread
from tests.parallel.forks import environment, free_port
from tests.train.toy import Toy, mlp

DIGITS = {
    "name": "digits",
    "workload": {"kind": "image-classification", "model": "digits-cnn", "data": "digits"},
}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"RANK": None}, "no RANK in the environment"),
        ({"MASTER_PORT": None, "MASTER_ADDR": None}, "no MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "2"}, "RANK=2, WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, "addresses of ranks that are gone"),
    ],
)
def test_a_process_that_torchrun_did_not_start_says_so(wrong: dict[str, str | None], said: str) -> None:
    who = {name: value for name, value in (environment(0, 2, 1) | wrong).items() if value is not None}
    with pytest.raises(ConfigError, match=said), joined(ParallelConfig(), who):
        pytest.fail("joined")


def test_a_taken_port_and_a_rank_that_never_comes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        who = environment(0, 2, taken.getsockname()[1])
        with pytest.raises(SetupError, match=r"in use(.|\n)*rdzv-endpoint"), joined(spread(2), who):
            pytest.fail("joined")
    short = ParallelConfig(processes=2, timeout_seconds=1.0)
    with pytest.raises(SetupError, match=r"within 1 s"), joined(short, environment(0, 2, free_port())):
        pytest.fail("joined")


@pytest.mark.skipif(torch.cuda.is_available(), reason="nccl is here")
def test_backends_that_are_not_here_are_named_with_the_way_to_have_them() -> None:
    with pytest.raises(SetupError, match=r"no CUDA or ROCm device(.|\n)*parallel.backend to gloo"):
        device_of(spread(2, backend="nccl"), 0)
    with pytest.raises(SetupError, match=r"no package torch_xla(.|\n)*install torch_xla"):
        device_of(spread(2, backend="xla"), 0)
    assert device_of(spread(2), 1) == torch.device("cpu")


def attempt(config: TrainConfig, module: nn.Module | None = None, *, alike: bool = False) -> None:
    workload = Toy(mlp)
    if alike:
        workload.samples_stand_alone = False  # type: ignore[misc]
    train_(module or workload.source(), lambda m, b: workload.loss(m(**b.inputs), b), workload, config)


def test_more_processes_than_there_are_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"processes 2, and one process(.|\n)*modelpress run"):
        attempt(TrainConfig(parallel=spread(2)))


def test_what_is_no_sum_over_parts_is_refused() -> None:
    parts = TrainConfig(parallel=ParallelConfig(gradient_accumulation=2))
    with pytest.raises(StageError, match="compares the samples"):
        attempt(parts, alike=True)
    with pytest.raises(StageError, match=r"batch normalisation in body\.1"):
        attempt(parts, Toy(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))).source())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"distill": {"train": {"parallel": {"proceses": 2}}}}, "distill.train.parallel.proceses: unknown field"),
        ({"distill": {"train": {"parallel": {"strategy": "fsdp"}}}}, "strategy is only read with parallel.processes"),
        (
            {"distill": {"train": {"out_of_memory": "halve", "parallel": {"processes": 2}}}},
            "set parallel.gradient_accumulation",
        ),
        ({"quantize": {"smooth": 0, "recovery": {"parallel": {"processes": 2}}}}, "quantize.recovery.parallel"),
        ({"shard": {"by": "rank"}}, "a recipe publishes a graph"),
        ({"gpu": {}, "distill": {"train": {"parallel": {"processes": 2}}}}, "excludes gpu"),
        (
            {"prune": {"method": "wanda", "recovery": {"parallel": {"processes": 2, "strategy": "fsdp"}}}},
            "needs prune.method 'structured'",
        ),
    ],
)
def test_configs_that_mean_nothing_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(DIGITS | change)
    assert said in str(caught.value)


def test_how_many_processes_there_are_is_no_part_of_what_is_made() -> None:
    def made(**ways: object) -> OptimizeConfig:
        return parse_config(DIGITS | {"distill": {"train": {"seed": 3, "parallel": ways}}})

    assert made(processes=4, strategy="fsdp").fingerprint() == made().fingerprint()
    assert made().model_copy(update={"distill": None}).fingerprint() != made().fingerprint()
    train = TrainConfig(seed=3)
    assert train.fingerprint() != TrainConfig(seed=4).fingerprint()
    assert train.model_copy(update={"parallel": spread(2)}).fingerprint() == train.fingerprint()


def test_bytes_are_those_of_a_ring_and_those_of_the_sockets() -> None:
    traffic = Traffic(4)
    traffic.summed("parameters", 400)
    traffic.gathered("control", 80)
    traffic.sent("data", 7)
    assert traffic.needed == {"parameters": 600.0, "control": 60.0, "data": 7.0}
    before = open_sockets()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with socket.create_connection(listening.getsockname()) as one, listening.accept()[0] as other:
            new = open_sockets() - before
            assert {one.fileno(), other.fileno()} < new
            one.sendall(b"x" * 100_000)
            received = 0
            while received < 100_000:
                received += len(other.recv(65536))
            assert sent_bytes({one.fileno()}) == 100_000
            assert sent_bytes({other.fileno()}) == 0
            assert os.fstat(one.fileno())
    assert sent_bytes(set()) is None
