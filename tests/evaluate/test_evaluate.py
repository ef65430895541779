from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from modelpress import graph, intervals
from modelpress.checkpoint import Checkpoint, from_module
from modelpress.config import EvaluateConfig, ExportConfig
from modelpress.errors import BudgetExceededError, SetupError, WorkloadError
from modelpress.evaluate import check_budget, evaluate, quality
from modelpress.export import export
from modelpress.reports import EvaluationReport, QualityReport
from modelpress.scores import Scored
from modelpress.workload import samples_digest
from tests.toys import ImageToy

QUICK = EvaluateConfig(batch_sizes=[1, 8], latency_seconds=0.02)


@pytest.fixture(scope="module")
def workload() -> ImageToy:
    return ImageToy(samples=150)


@pytest.fixture(scope="module")
def exported(workload: ImageToy) -> Checkpoint:
    return export(workload.module, workload, ExportConfig())[0]


def test_torch_and_onnx_get_the_same_quality(workload: ImageToy, exported: Checkpoint) -> None:
    source, scores = evaluate(from_module(workload.module), workload, QUICK, "source", None, 1000)
    after, again = evaluate(exported, workload, QUICK, "export", scores, 900)
    np.testing.assert_array_equal(scores.scores, again.scores)
    assert scores.samples == again.samples
    assert (source.runtime, source.provider) == ("torch", None)
    assert (after.runtime, after.provider) == ("onnxruntime", "CPUExecutionProvider")
    assert (source.size_bytes, after.size_bytes) == (1000, 900)
    assert source.quality.difference is None
    assert after.quality.difference == 0.0
    assert after.quality.baseline == source.quality.value


def test_the_quality_is_the_metrics_own(workload: ImageToy) -> None:
    with torch.inference_mode():
        outputs = torch.cat([workload.module(**batch.inputs) for batch in workload.batches("evaluation", 150)])
    expected = workload.score(outputs.numpy())
    report, scores = evaluate(from_module(workload.module), workload, QUICK, "source", None, 1)
    np.testing.assert_array_equal(scores.scores, expected)
    interval = intervals.wilson(int(expected.sum()), 150, 0.95)
    found = report.quality
    assert (found.value, found.low, found.high) == (interval.value, interval.low, interval.high)
    assert (found.metric, found.samples, found.confidence) == ("accuracy", 150, 0.95)


def test_every_batch_size_is_measured(workload: ImageToy, exported: Checkpoint) -> None:
    report, _ = evaluate(exported, workload, QUICK, "export", None, 1)
    assert [row.batch_size for row in report.latency] == [1, 8]
    for row in report.latency:
        assert row.calls >= 5
        assert 0 < row.p50_seconds <= row.p99_seconds
        mean = row.batch_size / row.throughput_per_second
        assert mean <= row.p99_seconds * row.calls
    flat = report.metrics()
    assert flat["latency.b8.throughput_per_second"] == report.latency[1].throughput_per_second


def test_memory_that_was_taken_shows(workload: ImageToy) -> None:
    class Hungry(ImageToy):
        def score(self, outputs: np.ndarray) -> np.ndarray:
            self.held = np.ones(2**25)
            torch.zeros(1)
            import time

            time.sleep(0.2)
            return super().score(outputs)

    report, _ = evaluate(from_module(workload.module), Hungry(), QUICK, "source", None, 1)
    assert report.peak_memory_bytes is not None
    assert report.peak_memory_bytes > 2**25 * 8 * 0.9


def test_the_number_of_torch_threads_is_given_back(workload: ImageToy) -> None:
    before = torch.get_num_threads()
    evaluate(from_module(workload.module), workload, QUICK.model_copy(update={"threads": 3}), "source", None, 1)
    assert torch.get_num_threads() == before


def test_progress_moves_and_ends(workload: ImageToy, exported: Checkpoint) -> None:
    seen: list[tuple[int, int, str]] = []
    evaluate(exported, workload, QUICK, "export", None, 1, lambda *call: seen.append(call))
    assert seen[-1][:2] == (3, 3)
    assert any("150 samples" in note for _, _, note in seen)


def test_a_missing_provider_is_an_error(workload: ImageToy, exported: Checkpoint) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, where the provider starts")
    with pytest.raises(SetupError, match="CUDAExecutionProvider"):
        evaluate(exported, workload, QUICK.model_copy(update={"provider": "CUDAExecutionProvider"}), "export", None, 1)


@pytest.mark.parametrize(
    "scores", [np.array([]), np.ones((150, 2)), np.full(150, np.nan), np.array([1.0, np.inf])], ids=str
)
def test_scores_that_are_no_finite_vector_are_refused(workload: ImageToy, scores: np.ndarray) -> None:
    class Broken(ImageToy):
        def score(self, outputs: np.ndarray) -> np.ndarray:
            return scores

    with pytest.raises(WorkloadError, match="accuracy"):
        evaluate(from_module(workload.module), Broken(), QUICK, "source", None, 1)


def test_scores_that_cannot_be_paired_are_refused(workload: ImageToy, exported: Checkpoint) -> None:
    samples = samples_digest(workload)
    with pytest.raises(WorkloadError, match="150 scores"):
        evaluate(exported, workload, QUICK, "export", Scored(np.ones(149), samples, "accuracy"), 1)
    with pytest.raises(WorkloadError, match="scores of other samples"):
        evaluate(exported, workload, QUICK, "export", Scored(np.ones(150), "others", "accuracy"), 1)
    with pytest.raises(WorkloadError, match="no scores"):
        evaluate(exported, workload, QUICK, "export", Scored(None, samples, "accuracy"), 1)


class Sliced(ImageToy):
    """Two groups that overlap, and a second metric."""

    masks: Any = None

    def slices(self) -> dict[str, np.ndarray]:
        return self.masks or {"first": np.arange(150) < 50, "even": np.arange(150) % 2 == 0}

    def further_scores(self, outputs: np.ndarray) -> dict[str, np.ndarray]:
        return {"margin": outputs.max(1)}


def test_slices_and_further_metrics_travel_with_the_scores(workload: ImageToy, exported: Checkpoint) -> None:
    _, source = evaluate(from_module(workload.module), Sliced(samples=150), QUICK, "source", None, 1)
    report, found = evaluate(exported, Sliced(samples=150), QUICK, "export", source, 1)
    assert {name: int(mask.sum()) for name, mask in found.slices.items()} == {"first": 50, "even": 75}
    assert set(found.further) == {"margin"}
    assert report.further[0].baseline == pytest.approx(float(source.further["margin"].mean()))
    assert report.further[0].difference == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    "masks", [{"a": np.ones(150)}, {"a": np.ones(149, dtype=bool)}, {"": np.ones(150, dtype=bool)}], ids=str
)
def test_a_slice_that_does_not_say_of_each_sample_is_refused(workload: ImageToy, masks: dict[str, np.ndarray]) -> None:
    sliced = Sliced(samples=150)
    sliced.masks = masks
    with pytest.raises(WorkloadError, match="reading slice"):
        evaluate(from_module(workload.module), sliced, QUICK, "source", None, 1)


def report_with(found: QualityReport) -> EvaluationReport:
    return EvaluationReport(stage="quantize", runtime="onnxruntime", quality=found, size_bytes=1, latency=[])


def test_the_budget_is_spent_only_by_the_whole_interval() -> None:
    baseline = np.ones(1000)
    dropped = baseline.copy()
    dropped[:60] = 0
    report = report_with(quality("accuracy", dropped, baseline, 0.95))
    with pytest.raises(BudgetExceededError) as caught:
        check_budget(report, EvaluateConfig(max_quality_drop=0.02))
    assert "0.9400 against the source model's 1.0000" in str(caught.value.found)
    assert "0.0600" in str(caught.value.found)
    assert "0.0200" in str(caught.value.expected)
    assert caught.value.exit_code == 6
    # The interval reaches below 0.05: this may be noise.
    check_budget(report, EvaluateConfig(max_quality_drop=0.05))
    check_budget(report_with(quality("accuracy", baseline, baseline, 0.95)), EvaluateConfig(max_quality_drop=0.0))
    check_budget(report_with(quality("accuracy", dropped, None, 0.95)), EvaluateConfig(max_quality_drop=0.0))


def test_a_broken_graph_does_not_pass_for_a_slow_one(workload: ImageToy, exported: Checkpoint) -> None:
    other = Checkpoint("onnx", exported.tensors, {graph.GRAPH_FILE: exported.files[graph.GRAPH_FILE]})
    renamed = type(
        "Renamed", (ImageToy,), {"batches": lambda self, *a: (_rename(b) for b in ImageToy.batches(self, *a))}
    )
    with pytest.raises(WorkloadError, match="'x'"):
        evaluate(other, renamed(), QUICK, "export", None, 1)


def _rename(batch):
    return type(batch)({"pixels": batch.inputs["x"]})
