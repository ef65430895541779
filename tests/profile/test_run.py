"""A whole profile of a small pack: every part, by real processes, then as JSON, as words, as plots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from modelpress import golden
from modelpress.checkpoint import Checkpoint, from_module
from modelpress.config import CompressConfig, ExportConfig, ProfileConfig
from modelpress.errors import ConfigError, StageError, WorkloadError
from modelpress.export import export
from modelpress.profile import figures, packed, show
from modelpress.profile.run import Subject, profile
from modelpress.profile.samples import golden_example
from modelpress.reports import Measured, NotMeasured, ProfileReport
from tests.toys import ImageToy

CONFIG = ProfileConfig(
    threads=1, batch_sizes=[4, 1], seconds=0.05, loads=[1.2, 0.5], prices={"small": 0.5}, bandwidths={"slow": 1e6}
)


@pytest.fixture(scope="module")
def graph_of_toy() -> Checkpoint:
    toy = ImageToy()
    exported, _ = export(toy.source(), toy, ExportConfig())
    return exported


@pytest.fixture(scope="module")
def report(graph_of_toy: Checkpoint) -> ProfileReport:
    steps: list[str] = []
    subject = Subject("toy", graph_of_toy, ImageToy().example)
    found = profile(subject, CONFIG, CompressConfig(), lambda _done, _of, note="": steps.append(note))
    assert len(steps) == len(set(steps)) == 7
    return found


def measured(figure: object) -> float:
    assert isinstance(figure, Measured), figure
    return figure.value


def test_every_part_is_there(report: ProfileReport) -> None:
    assert (report.runtime, report.provider, report.batch_size) == ("onnxruntime", "CPUExecutionProvider", 1)
    assert [row.batch_size for row in report.latency] == [1, 4]
    assert [row.utilisation for row in report.load] == pytest.approx([0.5, 1.2])
    assert len({one.name for one in report.operators}) == len(report.operators) >= 4
    shares = [measured(one.share) for one in report.operators]
    assert sum(shares) == pytest.approx(1.0)
    parts = [measured(getattr(report.cold_start, name)) for name in type(report.cold_start).model_fields]
    assert parts[-1] == pytest.approx(sum(parts[:-1]))
    assert all(part > 0 for part in parts)
    assert measured(report.storage.stored_bytes) > 0
    assert measured(report.storage.decode_seconds) > 0
    (transfer,) = report.storage.transfers
    assert measured(transfer.modelled_seconds) == pytest.approx(measured(report.storage.stored_bytes) / 1e6)
    (cost,) = report.costs
    best = max(row.throughput_per_second for row in report.latency)
    assert measured(cost.total_per_million) == pytest.approx(1e6 / best / 3600 * 0.5)
    assert report.verdict.binds == report.verdict.resources[0].resource


def test_memory_is_that_of_a_new_process(report: ProfileReport) -> None:
    memory = report.memory
    assert memory.weights_bytes == 4 * (864 + 3072)  # smaller ones stay in the graph's file
    assert measured(memory.peak_resident_bytes) > measured(memory.rise_resident_bytes) > 0
    assert len(memory.timeline) <= packed.MAX_POINTS
    marks = ", ".join(point.mark for point in memory.timeline if point.mark).split(", ")
    assert marks == ["import", "fetch", "verify", "decode", "session", "first answer", "batch 1", "batch 4"]
    assert [point.seconds for point in memory.timeline] == sorted(point.seconds for point in memory.timeline)


def test_what_was_not_measured_has_a_reason_and_no_number(report: ProfileReport) -> None:
    reasons = report.unmeasured()
    assert reasons["memory.device_bytes"] == "the model does not compute on a GPU"
    assert "memory.device_bytes" not in report.metrics()
    assert all(reasons.values())


def test_metrics_have_names_that_a_tracker_takes(report: ProfileReport) -> None:
    metrics = report.metrics()
    legal = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-. :/")
    assert not [name for name in metrics if set(name) - legal]
    assert metrics["totals.flops"] == sum(measured(one.flops) for one in report.operators)
    assert metrics["load.120_percent.requests"] >= 20
    assert metrics["matrix.float32_flops_per_second"] > 0
    assert metrics["cost.small.total_per_million"] > 0


def test_json_comes_back_as_it_was(report: ProfileReport) -> None:
    assert ProfileReport.model_validate_json(report.model_dump_json()) == report


def test_words_tell_all_operators_and_the_verdict(report: ProfileReport) -> None:
    rows = show.operators(report, most=3)
    assert len(rows) == 3
    assert len(show.operators(report, most=1000)) == len(report.operators)
    told = {row["figure"]: row for row in show.figures(report)}
    assert told["energy, GPU"] == {
        "figure": "energy, GPU",
        "value": show.UNKNOWN,
        "": "not measured: the model does not compute on a GPU",
    }
    assert told["a million on small"]["value"].endswith("USD")
    assert [row["resource"] for row in show.verdict(report)] == [row.resource for row in report.verdict.resources]
    assert len(show.loads(report)) == len(show.latencies(report)) == 2
    assert any("products: float32" in line for line in show.machine(report))


def test_plots_show_something(report: ProfileReport, tmp_path: Path) -> None:
    written = figures.draw(report, tmp_path)
    assert [path.name for path in written] == ["roofline.png", "latency.png", "memory.png"]
    for path in written:
        pixels = imread(path)
        assert pixels.shape[2] == 4
        assert (pixels[..., 3] > 0).mean() > 0.005, path  # ink
        assert (pixels[..., 3] == 0).mean() > 0.3, path  # on no paper of its own
    nothing = report.model_copy(
        update={
            "operators": [],
            "latency": [],
            "load": [],
            "memory": report.memory.model_copy(update={"timeline": []}),
        }
    )
    assert figures.draw(nothing, tmp_path / "none") == []


def test_a_torch_module_has_no_pack_and_says_so() -> None:
    toy = ImageToy()
    module = toy.source()
    config = ProfileConfig(runtime="torch", threads=1, batch_sizes=[1], seconds=0.02, loads=[])
    threads = torch.get_num_threads()
    found = profile(Subject("toy", from_module(module), toy.example, module=module), config)
    assert torch.get_num_threads() == threads
    assert (found.runtime, found.provider, found.load) == ("torch", None, [])
    assert measured(found.memory.activations_bytes) > 0
    assert isinstance(found.cold_start.total_seconds, NotMeasured)
    assert isinstance(found.storage.stored_bytes, NotMeasured)
    assert {one.op_type for one in found.operators} >= {"Conv2d", "Linear"}
    assert found.verdict.binds in ("compute", "memory-bandwidth", "latency")


def test_runtime_and_model_must_fit(graph_of_toy: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="runtime"):
        profile(Subject("toy", graph_of_toy, ImageToy().example), ProfileConfig(runtime="torch"))


def test_a_damaged_pack_stops_the_start_with_its_own_words(graph_of_toy: Checkpoint, tmp_path: Path) -> None:
    placed = packed.put_away(graph_of_toy, "toy", None, tmp_path)
    (shard,) = placed.manifest.shards
    path = next(tmp_path.glob(f"store/**/{shard.sha256}"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(data))
    with pytest.raises(StageError) as raised:
        packed.start_anew(placed, "CPUExecutionProvider", 1, [ImageToy().example(1)], tmp_path, watch=False)
    assert shard.sha256 in str(raised.value)


def test_golden_samples_stand_in_for_data(graph_of_toy: Checkpoint) -> None:
    inputs = {name: tensor.numpy() for name, tensor in ImageToy().example(3).items()}
    kept = golden.make(graph_of_toy, inputs, classes=False)
    assert kept is not None
    whole = Checkpoint("onnx", graph_of_toy.tensors, graph_of_toy.files | {golden.GOLDEN_FILE: kept.to_bytes()})
    (found,) = golden_example(whole, "toy")(7).values()
    assert found.shape[0] == 7
    assert np.array_equal(found[3:6].numpy(), next(iter(inputs.values())))
    with pytest.raises(WorkloadError, match="--recipe"):
        golden_example(graph_of_toy, "toy")


def test_a_timeline_is_thinned_by_its_peaks() -> None:
    points = [(number / 10, number % 7) for number in range(2000)]
    found = packed.thin(points, [(0.0, "import"), (0.01, "fetch"), (150.0, "session")])
    assert len(found) == packed.MAX_POINTS
    assert all(point.resident_bytes >= 4 for point in found)
    assert [point.mark for point in found if point.mark] == ["import, fetch", "session"]
    assert packed.thin([], []) == []
