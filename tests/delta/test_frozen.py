"""A new version on an earlier one's scales: few codes move, what no longer fits gets fresh ones, and it is judged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import ExportConfig, QuantizeConfig
from modelpress.errors import ConfigError
from modelpress.export import export
from modelpress.quantize import quantize
from modelpress.reports import FrozenReport
from modelpress.workload import Workload
from tests.toys import ImageToy, TextToy, TinyEncoder, Wrapped, make_cnn

BASE = "0" * 64
LOOSE = {"max_quality_drop": 0.2, "min_coverage": 0}


class Normed(nn.Module):
    """A normalisation before two linear layers with a Relu between: both values can be smoothed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(100, 48), nn.LayerNorm(48)
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 48)
        with torch.no_grad():
            self.norm.weight *= torch.rand(48) * 4 + 0.2

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.table(ids)
        hidden = hidden + self.down(torch.relu(self.up(self.norm(hidden))))
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


MODULES: dict[str, Callable[[], nn.Module]] = {"tiny": TinyEncoder, "normed": Normed, "cnn": make_cnn}
Version = tuple[Workload, Checkpoint]


@functools.cache
def first(name: str) -> Version:
    module = MODULES[name]()
    workload = ImageToy(module) if isinstance(module, Wrapped) else TextToy(module.eval())
    return workload, export(module, workload, ExportConfig())[0]


def second(name: str, edit: Callable[[str, np.ndarray], np.ndarray] = lambda _, values: values) -> Version:
    """The same graph, each weight off by a little of its tensor's spread, as after a light fine-tune, then edited."""
    workload, checkpoint = first(name)
    model, random = graph.join(checkpoint), np.random.default_rng(5)
    for one in model.graph.initializer:
        if one.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(one)
            values = values + np.float32(0.002 * values.std()) * random.standard_normal(values.shape, np.float32)
            one.CopyFrom(numpy_helper.from_array(edit(one.name, values).astype(np.float32), one.name))
    return workload, graph.split(model)


def versions(before: Version, after: Version, **options: Any) -> tuple[Checkpoint, Checkpoint, FrozenReport]:
    """The quantized first version, the second on its scales, and what was said of them."""
    config = QuantizeConfig(**LOOSE | options)
    base, _ = quantize(before[1], before[0], config)
    config = config.model_copy(update={"scales_from": BASE})
    made, report = quantize(after[1], after[0], config, earlier=base)
    assert report.frozen
    assert report.frozen.base == BASE
    return base, made, report.frozen


def moved(base: Checkpoint, made: Checkpoint) -> float:
    """Share of the quantized weights' bytes that differ."""
    names = [name for name in base.tensors if name.endswith("_quantized")]
    assert names
    pairs = [(base.tensors[name].reshape(-1), made.tensors[name].reshape(-1)) for name in names]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("tiny", {"method": "dynamic", "smooth": 0, "embeddings": True}),
        ("tiny", {"method": "static", "smooth": 0}),
        ("normed", {"method": "dynamic"}),
        ("normed", {"method": "static"}),
        ("cnn", {"method": "static", "smooth": 0}),
        ("cnn", {"method": "static", "smooth": 0, "per_channel": False}),
        ("tiny", {"method": "weight-only", "num_bits": 8, "algorithm": "rtn", "group_size": 32}),
        ("tiny", {"method": "weight-only", "num_bits": 4, "algorithm": "rtn", "group_size": 32}),
        ("tiny", {"method": "weight-only", "num_bits": 4, "algorithm": "rtn", "symmetric": False}),
        ("tiny", {"method": "weight-only", "num_bits": 4, "algorithm": "gptq", "group_size": 32}),
        ("tiny", {"method": "weight-only", "num_bits": 4, "algorithm": "hqq", "symmetric": False}),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_few_codes_move_on_earlier_scales(module: str, options: dict[str, Any]) -> None:
    base, made, report = versions(first(module), second(module), **options)
    assert report.chosen, report.reason
    assert report.fresh_weights == 0, report.weights
    assert all(row.error_growth is not None and row.error_growth < 1.1 for row in report.weights)
    scales = [name for name in base.tensors if name.endswith("_scale")]
    assert all(torch.equal(base.tensors[name], made.tensors[name]) for name in scales)
    assert base.tensors.keys() == made.tensors.keys()
    workload, checkpoint = second(module)
    fresh, _ = quantize(checkpoint, workload, QuantizeConfig(**LOOSE | options))
    assert moved(base, made) < 0.25
    if options.get("algorithm") == "gptq":
        assert moved(base, made) < 0.1 * moved(base, fresh), "codes are held where the weight is near them"
    else:
        assert moved(base, made) > 0
    if options["method"] != "weight-only":
        assert moved(base, made) < moved(base, fresh)


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_real_zero_points_are_not_taken_for_integers(algorithm: str) -> None:
    """Cut to integers they would move every weight by up to a step."""
    options: dict[str, Any] = {"method": "weight-only", "num_bits": 4, "symmetric": False, "group_size": 32}
    base, _ = quantize(first("tiny")[1], first("tiny")[0], QuantizeConfig(algorithm="hqq", **LOOSE, **options))
    workload, checkpoint = second("tiny")
    config = QuantizeConfig(algorithm=algorithm, max_scales_loss=0.5, scales_from=BASE, **LOOSE, **options)
    made, report = quantize(checkpoint, workload, config, earlier=base)
    assert report.frozen
    assert not any(row.frozen for row in report.frozen.weights)
    assert report.frozen.agreement == report.frozen.fresh_agreement
    fresh, _ = quantize(checkpoint, workload, QuantizeConfig(algorithm=algorithm, **LOOSE, **options))
    assert all(torch.equal(made.tensors[name], fresh.tensors[name]) for name in fresh.tensors)


def test_the_same_weights_on_their_own_scales_are_the_same_pack() -> None:
    for module, options in (("normed", {"method": "dynamic", "smooth": 0}), ("cnn", {"method": "static", "smooth": 0})):
        base, made, _ = versions(first(module), first(module), **options)
        assert moved(base, made) == 0
        assert made.files == base.files


def test_smoothing_is_read_off_the_earlier_weights() -> None:
    """The factors stand nowhere in the pack; those that are found move codes in hundreds, not by halves."""
    base, made, report = versions(first("normed"), first("normed"), method="dynamic")
    assert report.chosen
    assert moved(base, made) < 0.05


def test_a_weight_that_left_its_range_gets_fresh_scales_and_is_named() -> None:
    after = second("tiny", lambda name, values: values * 1.5 if name == "up.MatMul.weight" else values)
    base, made, report = versions(first("tiny"), after, method="dynamic", smooth=0)
    assert report.chosen
    (fresh,) = [row for row in report.weights if not row.frozen]
    assert "up" in fresh.name
    assert fresh.reason == "moved out of its range"
    assert (fresh.error_growth or 0) > 1.25
    kept = next(row.name for row in report.weights if row.frozen)
    assert (base.tensors[kept + "_quantized"] - made.tensors[kept + "_quantized"]).abs().max() <= 1


def test_scales_that_cost_too_much_are_not_taken_and_the_report_says_so() -> None:
    # Activations leave their ranges, and no weight its own.
    workload, checkpoint = second("cnn", lambda name, values: values + 8 if name == "body.0.bias" else values)
    _, made, report = versions(first("cnn"), (workload, checkpoint), method="static", max_quality_drop=0.5)
    assert not report.chosen
    assert "quantize.max_" in report.reason
    assert report.agreement < report.fresh_agreement
    fresh, _ = quantize(checkpoint, workload, QuantizeConfig(method="static", **LOOSE | {"max_quality_drop": 0.5}))
    assert made.to_bytes() == fresh.to_bytes()


def test_another_model_has_no_scales_for_this_one() -> None:
    workload, checkpoint = first("tiny")
    other, _ = quantize(first("cnn")[1], first("cnn")[0], QuantizeConfig(method="static", **LOOSE))
    config = QuantizeConfig(method="dynamic", smooth=0, scales_from=BASE, **LOOSE)
    with pytest.raises(ConfigError, match="none of the 2 layers in integers there"):
        quantize(checkpoint, workload, config, earlier=other)
    with pytest.raises(ConfigError, match="no earlier version"):
        quantize(checkpoint, workload, config)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "codebook"},
        {"method": "weight-only", "algorithm": "fp8"},
        {"method": "dynamic", "smooth": 0, "recovery": {"epochs": 1}},
    ],
    ids=str,
)
def test_what_has_no_scales_to_keep_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"quantize\.scales_from needs"):
        QuantizeConfig(scales_from="champion", **options)
    with pytest.raises(ValueError, match="only read with"):
        QuantizeConfig(max_scales_loss=0.5)


def test_factors_of_rows_are_found_under_rounding_and_factors_of_columns() -> None:
    from modelpress.quantize.frozen import scales_between

    random = np.random.default_rng(0)
    now = random.standard_normal((60, 200))
    rows, columns = np.exp(random.standard_normal(60)), np.exp(random.standard_normal(200) / 2)
    rows /= np.exp(np.log(rows).mean())
    then = rows[:, None] * now / columns
    then = np.rint(then * 100) / 100
    assert np.abs(scales_between(now, then) / rows - 1).max() < 0.01
