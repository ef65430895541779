from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modelpress.errors import StageError
from modelpress.quantize.gptq import gptq
from modelpress.quantize.groups import Grid, GroupedWeight, in_groups, round_to_nearest
from modelpress.quantize.hqq import hqq, norm

grids = st.builds(
    Grid,
    num_bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([16, 32, 64, 128]),
    symmetric=st.booleans(),
    clip=st.booleans(),
)


def weights(outputs: int, inputs: int, seed: int, zeros: float = 0.0) -> Tensor:
    """Heavy-tailed, with a row of one sign and, where asked, exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(outputs, inputs, generator=generator) ** 3
    made[0] = made[0].abs() + 1
    return made * (torch.rand(outputs, inputs, generator=generator) >= zeros)


def correlated_inputs(features: int, seed: int = 0) -> Tensor:
    """Fewer samples than would make H well conditioned, and features that are mixtures of a few."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(200, features // 4, generator=generator) @ torch.randn(
        features // 4, features, generator=generator
    )
    return mixed + 0.1 * torch.randn(200, features, generator=generator)


def equal(first: GroupedWeight, second: GroupedWeight) -> bool:
    pairs = [(getattr(first, name), getattr(second, name)) for name in ("codes", "scale", "zero_point")]
    return all(torch.equal(one, other) for one, other in pairs)


@settings(max_examples=40, deadline=None)
@given(grid=grids, outputs=st.integers(1, 5), inputs=st.integers(1, 300), seed=st.integers(0, 99))
def test_rounding_errs_by_half_a_step_within_the_range(grid: Grid, outputs: int, inputs: int, seed: int) -> None:
    weight = weights(outputs, inputs, seed, zeros=0.2)
    made = round_to_nearest(weight, grid)
    assert made.codes.shape == weight.shape
    assert made.codes.dtype == made.zero_point.dtype == torch.uint8
    assert made.scale.shape == made.zero_point.shape == (outputs, -(-inputs // grid.group_size))
    assert int(made.codes.max()) <= grid.levels
    scale = made.scale.repeat_interleave(grid.group_size, dim=1)[:, :inputs]
    zero = made.zero_point.float().repeat_interleave(grid.group_size, dim=1)[:, :inputs]
    inside = (weight / scale + zero >= -0.5) & (weight / scale + zero <= grid.levels + 0.5)
    error = (weight - made.dequantize()).abs()
    assert (error <= scale * 0.5001)[inside].all()
    assert (made.dequantize()[weight == 0] == 0).all()
    if not grid.clip and grid.symmetric:
        assert inside.all()
    if grid.symmetric:
        assert (made.zero_point == grid.middle).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_never_adds_to_the_squared_error(symmetric: bool) -> None:
    weight = weights(16, 256, seed=3)
    errors = [
        in_groups(round_to_nearest(weight, Grid(4, 32, symmetric, clip)).dequantize() - weight, 32).square().sum(-1)
        for clip in (False, True)
    ]
    assert (errors[1] <= errors[0] * 1.0001).all()
    assert errors[1].sum() < 0.97 * errors[0].sum()


def test_a_group_of_zeros_and_one_of_tiny_numbers_come_back() -> None:
    weight = torch.zeros(1, 32)
    weight[0, 16:] = 1e-41
    for symmetric in (True, False):
        assert torch.allclose(round_to_nearest(weight, Grid(4, 16, symmetric)).dequantize(), weight, atol=1e-40)


@settings(max_examples=15, deadline=None)
@given(grid=grids, outputs=st.integers(1, 4), inputs=st.integers(1, 200), act_order=st.booleans())
def test_gptq_of_independent_inputs_is_rounding(grid: Grid, outputs: int, inputs: int, act_order: bool) -> None:
    weight = weights(outputs, inputs, seed=inputs)
    assert equal(gptq(weight, 3.0 * torch.eye(inputs), grid, act_order), round_to_nearest(weight, grid))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(4, 128, False), Grid(4, 64, False, False), Grid(8, 128)], ids=str)
def test_gptq_changes_the_outputs_less_than_rounding(grid: Grid, act_order: bool) -> None:
    weight, samples = weights(24, 160, seed=1), correlated_inputs(160)
    hessian = samples.T @ samples
    errors = [
        ((made.dequantize() - weight) @ samples.T).square().sum()
        for made in (round_to_nearest(weight, grid), gptq(weight, hessian, grid, act_order))
    ]
    assert errors[1] < 0.6 * errors[0]


def test_gptq_matches_the_plain_algorithm_of_the_paper() -> None:
    """Without blocks: H⁻¹ shrinks by one row and column at a time (section 3, the step before the Cholesky form)."""
    grid, samples = Grid(4, 256, clip=False), correlated_inputs(48)
    weight = weights(6, 48, seed=2)
    hessian = samples.T @ samples
    made = gptq(weight, hessian, grid, damping=0.05)
    damped = hessian.double() + 0.05 * hessian.double().diagonal().mean() * torch.eye(48)
    left, inverse = weight.double(), torch.linalg.inv(damped)
    scale = round_to_nearest(weight, grid).scale.double()[:, 0]
    for column in range(48):
        rounded = (left[:, column] / scale).round().clamp(-8, 7) * scale
        error = (left[:, column] - rounded) / inverse[column, column]
        left = left - torch.outer(error, inverse[column])
        left[:, column] = rounded
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    assert torch.allclose(made.dequantize().double(), left, atol=1e-4)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_keeps_pruned_weights_at_zero(symmetric: bool, act_order: bool) -> None:
    weight, samples = weights(8, 160, seed=4, zeros=0.5), correlated_inputs(160)
    made = gptq(weight, samples.T @ samples, Grid(4, 32, symmetric), act_order)
    assert (made.dequantize()[weight == 0] == 0).all()
    assert ((made.dequantize() != 0) & (weight != 0)).float().mean() > 0.2


def test_gptq_rounds_inputs_that_were_never_seen_to_the_nearest() -> None:
    weight, samples = weights(8, 64, seed=5), correlated_inputs(64)
    samples[:, 7] = 0
    grid = Grid(4, 16, clip=False)
    made, plain = gptq(weight, samples.T @ samples, grid, act_order=True), round_to_nearest(weight, grid)
    assert torch.equal(made.codes[:, 7], plain.codes[:, 7])
    assert not torch.equal(made.codes, plain.codes)


def test_hessians_that_cannot_be_used_are_named() -> None:
    weight, samples = weights(4, 64, seed=0), correlated_inputs(64)[:10]
    hessian = samples.T @ samples
    with pytest.raises(StageError, match=r"singular matrix of 64 features with 0 of"):
        gptq(weight, hessian.double(), Grid(4, 32), damping=0)
    gptq(weight, hessian, Grid(4, 32))
    hessian[3, 3] = torch.nan
    with pytest.raises(StageError, match="1 values NaN or infinite"):
        gptq(weight, hessian, Grid(4, 32))
    with pytest.raises(StageError, match=r"\[64, 64\]"):
        gptq(weight, torch.eye(63), Grid(4, 32))


@settings(max_examples=20, deadline=None)
@given(outputs=st.integers(1, 4), inputs=st.integers(1, 200), seed=st.integers(0, 99), size=st.sampled_from([16, 64]))
def test_hqq_is_no_worse_than_rounding_in_its_norm(outputs: int, inputs: int, seed: int, size: int) -> None:
    weight, grid = weights(outputs, inputs, seed), Grid(4, size, symmetric=False)
    found, rounded = (
        in_groups(one.dequantize() - weight, size) for one in (hqq(weight, grid), round_to_nearest(weight, grid))
    )
    assert (norm(found) <= norm(rounded) * 1.0001 + 1e-6).all()


def test_hqq_gains_on_heavy_tails() -> None:
    weight, grid = weights(32, 512, seed=0), Grid(4, 64, symmetric=False)
    errors = [
        norm(in_groups(one.dequantize() - weight, 64)).sum()
        for one in (hqq(weight, grid), round_to_nearest(weight, grid))
    ]
    assert errors[0] < 0.98 * errors[1]


@pytest.mark.parametrize("quantize", [round_to_nearest, hqq, lambda weight, grid: gptq(weight, torch.eye(32), grid)])
def test_weights_that_are_not_finite_are_refused(quantize) -> None:
    weight = weights(2, 32, seed=0)
    weight[1, 3] = torch.inf
    with pytest.raises(StageError, match="1 of its values NaN or infinite"):
        quantize(weight, Grid(4, 16, symmetric=False))
