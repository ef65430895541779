"""Attributions against gradients taken by hand, and agreement where it must be whole, high and low."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor, nn

from modelpress import attribution
from modelpress.attribution import compare, spearman
from modelpress.checkpoint import Checkpoint, from_module
from modelpress.config import EvaluateConfig, ExportConfig
from modelpress.errors import WorkloadError
from modelpress.evaluate import evaluate
from modelpress.export import export
from tests.toys import ImageToy, TextToy, make_cnn

CONFIG = EvaluateConfig(attribution_samples=10, batch_sizes=[1], latency_seconds=0.01)


class MaskedText(TextToy):
    def blank(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        return {"ids": torch.cat([inputs["ids"][:, :1], torch.zeros_like(inputs["ids"][:, 1:])], dim=1)}


def noisy(module: nn.Module, share: float) -> nn.Module:
    """Every weight with noise of so much of its own spread."""
    changed = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in changed.parameters():
            spread = parameter.std() if parameter.numel() > 1 else 0.0
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread * share)
    return changed


@pytest.mark.parametrize("toy", [ImageToy, MaskedText])
@pytest.mark.parametrize("as_graph", [False, True])
def test_agreement_falls_from_one_as_a_model_is_changed(toy: type[ImageToy] | type[MaskedText], as_graph: bool) -> None:
    workload = toy()

    def checkpoint(share: float) -> Checkpoint:
        module = noisy(workload.module, share)
        return export(module, workload, ExportConfig())[0] if as_graph else from_module(module)

    original = checkpoint(0.0)
    same, near, far = (compare(original, checkpoint(share), workload, CONFIG) for share in (0.0, 0.05, 3.0))
    assert same.agreement == pytest.approx(1.0)
    assert [one.agreement for one in far.examples] == sorted(one.agreement for one in far.examples)
    assert far.examples[0].agreement < far.agreement < far.examples[-1].agreement
    for one in far.examples:
        assert len(one.places) == len(one.before) == len(one.after) > 2
        assert attribution.spearman(np.array(one.before), np.array(one.after)) == pytest.approx(one.agreement, abs=0.05)
        assert (one.rows, one.columns) == ((8, 8) if toy is ImageToy else (None, None))
    assert 0.9 < near.agreement <= 1.0
    assert far.agreement < near.agreement - 0.2
    assert near.low <= near.agreement <= near.high
    assert near.method == ("occlusion" if as_graph else "integrated-gradients")
    assert near.samples == 10


class Quadratic(nn.Module):
    """f = w · x², whose integrated gradients from 0 are w · x² by element."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 64).reshape(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        total = (self.weight * x[:, 0].square()).sum((1, 2))
        return torch.stack([total, torch.full_like(total, -1e9)], dim=1)


class QuadraticToy(ImageToy):
    def skeleton(self, architecture: object) -> nn.Module:
        return Quadratic()


def test_attributions_are_those_of_the_function() -> None:
    workload, module = QuadraticToy(Quadratic()), Quadratic()
    inputs = next(workload.batches("evaluation", 1)).inputs
    parts = attribution._parts(workload, inputs)
    expected = (module.weight * inputs["x"][0, 0].square()).detach().flatten().numpy()
    _, gradients = attribution._by_gradients(from_module(module), workload, CONFIG)(inputs, parts, None)
    np.testing.assert_allclose(gradients, expected, atol=1e-5)
    graph = export(module, workload, ExportConfig())[0]
    _, occlusion = attribution._by_occlusion(graph, workload, CONFIG)(inputs, parts, None)
    np.testing.assert_allclose(occlusion, expected, atol=1e-4)


def test_what_is_blank_is_no_part() -> None:
    workload = ImageToy()
    image = torch.zeros(1, 3, 16, 16)
    image[0, 1, 2:4, 4:8] = 1.0  # two fields of the 8 × 8 grid
    parts = attribution._parts(workload, {"x": image})
    assert parts.shape == (3, 16, 16)
    assert (parts[:, 2:4, 4:6] == 0).all()
    assert (parts[:, 2:4, 6:8] == 1).all()
    assert int((parts >= 0).sum()) == 2 * 4 * 3
    assert attribution._places(ImageToy(), {"x": image}) == ([8 + 2, 8 + 3], (8, 8))
    small = torch.zeros(1, 1, 2, 3)
    small[0, 0, 1, 2] = 1.0
    assert attribution._places(ImageToy(), {"x": small}) == ([5], (2, 3))
    assert attribution._places(MaskedText(), {"ids": torch.tensor([[0, 5, 0, 7]])}) == ([1, 3], None)
    text = attribution._parts(MaskedText(), {"ids": torch.tensor([[0, 5, 0, 7]])})
    assert text.tolist() == [-1, 0, -1, 1]


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=20))
def test_spearman_is_scipys_and_knows_constants(pairs: list[tuple[int, int]]) -> None:
    first, second = np.array(pairs, np.float64).T
    constants = [np.ptp(first) == 0, np.ptp(second) == 0]
    if any(constants):
        assert spearman(first, second) == float(all(constants))
    else:
        assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)


def test_evaluation_reports_it_where_asked() -> None:
    workload = ImageToy()
    original = from_module(workload.module)
    changed = from_module(noisy(workload.module, 0.05))
    report, scores = evaluate(changed, workload, CONFIG, "prune", None, 1, original=original)
    assert report.attribution is not None
    assert report.metrics()["attribution.agreement"] == report.attribution.agreement
    off = CONFIG.model_copy(update={"attribution_samples": 0})
    without, again = evaluate(changed, workload, off, "prune", None, 1, original=original)
    assert without.attribution is None
    np.testing.assert_array_equal(scores.scores, again.scores)


def test_what_cannot_be_compared_is_refused_by_name() -> None:
    workload = ImageToy()
    torch_one = from_module(workload.module)
    with pytest.raises(WorkloadError, match="onnx checkpoint and a torch original"):
        compare(torch_one, export(make_cnn(), workload, ExportConfig())[0], workload, CONFIG)
    text = TextToy()
    with pytest.raises(WorkloadError, match=r"0 inputs of floats among ids, mask(.|\n)*Workload.blank"):
        compare(from_module(text.module), from_module(text.module), text, CONFIG)

    class Odd(ImageToy):
        def blank(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
            return {"x": torch.zeros(1, 1, 4, 4)}

    with pytest.raises(WorkloadError, match=r"x \[1, 1, 4, 4\](.|\n)*one of x, in its shape"):
        compare(torch_one, torch_one, Odd(), CONFIG)

    class Black(ImageToy):
        def blank(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
            return dict(inputs)

    with pytest.raises(WorkloadError, match="no sample in which 3 parts differ"):
        compare(torch_one, torch_one, Black(), CONFIG)


def test_occlusions_run_in_batches_that_the_workload_can_bear(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, sizes = ImageToy(), []
    monkeypatch.setattr(ImageToy, "evaluation_batch_size", 5)
    exported = export(workload.module, workload, ExportConfig())[0]
    original = attribution.graph.run

    def spy(session: object, inputs: dict[str, Tensor]) -> np.ndarray:
        sizes.append(len(inputs["x"]))
        return original(session, inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(attribution.graph, "run", spy)
    found = compare(exported, exported, workload, EvaluateConfig(attribution_samples=1))
    assert max(sizes) == 5
    assert sum(sizes) == 1 + 2 * 65
    assert (found.agreement, found.high) == (pytest.approx(1.0), pytest.approx(1.0))
    assert found.low < 0.5  # one sample says little
