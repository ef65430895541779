"""Pruning by calibration data: exact zeros, the paper's choices, and errors that rank as the methods promise."""

from __future__ import annotations

import copy
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from modelpress.config import PruneConfig
from modelpress.errors import CoverageError, StageError
from modelpress.moments import InverseFactor
from modelpress.prune import masks, prune_
from modelpress.prune.magnitude import prune_magnitude_
from modelpress.prune.masks import least, least_in_groups, least_in_rows
from modelpress.prune.sparsegpt import BLOCK, sparsify
from modelpress.prune.wanda import norms_of
from modelpress.prune.zeros import prunable_weights
from tests.prune.models import Bert
from tests.train.toy import Toy

METHODS = ["magnitude", "wanda", "sparsegpt"]


def net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 2, bias=False), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 3)),
    )


def workload() -> Toy:
    return Toy(net, shape=(4, 5, 5))


def moment(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


def correlated(rows: int, features: int, seed: int = 0) -> Tensor:
    """Inputs of a few directions and some noise, of very different sizes: as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features // 3, features, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, features // 3, generator=generator, dtype=torch.float64) @ mix
    noise = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(-0.5, 0.5, features, dtype=torch.float64)[torch.randperm(features, generator=generator)]
    return (x + 0.5 * noise) * sizes


@settings(max_examples=15, deadline=None)
@given(method=st.sampled_from(METHODS), sparsity=st.floats(0.02, 0.9))
def test_the_zeros_are_exact(method: str, sparsity: float) -> None:
    """In each matrix; of Wanda in each row; and the report counts them."""
    toy = workload()
    module = toy.source()
    report = prune_(module, toy, PruneConfig(method=method, sparsity=sparsity))
    rows = {change.name: change for change in report.tensors}
    for name, weight in prunable_weights(module).items():
        flat = weight.flatten(1)
        if method == "wanda":
            assert ((flat == 0).sum(dim=1) == round(sparsity * flat.shape[1])).all()
        else:
            assert int((flat == 0).sum()) == round(sparsity * flat.numel())
        if (flat == 0).any():
            assert rows[f"{name}.weight"].zeros == int((flat == 0).sum())
    assert report.zeros_after == sum(row.zeros for row in report.tensors)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("method", METHODS)
def test_every_group_has_its_pattern(method: str, pattern: str) -> None:
    toy = workload()
    module = toy.source()
    prune_(module, toy, PruneConfig(method=method, pattern=pattern, ignore=["body.0"] if pattern == "4:8" else []))
    zeros, size = map(int, pattern.split(":"))
    for name, weight in prunable_weights(module).items():
        if pattern == "2:4" or name != "body.0":
            groups = weight.flatten(1).reshape(-1, size)
            assert ((groups == 0).sum(dim=1) == zeros).all(), name


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.integers(1, 7),
    groups=st.integers(1, 40),
    pattern=st.sampled_from([(2, 4), (4, 8)]),
    levels=st.booleans(),
)
def test_sparsegpt_holds_patterns_of_any_shape(
    outputs: int, groups: int, pattern: tuple[int, int], levels: bool
) -> None:
    """Also over several blocks of columns, and where all scores are equal."""
    zeros, size = pattern
    features = groups * size
    torch.manual_seed(groups)
    weight = torch.ones(outputs, features).double() if levels else torch.randn(outputs, features).double()
    factor = InverseFactor(moment(correlated(2 * features, features)), 0.01, "a").rows
    config = PruneConfig(method="sparsegpt", pattern=f"{zeros}:{size}")
    after, mask = sparsify(weight, factor, config)
    assert ((~mask).reshape(-1, size).sum(dim=1) == zeros).all()
    assert torch.equal(after == 0, ~mask)


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.integers(1, 6), features=st.integers(3, 300), first=st.floats(0.01, 0.9), more=st.floats(0, 1),
)  # fmt: skip
def test_sparsegpt_is_exact_overall_even_in_blocks_and_only_grows(
    outputs: int, features: int, first: float, more: float
) -> None:
    weight = torch.randn(outputs, features, generator=torch.Generator().manual_seed(features)).double()
    factor = torch.eye(features, dtype=torch.float64) + 0.3 * torch.ones(features, features).triu(1).double()
    second = first + more * (0.95 - first)

    def rows(start: int, end: int) -> Tensor:
        return factor[start:end, start:]

    after, mask = sparsify(weight, rows, PruneConfig(method="sparsegpt", sparsity=first))
    assert int((~mask).sum()) == round(first * weight.numel())
    for start in range(0, features, BLOCK):
        block = mask[:, start : start + BLOCK]
        assert abs(int((~block).sum()) - first * block.numel()) <= 1
    again, grown = sparsify(after, rows, PruneConfig(method="sparsegpt", sparsity=second), mask)
    assert int((~grown).sum()) == round(second * weight.numel())
    assert not (grown & ~mask).any()
    assert torch.equal(again[~grown], torch.zeros_like(again[~grown]))


@settings(max_examples=60, deadline=None)
@given(
    scores=arrays(np.float32, st.integers(1, 60), elements=st.sampled_from([-1.0, 0.0, 0.5, 0.75, 2.0])),
    share=st.floats(0, 1),
    together=st.sampled_from([1, 7, 2**18]),
)
def test_the_least_are_those_that_a_stable_sort_puts_first(
    scores: npt.NDArray[np.float32], share: float, together: int
) -> None:
    given_, count = torch.from_numpy(scores), int(share * len(scores))
    expected = torch.ones(len(scores), dtype=torch.bool)
    expected[torch.argsort(given_, stable=True)[:count]] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "TIES", together)
        assert torch.equal(least(given_, count), expected)
    assert scores.tolist() == given_.tolist()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_errors_rank_as_the_papers_say(pattern: str) -> None:
    """‖(W − W')X‖ of SparseGPT is below Wanda's, and that below the magnitude's, where inputs depend on each other."""
    features = 192
    x = correlated(2000, features)
    weight = torch.randn(64, features, generator=torch.Generator().manual_seed(1)).double()
    h = moment(x)
    config = PruneConfig(method="sparsegpt", pattern=pattern)
    by_wanda = weight.abs() * norms_of(h)

    def by_pattern(scores: Tensor) -> Tensor:
        return least_in_groups(scores, 2, 4)

    def error(after: Tensor) -> float:
        return float(((weight - after) @ x.T).norm())

    errors = [
        error(sparsify(weight, InverseFactor(h.clone(), 0.01, "a").rows, config)[0]),
        error(weight * (by_pattern(by_wanda) if pattern == "2:4" else least_in_rows(by_wanda, features // 2))),
        error(weight * (by_pattern(weight.abs()) if pattern == "2:4" else least(weight.abs(), weight.numel() // 2))),
    ]
    assert errors[0] < 0.8 * errors[1] < 0.8 * 0.9 * errors[2]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsegpt_on_orthogonal_inputs_is_magnitude_pruning(pattern: str) -> None:
    """H = cI: no weight can make up for another."""
    weight = torch.randn(24, BLOCK, generator=torch.Generator().manual_seed(0)).double()
    config = PruneConfig(method="sparsegpt", pattern=pattern, sparsity=0.5)
    after, mask = sparsify(weight, InverseFactor(7 * torch.eye(BLOCK, dtype=torch.float64), 0.01, "a").rows, config)
    scores = weight.abs()
    assert torch.equal(mask, least_in_groups(scores, 2, 4) if pattern == "2:4" else least(scores, scores.numel() // 2))
    assert torch.allclose(after, weight * mask)


def test_sparsegpt_of_one_output_is_the_optimal_brain_surgeon() -> None:
    """With its mask given, columns before a removed one stay: those after it are the least-squares answer."""
    x = correlated(300, 9, seed=3)
    weight = torch.randn(2, 9, generator=torch.Generator().manual_seed(2)).double()
    weight[:, 0] *= 1e-6  # the one to go is the first, so that all others may make up for it
    config = PruneConfig(method="sparsegpt", sparsity=1 / 9)
    after, mask = sparsify(weight, InverseFactor(moment(x), 0.0, "a").rows, config)
    assert not mask[:, 0].any()
    best = torch.linalg.lstsq(x[:, 1:], x @ weight.T).solution.T
    assert torch.allclose(after[:, 1:], best, rtol=1e-8)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_pruned_equals_masked(method: str, pattern: str) -> None:
    toy = workload()
    dense = toy.source()
    pruned = copy.deepcopy(dense)
    prune_(pruned, toy, PruneConfig(method=method, pattern=pattern))
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        for name, weight in prunable_weights(masked).items():
            weight.mul_(pruned.get_submodule(name).weight != 0)
    assert (pruned(toy.x) - masked(toy.x)).abs().max() < 1e-5
    assert (pruned(toy.x) - dense(toy.x)).abs().max() > 1e-3


def test_the_report_says_how_far_each_layer_is_off() -> None:
    """Of the first layer, whose inputs nothing has changed: by running it."""
    toy = workload()
    dense = toy.source()
    for method in ("wanda", "sparsegpt"):
        pruned = copy.deepcopy(dense)
        row = prune_(pruned, toy, PruneConfig(method=method)).tensors[0]
        x, bias = toy.x[toy.rows["calibration"]], dense.body[0].bias.view(1, -1, 1, 1)
        y, after = (dense.body[0](x) - bias).detach(), (pruned.body[0](x) - bias).detach()
        assert row.name == "body.0.weight"
        assert row.calibration_rows == 24 * 9
        assert row.output_error == pytest.approx(float((y - after).square().sum() / y.square().sum()), rel=1e-4)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_an_encoder_keeps_most_by_sparsegpt(pattern: str) -> None:
    toy = Toy(Bert, (12,), samples=240)
    dense = toy.source()
    error = []
    for method in ("sparsegpt", "wanda", "magnitude"):
        module = copy.deepcopy(dense)
        prune_(module, toy, PruneConfig(method=method, pattern=pattern, ignore=["body.head"]))
        after, before = (m.body.bert(**tokens(toy))[0].detach() for m in (module, dense))
        error.append(float((after - before).square().mean()))
    assert error[0] < 0.8 * min(error[1:])


def tokens(toy: Toy) -> dict[str, Tensor]:
    return {"input_ids": (toy.x.abs() * 10).long().clamp(max=29)}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_inputs_that_are_always_zero_do_no_harm(method: str, pattern: str) -> None:
    """One column in four, and a layer all of whose inputs are zero."""
    toy = Toy(lambda: nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)), (16,))
    toy.x[:, 3::4] = 0
    module = toy.source()
    with torch.no_grad():
        module.body[0].bias.fill_(-1e3)  # the ReLU gives nothing
    prune_(module, toy, PruneConfig(method=method, pattern=pattern))
    for weight in prunable_weights(module).values():
        assert torch.isfinite(weight).all()
        assert int((weight == 0).sum()) == weight.numel() // 2
    first, last = module.body[0].weight, module.body[2].weight
    if pattern == "unstructured" and method == "wanda":
        assert not first[:, 3::4].any()
    original = toy.source().body[2].weight
    assert original[last == 0].abs().mean() < original[last != 0].abs().mean()


def test_a_singular_hessian_is_dampened_or_named() -> None:
    toy = Toy(lambda: nn.Linear(8, 6), (8,))
    toy.x[:, 1] = toy.x[:, 0]
    module = toy.source()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(StageError, match=r"inputs of body(.|\n)*singular(.|\n)*raise the damping"):
        prune_(module, toy, PruneConfig(method="sparsegpt", damping=0.0))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    prune_(module, toy, PruneConfig(method="sparsegpt", damping=0.01))
    assert torch.isfinite(module.body.weight).all()


@pytest.mark.parametrize("method", METHODS)
def test_errors_come_before_anything_changed(method: str) -> None:
    toy = Toy(lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), (8,))
    module = toy.source()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(StageError, match=r"body\.2 by pattern 2:4(.|\n)*6 inputs(.|\n)*multiple of 4(.|\n)*ignore"):
        prune_(module, toy, PruneConfig(method=method, pattern="2:4"))
    with pytest.raises(CoverageError, match="would become zero"):
        prune_(module, toy, PruneConfig(method=method, sparsity=0.99))
    with pytest.raises(CoverageError, match="removes nothing"):
        prune_(module, toy, PruneConfig(method=method, sparsity=0.001))
    if method != "magnitude":
        few = Toy(toy.make, (8,), samples=40)
        with pytest.raises(StageError, match=r"body\.0(.|\n)*10 rows(.|\n)*calibration_samples"):
            prune_(module, few, PruneConfig(method=method))
        few.x[few.rows["calibration"][0]] = math.nan
        with pytest.raises(StageError, match=r"body\.0(.|\n)*NaN"):
            prune_(module, few, PruneConfig(method=method))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_magnitude_needs_no_data() -> None:
    toy = workload()
    toy.rows["calibration"] = torch.arange(0)
    prune_magnitude_(toy.source(), toy, PruneConfig(method="magnitude"), lambda *_: None, {})
