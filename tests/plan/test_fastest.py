"""Plans for time. What is fast is the machine's business: here a call takes as long as its weights have bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from modelpress import graph
from modelpress.agreement import Judge, divergence
from modelpress.checkpoint import Checkpoint
from modelpress.config import ExportConfig, PlanConfig
from modelpress.errors import BudgetExceededError, ConfigError, CoverageError, StageError, StoreError
from modelpress.export import export
from modelpress.plan import fastest, outline, show
from modelpress.plan.kernels import Builder, Kernel, products
from modelpress.plan.latency import in_turns
from modelpress.reports import PlanReport
from tests.toys import ImageToy, TextToy

Case = tuple[Any, Checkpoint]


@pytest.fixture(scope="module")
def cnn() -> Case:
    workload = ImageToy()
    return workload, export(workload.module, workload, ExportConfig())[0]


@pytest.fixture(scope="module")
def encoder() -> Case:
    workload = TextToy()
    return workload, export(workload.module, workload, ExportConfig())[0]


def by_bytes(checkpoints: Sequence[Checkpoint]) -> list[float]:
    return [1e-6 * sum(tensor.nbytes for tensor in one.tensors.values()) for one in checkpoints]


def config(**options: Any) -> PlanConfig:
    given = {"objective": "seconds", "group_sizes": [16], "points": 3, "max_disagreement": 1e-3}
    return PlanConfig.model_validate(given | options)


def planned(case: Case, **options: Any) -> tuple[Checkpoint, PlanReport]:
    return fastest.plan(case[1], case[0], config(**options), None, clock=by_bytes)


def test_the_report_says_what_was_measured(encoder: Case) -> None:
    workload, checkpoint = encoder
    made, report = planned(encoder)
    inputs = [batch.inputs for batch in workload.batches("calibration", 8)]
    judge = Judge(checkpoint, inputs, partial(divergence, outputs="logits"))
    assert report.disagreement == pytest.approx(judge.disagreement(made), rel=1e-3)
    assert 0 < report.disagreement <= 1e-3
    assert [report.seconds] == by_bytes([made])
    assert report.float_seconds == pytest.approx(by_bytes([checkpoint])[0], rel=0.01)
    assert report.predicted_seconds == pytest.approx(report.seconds, rel=0.01)
    assert [row.nodes for row in report.tensors] == [["up.MatMul"], ["down.MatMul"]]
    assert any(row.form != "float" for row in report.tensors)
    assert report.coverage == pytest.approx(sum(4096 // 2 for row in report.tensors if row.num_bits) / 7296)
    inline = {one.name: len(one.raw_data) for one in graph.parse(made).graph.initializer}
    for row in report.tensors:
        assert row.inline_bytes == inline.get(f"{row.name}_scale", 0) + inline.get(f"{row.name}_quantized_scale", 0)
        assert row.inline_bytes > 0 or row.form == "float"
    assert [point.label for point in report.uniform] == [
        "int8, activations ranged per call",
        "MatMulNBits of 8 bits, groups of 16",
        "MatMulNBits of 4 bits, groups of 16",
    ]
    costs = [point.seconds for point in report.front]
    assert costs == sorted(costs, reverse=True)


def test_a_larger_budget_takes_no_more_time(encoder: Case) -> None:
    times = [planned(encoder, max_disagreement=budget, points=0)[1].seconds for budget in (3e-6, 1e-4, 1e-1)]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


@pytest.mark.parametrize("kernel", [Kernel(8), Kernel(8, 16), Kernel(4, 32)], ids=str)
def test_every_kernel_multiplies_by_the_weight(encoder: Case, cnn: Case, kernel: Kernel) -> None:
    for workload, checkpoint in (encoder, cnn):
        model = graph.join(checkpoint)
        found = products(model, config())
        made = Builder(model, found).build({one.weight: kernel for one in found})
        onnx.checker.check_model(made)
        wanted = "MatMulInteger" if kernel.group_size is None else "MatMulNBits"
        assert sum(node.op_type == wanted for node in made.graph.node) == 2
        inputs = next(workload.batches("calibration", 8)).inputs
        expected, got = (graph.run(graph.session(graph.split(one)), inputs) for one in (model, made))
        assert np.abs(got - expected).max() < (0.02 if kernel.num_bits == 8 else 0.3) * np.abs(expected).max()
        assert np.abs(got - expected).max() > 0


def test_convolutions_stay_in_float_and_are_refused_by_name(cnn: Case) -> None:
    workload, checkpoint = cnn
    rows = outline(checkpoint, workload, config())
    assert [row.nodes for row in rows] == [["body.7.Gemm"], ["body.9.Gemm"]]
    with pytest.raises(ConfigError, match=r"(?s)planning 'body\.3\.Conv' for time.*a convolution.*leave it out"):
        outline(checkpoint, workload, config(targets=["body.3*", "body.7*"]))
    with pytest.raises(CoverageError, match=r"(?s)no MatMul or Gemm.*quantize\.method 'static'"):
        outline(checkpoint, workload, config(ignore=["body.7*", "body.9*"]))


def test_what_is_not_faster_is_not_taken(encoder: Case) -> None:
    workload, checkpoint = encoder
    with pytest.raises(CoverageError, match=r"(?s)none of int8.*faster than float, for any of 2 products"):
        fastest.plan(checkpoint, workload, config(), None, clock=lambda some: [1.0] * len(some))
    with pytest.raises(BudgetExceededError, match=r"at most 1e-15"):
        planned(encoder, max_disagreement=1e-15)


def test_a_plan_that_is_slower_as_a_whole_is_an_error(encoder: Case) -> None:
    """Each kernel saves alone, and both together do not: what was assumed is measured."""

    def clash(checkpoints: Sequence[Checkpoint]) -> list[float]:
        both = [len([name for name in one.tensors if "_quantized" in name]) == 2 for one in checkpoints]
        return [2.0 if slow else seconds for slow, seconds in zip(both, by_bytes(checkpoints), strict=True)]

    workload, checkpoint = encoder
    with pytest.raises(StageError, match=r"(?s)timing the planned graph.*2000\.000 ms a call"):
        fastest.plan(checkpoint, workload, config(max_disagreement=0.1), None, clock=clash)


def test_calls_are_timed_in_turns(encoder: Case) -> None:
    workload, checkpoint = encoder
    found = in_turns([checkpoint, checkpoint], workload.example(2), 0.01)
    assert len(found) == 2
    assert all(0 < seconds < 60 for seconds in found)


def test_a_plan_is_written_whole_or_not_at_all(encoder: Case, tmp_path: Path) -> None:
    made, report = planned(encoder)
    for link in (False, True):  # come after the look that the command takes before it spends an hour
        if link:
            (tmp_path / "one.png").symlink_to(tmp_path / "nowhere")
        else:
            (tmp_path / "one.json").mkdir()
        with pytest.raises(StoreError, match="one"):
            show.write(made, report, tmp_path, "one")
        assert len(list(tmp_path.iterdir())) == 1
        with pytest.raises(ConfigError, match="nothing of this name"):
            show.check_folder(tmp_path, "one")
        (tmp_path / "one.png").unlink() if link else (tmp_path / "one.json").rmdir()
    written = show.write(made, report, tmp_path, "one")
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert {path.suffix for path in written} >= {".safetensors", ".onnx", ".json", ".png"}
    assert PlanReport.model_validate_json((tmp_path / "one.json").read_bytes()) == report
