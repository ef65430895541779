"""Torch modules by their parts: operations against closed formulas, times and bytes of each part alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modelpress.profile import modules
from tests.toys import TinyEncoder, make_cnn

SMALL = st.integers(1, 9)


class Named(nn.Module):
    """Takes its input by name, as models do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mix = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.mix(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(batch, length, width)


def count(module: nn.Module, **inputs: Tensor) -> tuple[dict[str, modules.Part], int]:
    with torch.inference_mode():
        return modules.count(module, inputs)


@given(SMALL, SMALL, SMALL)
@settings(max_examples=20, deadline=None)
def test_a_linear_layer_counts_by_its_formula(rows: int, inputs: int, outputs: int) -> None:
    parts, _ = count(Named(nn.Linear(inputs, outputs)), x=torch.ones(rows, inputs))
    part = parts["layer"]
    assert part.flops == 2 * rows * inputs * outputs
    assert part.read_bytes == 4 * (rows * inputs + inputs * outputs + outputs)
    assert part.written_bytes == 4 * rows * outputs
    assert not part.uncounted


@given(SMALL, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(3, 8))
@settings(max_examples=20, deadline=None)
def test_a_convolution_counts_by_its_formula(batch: int, inputs: int, filters: int, kernel: int, size: int) -> None:
    parts, _ = count(Named(nn.Conv2d(inputs, filters, kernel)), x=torch.ones(batch, inputs, size, size))
    places = (size - kernel + 1) ** 2
    assert parts["layer"].flops == 2 * batch * filters * places * inputs * kernel**2


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_attention_counts_under_the_module_that_does_it(batch: int, length: int, heads: int, size: int) -> None:
    width = heads * size
    parts, _ = count(Attention(width, heads).eval(), x=torch.rand(batch, length, width))
    assert parts["mix"].flops == 2 * batch * length * width * 3 * width
    assert parts[""].flops >= 2 * 2 * batch * length * length * width
    assert not parts[""].uncounted


def test_a_cnn_counts_its_weights_by_the_places_they_are_applied_to() -> None:
    parts, _ = count(make_cnn(), x=torch.rand(3, 1, 8, 8))
    assert parts["body.0"].flops == 3 * 2 * 72 * 64
    assert parts["body.3"].flops == 3 * 2 * 864 * 64
    assert parts["body.7"].flops == 3 * 2 * 3072
    assert parts["body.2"].flops == 3 * 8 * 64  # a comparison for each element
    assert not [name for name, part in parts.items() if part.uncounted]


def test_an_operator_without_a_formula_is_named() -> None:
    class Sorts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort().values

    parts, _ = count(Sorts(), x=torch.rand(9))
    assert parts[""].uncounted == {"sort"}
    ran = modules.run_watched(Sorts(), {"x": torch.rand(9)}, 0.001)
    assert [one.flops for one in ran.operators] == [None]


def test_values_alive_at_once_are_counted_and_let_go() -> None:
    """Each layer makes 4 000 bytes from 4 000: three at once are never needed, weights do not count."""
    chain = Named(nn.Sequential(*(nn.Linear(10, 10) for _ in range(5))))
    _, most = count(chain, x=torch.ones(100, 10))
    assert 8_000 <= most <= 12_000


def test_time_is_each_parts_own() -> None:
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(400, 400)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(30):
                x = self.inner(x)
            return x

    ran = modules.run_watched(Waits().eval(), {"x": torch.ones(64, 400)}, 0.02)
    inner = {one.name: one for one in ran.operators}["inner"]
    assert inner.seconds is not None
    assert inner.seconds <= ran.watched_seconds * 2
    assert inner.flops == 30 * 2 * 64 * 400 * 400
    assert inner.weight_bytes == 4 * (400 * 400 + 400)
    assert sum(one.seconds or 0 for one in ran.operators) <= ran.watched_seconds * 2


def test_hooks_are_gone_afterwards() -> None:
    model = TinyEncoder().eval()
    inputs = {"ids": torch.zeros(2, 5, dtype=torch.int64), "mask": torch.ones(2, 5, dtype=torch.int64)}
    before = model(**inputs)
    found = modules.run_watched(model, inputs, 0.001)
    assert {one.name for one in found.operators} == {"table", "up", "down", "(model)"}
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    assert torch.equal(model(**inputs), before)


def test_a_module_that_fails_leaves_no_hooks() -> None:
    model = Named(nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        modules.run_watched(model, {"x": torch.ones(2, 5)}, 0.001)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
