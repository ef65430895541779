"""Golden samples: the same bytes each time they are made; close answers pass, others and hostile files do not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from modelpress import golden, graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import ExportConfig, QuantizeConfig
from modelpress.errors import CorruptionError, SelfTestError, UnsupportedFormatError, WorkloadError
from modelpress.export import export
from modelpress.golden import Golden
from modelpress.quantize import quantize
from tests.toys import ImageToy, TextToy

IMAGES = {"x": np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32)}


@pytest.fixture(scope="module")
def cnn() -> Checkpoint:
    return export(ImageToy().module, ImageToy(), ExportConfig())[0]


@pytest.fixture(scope="module")
def samples(cnn: Checkpoint) -> Golden:
    made = golden.make(cnn, IMAGES, classes=True)
    assert made is not None
    return made


def answers(checkpoint: Checkpoint, threads: int) -> dict[str, np.ndarray]:
    session = graph.session(checkpoint, threads=threads)
    return dict(zip([one.name for one in session.get_outputs()], session.run(None, IMAGES), strict=True))


def test_the_same_graph_gives_the_same_bytes(cnn: Checkpoint, samples: Golden) -> None:
    again = golden.make(Checkpoint.from_bytes(cnn.to_bytes()), IMAGES, classes=True)
    assert again is not None
    assert again.to_bytes() == samples.to_bytes()
    assert golden.read(samples.to_bytes()).to_bytes() == samples.to_bytes()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_graph_passes_its_own_test_with_any_threads(cnn: Checkpoint, samples: Golden, threads: int) -> None:
    outcome = golden.check(golden.read(samples.to_bytes()), answers(cnn, threads), "testing")
    assert 0 < outcome.difference < 2.0**-golden.ANSWER_BITS  # the rounding alone
    assert (outcome.samples, outcome.tolerance, outcome.agreement) == (4, 1e-3, 1.0)


def test_another_model_fails(samples: Golden) -> None:
    other = export(ImageToy().skeleton({}), ImageToy(), ExportConfig())[0]
    with pytest.raises(SelfTestError, match=r"differ by .* of the largest"):
        golden.check(samples, answers(other, 1), "testing")


@given(st.floats(0, 0.02), st.integers(0, 39), st.booleans())
def test_what_passes_is_what_lies_within_the_tolerance(share: float, place: int, up: bool) -> None:
    base = np.linspace(-1, 2, 40).reshape(4, 10)
    made = Golden({"x": base}, {"y": base.reshape(-1)}, {"y": base.shape}, {"y": 1}, "static", 0.01)
    found = base.copy()
    found.reshape(-1)[place] += (share if up else -share) * 2
    if share <= 0.00999:
        assert golden.check(made, {"y": found}, "testing").difference == pytest.approx(share, abs=1e-12)
    elif share >= 0.01001:
        with pytest.raises(SelfTestError):
            golden.check(made, {"y": found}, "testing")


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"y": np.ones((2, 3), np.float32)},
        {"y": np.ones((2, 2), np.int64)},
        {"y": np.array([[1, 2], [3, np.nan]])},
        {"y": np.array([[1, 2], [3, np.inf]])},
    ],
    ids=["nothing", "shape", "type", "NaN", "infinity"],
)
def test_answers_of_another_kind_fail(found: dict[str, np.ndarray]) -> None:
    base = np.array([[1.0, 2.0], [3.0, 4.0]])
    made = Golden({"x": base}, {"y": base.reshape(-1)}, {"y": (2, 2)}, {"y": 1}, "float", 1e-3)
    with pytest.raises(SelfTestError):
        golden.check(made, found, "testing")


def test_integers_may_not_differ_at_all() -> None:
    made = Golden({"x": np.ones(2)}, {"y": np.array([100, 7])}, {"y": (2,)}, {"y": 1}, "dynamic", 0.25)
    assert golden.check(made, {"y": np.array([100, 7])}, "testing").difference == 0
    with pytest.raises(SelfTestError):
        golden.check(made, {"y": np.array([100, 8])}, "testing")


def test_a_huge_constant_hides_no_other_class() -> None:
    """A masked class of -1e6 makes every difference small by its scale; the classes tell."""
    base = np.array([[-1e6, 5.0, 3.0], [-1e6, 2.0, 4.0], [-1e6, 6.0, 1.0]])
    made = Golden({"x": base}, {"y": base.reshape(-1)}, {"y": (3, 3)}, {"y": 1}, "float", 1e-3, classes=True)
    swapped = base[:, [0, 2, 1]]
    with pytest.raises(SelfTestError, match="another class"):
        golden.check(made, {"y": swapped}, "testing")
    golden.check(replace(made, classes=False), {"y": swapped}, "testing")  # for embeddings it would pass


def test_a_lead_within_the_tolerance_may_change_hands() -> None:
    base = np.array([[3.0, -3.0], [0.001, -0.001], [-2.0, 2.0]])
    made = Golden({"x": base}, {"y": base.reshape(-1)}, {"y": (3, 2)}, {"y": 1}, "static", 0.02, classes=True)
    outcome = golden.check(made, {"y": base + np.array([[0, 0], [-0.002, 0.002], [0, 0]])}, "testing")
    assert outcome.agreement == pytest.approx(2 / 3)


def test_large_answers_are_thinned_and_large_inputs_cut() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "width"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "width"])
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    checkpoint = graph.split(helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    wide = np.random.default_rng(0).normal(size=(4, 100_000)).astype(np.float32)
    made = golden.make(checkpoint, {"x": wide}, classes=False)
    assert made is not None
    assert made.samples == 2  # 400 kB each
    assert made.answers["y"].size <= golden.MAX_ANSWERS
    assert len(made.to_bytes()) < golden.MAX_INPUT_BYTES + 5 * golden.MAX_ANSWERS
    assert golden.check(golden.read(made.to_bytes()), {"y": wide[:2]}, "testing").difference < 1e-3
    with pytest.raises(SelfTestError):
        golden.check(made, {"y": -wide[:2]}, "testing")
    assert golden.make(checkpoint, {"x": np.zeros((4, 300_000), np.float32)}, classes=False) is None


def test_a_graph_without_finite_answers_has_no_golden_ones() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    body = helper.make_graph([helper.make_node("Log", ["x"], ["y"])], "g", [x], [y])
    checkpoint = graph.split(helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    with pytest.raises(WorkloadError, match="golden_samples: 0"):
        golden.make(checkpoint, {"x": -np.ones((2, 2), np.float32)}, classes=False)
    with pytest.raises(WorkloadError, match="also"):
        golden.make(checkpoint, {"z": np.ones((2, 2), np.float32)}, classes=False)


def test_how_a_graph_computes_is_read_off_its_operators(cnn: Checkpoint) -> None:
    assert golden.precision_of(graph.parse(cnn)) == "float"
    static, _ = quantize(cnn, ImageToy(), QuantizeConfig(method="static"))
    assert golden.precision_of(graph.parse(static)) == "static"
    text = export(TextToy().module, TextToy(), ExportConfig())[0]
    dynamic, _ = quantize(text, TextToy(), QuantizeConfig(method="dynamic"))
    assert golden.precision_of(graph.parse(dynamic)) == "dynamic"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch"])
    halves = onnx.helper.make_graph(
        [helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16), helper.make_node("Sqrt", ["h"], ["y"])],
        "g", [x], [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch"])],
    )  # fmt: skip
    assert golden.precision_of(helper.make_model(halves)) == "half"


@given(hnp.arrays(np.float32, 20, elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)))
def test_rounding_is_far_below_the_least_tolerance(values: np.ndarray) -> None:
    found = golden._rounded(values)
    assert found.dtype == np.float32
    assert (np.abs(found.astype(np.float64) - values) <= np.abs(values) * 2.0**-golden.ANSWER_BITS + 1e-45).all()
    assert (golden._rounded(found) == found).all()


def file_of(facts: Any, **tensors: np.ndarray) -> bytes:
    named = {name.replace("_", ":", 1): array for name, array in tensors.items()}
    return bytes(safetensors.numpy.save(named, {"golden": facts if isinstance(facts, str) else json.dumps(facts)}))


FACTS: dict[str, Any] = {
    "format_version": 1,
    "precision": "float",
    "tolerance": 1e-3,
    "classes": False,
    "answers": {"y": {"shape": [2], "stride": 1}},
}
X, Y = np.ones(2, np.float32), np.ones(2, np.float32)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        (2**63).to_bytes(8, "little") + b"{}",
        file_of("[" * 100_000, input_x=X, answer_y=Y),
        file_of("{}", input_x=X, answer_y=Y),
        file_of(FACTS | {"tolerance": 1.0}, input_x=X, answer_y=Y),
        file_of(FACTS | {"tolerance": -1}, input_x=X, answer_y=Y),
        file_of(FACTS | {"extra": 1}, input_x=X, answer_y=Y),
        file_of(FACTS | {"answers": {}}, input_x=X),
        file_of(FACTS | {"answers": {"y": {"shape": [3], "stride": 1}}}, input_x=X, answer_y=Y),
        file_of(FACTS | {"answers": {"y": {"shape": [2], "stride": 0}}}, input_x=X, answer_y=Y),
        file_of(FACTS, input_x=X),
        file_of(FACTS, answer_y=Y),
        file_of(FACTS, input_x=X, answer_y=Y, other_z=Y),
        file_of(FACTS, input_x=X, answer_y=np.array([1, np.nan], np.float32)),
        b"\0" * (golden.MAX_FILE_BYTES + 1),
    ],
)
def test_a_hostile_file_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptionError):
        golden.read(data)


def test_a_newer_file_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedFormatError, match="update modelpress"):
        golden.read(file_of(FACTS | {"format_version": 2}, input_x=X, answer_y=Y))


@given(st.data())
def test_a_flipped_byte_never_escapes(data: st.DataObject) -> None:
    whole = bytearray(file_of(FACTS, input_x=X, answer_y=Y))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        golden.read(bytes(whole))
    except (CorruptionError, UnsupportedFormatError):
        return
