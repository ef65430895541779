"""Before a pack answers, it answers its golden samples; a load that fails changes nothing and leaves nothing."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from modelpress import golden, graph
from modelpress.checkpoint import Checkpoint
from modelpress.errors import CorruptionError, SelfTestError
from serving.repository import Repository
from tests.serving.conftest import WIDTH, client_of, scale_model

Call = Callable[..., Any]
X = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)
LOADS, MEASURED_FROM = 120, 20
MAX_GROWTH_BYTES = 24 * 2**20
"""Of 100 loads of 4 MiB of weights each: a leak of one pack in sixteen would show."""


def with_golden(checkpoint: Checkpoint, of: Checkpoint | None = None) -> Checkpoint:
    """The checkpoint with golden samples: its own answers, or those of another graph."""
    made = golden.make(of or checkpoint, {"x": X}, classes=False)
    assert made is not None
    return replace(checkpoint, files=checkpoint.files | {golden.GOLDEN_FILE: made.to_bytes()})


def version(repository: Repository) -> str:
    return repository.model("scale").answering().engine.pack


def test_a_pack_that_answers_as_it_did_is_swapped_in(press: Call, repository: Call) -> None:
    press(with_golden(scale_model(2.0)))
    models = repository("scale")
    second = press(with_golden(scale_model(3.0)))
    models.poll()
    assert version(models) == second
    tested = models.model("scale").answering().engine.tested
    assert tested is not None
    assert (tested.samples, tested.tolerance) == (4, golden.TOLERANCES["float"])
    assert tested.difference < tested.tolerance


def test_a_pack_that_answers_otherwise_changes_nothing(
    press: Call, repository: Call, caplog: pytest.LogCaptureFixture
) -> None:
    """Its every digest is right: what is wrong is what this machine makes of it."""
    first = press(with_golden(scale_model(2.0)))
    models = repository("scale")
    press(with_golden(scale_model(3.0), of=scale_model(3.01)))
    with pytest.raises(SelfTestError, match=r"differ by 0\.0033"):
        models.load("scale")
    assert version(models) == first
    (row,) = models.index()
    assert (row["state"], row["version"]) == ("READY", first)
    assert "does not answer what it answered when it was published" in row["reason"]
    assert f"{first[:12]} goes on answering" in caplog.text


def test_a_pack_without_samples_loads_and_says_so(
    press: Call, repository: Call, caplog: pytest.LogCaptureFixture
) -> None:
    press(scale_model(2.0))
    with caplog.at_level(logging.INFO, "modelpress.serving"):
        models = repository("scale")
    assert models.model("scale").answering().engine.tested is None
    assert "it has no golden samples" in caplog.text


def renamed(checkpoint: Checkpoint) -> Checkpoint:
    made = golden.make(checkpoint, {"x": X}, classes=False)
    assert made is not None
    made = replace(made, inputs={"other": X})
    return replace(checkpoint, files=checkpoint.files | {golden.GOLDEN_FILE: made.to_bytes()})


def wrong_type(checkpoint: Checkpoint) -> Checkpoint:
    made = golden.make(checkpoint, {"x": X}, classes=False)
    assert made is not None
    made = replace(made, inputs={"x": X.astype(np.float64)})
    return replace(checkpoint, files=checkpoint.files | {golden.GOLDEN_FILE: made.to_bytes()})


def no_golden_file(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, files=checkpoint.files | {golden.GOLDEN_FILE: b"nothing of the kind"})


@pytest.mark.parametrize(
    ("damage", "error"), [(renamed, SelfTestError), (wrong_type, SelfTestError), (no_golden_file, CorruptionError)]
)
def test_samples_that_do_not_fit_are_a_failure_of_the_pack(
    press: Call, repository: Call, damage: Call, error: type[Exception]
) -> None:
    first = press(with_golden(scale_model(2.0)))
    models = repository("scale")
    press(damage(scale_model(3.0)))
    with pytest.raises(error):
        models.load("scale")
    assert version(models) == first


@pytest.mark.anyio
async def test_the_metadata_say_how_it_was_tested(press: Call, repository: Call) -> None:
    press(with_golden(scale_model(2.0)))
    press(scale_model(2.0), "plain")
    async with client_of(repository()) as client:
        shown = (await client.get("/v2/models/scale")).json()["parameters"]
        assert shown["golden"] is True
        assert 0 <= shown["golden_difference"] < shown["golden_tolerance"] == golden.TOLERANCES["float"]
        assert (await client.get("/v2/models/plain")).json()["parameters"]["golden"] is False


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def picky() -> Checkpoint:
    """A table of 100 rows, asked by position: ones are no position of its second axis, golden samples are."""
    table = onnx.numpy_helper.from_array(np.arange(200 * 8, dtype=np.float32).reshape(1, 200, 8) / 100, "table")
    at = helper.make_tensor_value_info("at", TensorProto.INT64, ["batch", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])
    body = helper.make_graph([helper.make_node("GatherND", ["table", "at"], ["y"])], "picky", [at], [y], [table])
    return graph.split(helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def test_golden_samples_warm_up_what_ones_can_not(press: Call, repository: Call) -> None:
    checkpoint = picky()
    made = golden.make(checkpoint, {"at": np.array([[0, 3], [0, 150]])}, classes=False)
    assert made is not None
    pack = press(replace(checkpoint, files=checkpoint.files | {golden.GOLDEN_FILE: made.to_bytes()}), "picky")
    assert repository("picky").model("picky").answering().engine.pack == pack


def large(value: float) -> Checkpoint:
    """4 MiB of weights."""
    weight = onnx.numpy_helper.from_array(np.full((WIDTH, 2**14), value, np.float32), "weight")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2**14])
    body = helper.make_graph([helper.make_node("MatMul", ["x", "weight"], ["y"])], "large", [x], [y], [weight])
    return graph.split(helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def test_a_hundred_failed_loads_leave_no_memory(press: Call, repository: Call) -> None:
    first = press(with_golden(scale_model(2.0)))
    models = repository("scale")
    press(with_golden(large(2.0), of=large(2.5)))
    process, before = psutil.Process(), 0
    for number in range(LOADS):
        if number == MEASURED_FROM:
            gc.collect()
            before = process.memory_info().rss
        with contextlib.suppress(SelfTestError):
            models.load("scale")
            pytest.fail("it must not load")
    gc.collect()
    grown = process.memory_info().rss - before
    assert version(models) == first
    assert grown < MAX_GROWTH_BYTES
