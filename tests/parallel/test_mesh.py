"""What is said to be another rank's silence, and what is not: by where an error came from, not by what it says."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from modelpress.errors import StageError
from modelpress.parallel.mesh import MeshSizes, answered, make_mesh
from modelpress.parallel.outline import outline
from modelpress.parallel.runner import Runner
from tests.parallel.models import batch, loss, make


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """This process as the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Angry(nn.Module):
    """A block whose error has all the words of a transport."""

    def forward(self, _: Tensor) -> Tensor:
        raise RuntimeError("connection closed by peer: the socket timed out")


@pytest.mark.parametrize("training", [False, True])
def test_an_error_of_a_layer_stays_what_it_is_whatever_it_says(group: None, training: bool) -> None:
    module, (inputs, targets) = make("residual"), batch("residual")
    found = outline(module, inputs)
    runner = Runner(module, found, [0, 5], make_mesh(MeshSizes()), list(inputs), loss=loss)
    runner.stage.body.set_submodule("blocks.3.down", Angry(), strict=True)
    with pytest.raises(RuntimeError) as caught:  # as the pipeline wraps it
        runner.train_step(inputs, targets) if training else runner.infer(inputs)
    assert not isinstance(caught.value, StageError)
    assert "the socket timed out" in str(caught.value.__cause__)


def test_an_error_in_a_backward_pass_stays_what_it_is(group: None) -> None:
    def refuse(_: Tensor) -> None:
        raise RuntimeError("timeout")

    value = torch.ones(1, requires_grad=True)
    value.register_hook(refuse)
    with pytest.raises(RuntimeError, match=r"^timeout$"), answered("learning"):
        value.sum().backward()


def test_a_silent_store_is_named(group: None) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=0.1), wait_for_workers=False)
    with pytest.raises(StageError, match=r"meeting, on rank 0 of 1(.|\n)*did not answer in time"), answered("meeting"):
        store.get("nobody")
