"""What is compared in float64 is computed in float64: a float32 in between would hide what a split changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.parallel import _model_ranks as benchmark
from tests.parallel.models import batch, make


def dtypes_of(output: Tensor) -> set[torch.dtype]:
    """Of all that lies between the parameters and this, by the graph that autograd kept."""
    nodes: list[Any] = [output.grad_fn]
    seen: set[Any] = set()
    found: set[torch.dtype] = set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found |= {one.dtype for one in node._input_metadata}
            nodes += [before for before, _ in node.next_functions]
    return found


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen", "bert", "residual"])
def test_the_models_of_these_tests_compute_in_float64_alone(kind: str) -> None:
    assert dtypes_of(make(kind)(**batch(kind)[0])) == {torch.float64}


def test_the_benchmarks_decoder_computes_in_the_dtype_of_its_weights() -> None:
    inputs, _ = benchmark.batch(quick=True)
    for dtype in (torch.float32, torch.float64):
        assert dtypes_of(benchmark.decoder(True, dtype)(**inputs)) == {dtype}


def test_a_float32_in_between_is_seen() -> None:
    class Narrow(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).float().double()

    assert dtypes_of(Narrow(2, 2).double()(torch.ones(1, 2, dtype=torch.float64))) == {torch.float32, torch.float64}
