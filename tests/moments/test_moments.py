"""Second moments and their factors: the energy of outputs, errors, and what is singular."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from modelpress.errors import StageError
from modelpress.layerwise import LayerInputs, walk_
from modelpress.moments import InverseFactor, flat_weight, output_error
from modelpress.workload import Batch

CONVOLUTIONS = {
    "2-D": (nn.Conv2d(3, 4, 3, padding=1, stride=2), (3, 9, 9)),
    "2-D, dilated": (nn.Conv2d(3, 4, (3, 2), dilation=2), (3, 9, 9)),
    "2-D, same": (nn.Conv2d(3, 4, 4, padding="same"), (3, 7, 6)),
    "2-D, reflected": (nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), (3, 7, 6)),
    "1-D": (nn.Conv1d(3, 4, 5, padding=2, stride=2), (3, 11)),
    "1-D, circular": (nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (3, 11)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolutions_moments_give_the_energy_of_its_outputs(case: str) -> None:
    """tr(W H Wᵀ) = Σ y² without the bias: what every method that takes H relies on."""
    layer, shape = CONVOLUTIONS[case]
    layer = copy.deepcopy(layer)
    nn.init.zeros_(layer.bias)
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    seen: list[LayerInputs] = []
    walk_(nn.ModuleDict({"a": layer})["a"], [""], [Batch({"input": x})], seen.append)
    weight, output = flat_weight(layer).double(), layer(x).double()
    energy = ((weight @ seen[0].second_moment) * weight).sum(dim=1)
    assert torch.allclose(energy, output.square().transpose(0, 1).flatten(1).sum(dim=1), rtol=1e-4)
    assert seen[0].rows == output.numel() // 4


@pytest.mark.parametrize("features", [1, 127, 128, 129, 300])
def test_a_factor_shares_the_matrix_with_the_moments_that_it_is_of(features: int) -> None:
    """UᵀU is the damped inverse; what stands on and below the diagonal stays, so that errors still read it."""
    x = torch.randn(2 * features, features, generator=torch.Generator().manual_seed(features)).double()
    h = x.T @ x
    h = h.tril() + h.tril(-1).T
    shared = h.clone()
    factor = InverseFactor(shared, 0.01, "a").rows(0, features)
    epsilon = 0.01 * h.diagonal().mean() * torch.eye(features)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor @ (h + epsilon), torch.eye(features).double(), atol=1e-9)
    assert torch.equal(shared.tril(), h.tril())
    assert torch.equal(InverseFactor(shared, 0.01, "a").rows(0, features), factor)  # again, for the next layer
    before = torch.randn(70, features).double()
    after, mask = before * 0.9, torch.rand(70, features) < 0.5
    for given in (None, mask):
        change = before - (after if given is None else after * given)
        expected = float(((change @ h) * change).sum() / ((before @ h) * before).sum())
        assert output_error(before, after, shared, given) == pytest.approx(expected, rel=1e-9)


def test_a_singular_moment_is_named() -> None:
    with pytest.raises(StageError, match=r"inputs of up(.|\n)*singular matrix of 200 features"):
        InverseFactor(torch.ones(200, 200, dtype=torch.float64), 0.0, "up")
