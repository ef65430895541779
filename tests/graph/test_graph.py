from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.cores import usable_cores
from modelpress.errors import CorruptionError, SetupError, WorkloadError


def make_model(width: int = 24, seed: int = 0, unused: bool = False) -> onnx.ModelProto:
    """y = cast(x · a + b, bf16 weight) through initializers of several types, some above and some below 1 KiB."""
    random = np.random.default_rng(seed)
    half = torch.from_numpy(random.standard_normal((width, width))).bfloat16()
    initializers = [
        numpy_helper.from_array(random.standard_normal((width, width)).astype(np.float32), "a"),
        numpy_helper.from_array(random.standard_normal(width).astype(np.float32), "b"),
        numpy_helper.from_array(random.integers(-9, 9, (width, width)).astype(np.int8), "c"),
        helper.make_tensor(
            "d", TensorProto.BFLOAT16, [width, width], half.view(torch.int16).numpy().tobytes(), raw=True
        ),
        # Written as numbers, not as raw bytes.
        helper.make_tensor("e", TensorProto.FLOAT, [width, width], random.standard_normal(width * width)),
    ]
    if unused:
        initializers.append(numpy_helper.from_array(np.ones((width, width), np.float32), "unused"))
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["xa"], "first", doc_string="noise"),
        helper.make_node("Add", ["xa", "b"], ["xab"]),
        helper.make_node("Cast", ["c"], ["cf"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["xab", "cf"], ["xabc"]),
        helper.make_node("Cast", ["d"], ["df"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["xabc", "df"], ["xabcd"]),
        helper.make_node("MatMul", ["xabcd", "e"], ["y"]),
    ]
    nodes[0].metadata_props.add(key="trace", value="/somewhere/model.py")
    signature = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in ("x", "y")]
    body = helper.make_graph(nodes, "g", signature[:1], signature[1:], initializers)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run_plain(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@settings(max_examples=15, deadline=None)
@given(width=st.integers(4, 40), seed=st.integers(0, 2**20), threshold=st.sampled_from([1, 256, 1024, 2**20]))
def test_split_and_join_keep_every_bit_of_the_output(width: int, seed: int, threshold: int) -> None:
    model = make_model(width, seed)
    x = np.random.default_rng(seed).standard_normal((3, width)).astype(np.float32)
    expected = run_plain(model, x)
    checkpoint = graph.split(model, threshold)
    assert all(tensor.nbytes >= threshold for tensor in checkpoint.tensors.values())
    np.testing.assert_array_equal(run_plain(graph.join(checkpoint), x), expected)
    np.testing.assert_array_equal(graph.session(checkpoint).run(None, {"x": x})[0], expected)


def test_the_graph_holds_no_large_initializer_and_nothing_of_the_exporter() -> None:
    checkpoint = graph.split(make_model())
    assert set(checkpoint.tensors) == {"a", "d", "e"}, "b (96 bytes) and c (576) stay inline"
    assert checkpoint.tensors["d"].dtype == torch.bfloat16
    data = checkpoint.files[graph.GRAPH_FILE]
    assert len(data) < 2048
    assert b"somewhere" not in data
    assert b"noise" not in data


def test_splitting_is_deterministic_and_leaves_the_model_alone() -> None:
    model = make_model()
    before = model.SerializeToString(deterministic=True)
    first, second = graph.split(model), graph.split(make_model())
    assert first.to_bytes() == second.to_bytes()
    assert model.SerializeToString(deterministic=True) == before
    assert graph.split(graph.join(first)).to_bytes() == first.to_bytes()


def test_an_initializer_that_nothing_reads_is_dropped() -> None:
    checkpoint = graph.split(make_model(unused=True))
    assert checkpoint.to_bytes() == graph.split(make_model()).to_bytes()
    graph.session(checkpoint)


def test_the_session_owns_its_weights() -> None:
    checkpoint = graph.split(make_model(width=64))
    x = np.ones((2, 64), np.float32)
    expected = run_plain(make_model(width=64), x)
    session = graph.session(checkpoint)
    del checkpoint
    noise = [np.full((64, 64), np.nan, np.float32) for _ in range(500)]
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], expected)
    assert len(noise) == 500


def test_two_initializers_of_one_name_are_refused() -> None:
    model = make_model()
    model.graph.initializer.append(model.graph.initializer[0])
    with pytest.raises(CorruptionError, match="'a'"):
        graph.split(model)


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_a_provider_that_does_not_start_is_an_error(provider: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, where the provider starts")
    with pytest.raises(SetupError) as caught:
        graph.session(graph.split(make_model()), provider)
    assert provider in str(caught.value)
    assert caught.value.found
    assert "CPUExecutionProvider" in str(caught.value.fix)


def test_a_provider_of_no_build_is_an_error() -> None:
    with pytest.raises(SetupError, match="NoSuchProvider"):
        graph.session(graph.split(make_model()), "NoSuchProvider")


def test_the_asked_number_of_threads_is_set() -> None:
    session = graph.session(graph.split(make_model()), threads=3)
    assert session.get_session_options().intra_op_num_threads == 3
    default = graph.session(graph.split(make_model()))
    assert default.get_session_options().intra_op_num_threads == usable_cores()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: Checkpoint("onnx", {}, c.files), "no such tensor"),
        (lambda c: Checkpoint("onnx", c.tensors | {"a": c.tensors["a"][:5]}, c.files), r"\[5, 24\]"),
        (lambda c: Checkpoint("onnx", c.tensors | {"a": c.tensors["a"].double()}, c.files), "float64"),
        (lambda c: Checkpoint("onnx", c.tensors, {graph.GRAPH_FILE: c.files[graph.GRAPH_FILE][:99]}), "parsing"),
        (lambda c: Checkpoint("onnx", c.tensors, {}), "model.onnx"),
        (lambda c: Checkpoint("torch", c.tensors), "torch"),
    ],
)
def test_halves_that_do_not_fit_are_refused(damage, message: str) -> None:
    broken = damage(graph.split(make_model()))
    with pytest.raises(CorruptionError, match=message):
        graph.join(broken)
    with pytest.raises(CorruptionError, match=message):
        graph.session(broken)


def test_a_graph_that_onnx_runtime_refuses_is_an_error() -> None:
    model = make_model()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(CorruptionError, match="NoSuchOperator"):
        graph.session(graph.split(model))


def test_run_names_the_missing_input() -> None:
    with pytest.raises(WorkloadError, match="'x'"):
        graph.run(graph.session(graph.split(make_model())), {"z": torch.zeros(1)})


def reading_a_file(place: str, where: str) -> bytes:
    """y = k, whose bytes are in a file of the machine that loads it."""
    tensor = TensorProto(name="k", data_type=TensorProto.FLOAT, dims=[8], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=place)
    signature = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8])]
    inner = [helper.make_tensor_value_info("o", TensorProto.FLOAT, [8])]
    condition = [helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
    if where == "constant":
        nodes = [helper.make_node("Constant", [], ["k"], value=tensor), helper.make_node("Identity", ["k"], ["y"])]
        body = helper.make_graph(nodes, "g", [], signature)
    elif where == "branch":
        takes = helper.make_graph([helper.make_node("Identity", ["k"], ["o"])], "t", [], inner, [tensor])
        other = helper.make_graph(
            [helper.make_node("Identity", ["z"], ["o"])],
            "e",
            [],
            inner,
            [numpy_helper.from_array(np.zeros(8, np.float32), "z")],
        )
        chooses = helper.make_node("If", ["c"], ["y"], then_branch=takes, else_branch=other)
        body = helper.make_graph([chooses], "g", condition, signature)
    else:
        body = helper.make_graph([helper.make_node("Own", [], ["y"], domain="own")], "g", [], signature)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if where == "function":
        constant = helper.make_node("Constant", [], ["k"], value=tensor)
        own = helper.make_function("own", "Own", [], ["k"], [constant], [helper.make_opsetid("", 18)])
        model.functions.append(own)
        model.opset_import.append(helper.make_opsetid("own", 1))
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("where", ["constant", "branch", "function"])
def test_a_graph_that_reads_files_of_this_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """No digest covers them: the same pack would be another model elsewhere, and give away what they hold."""
    (tmp_path / "farm.pem").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    monkeypatch.chdir(tmp_path)
    data = reading_a_file("farm.pem", where)
    if where == "branch":  # releases of ONNX Runtime differ in where else they do
        made = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        inputs = {one.name: np.array(True) for one in made.get_inputs()}
        assert made.run(None, inputs)[0].tolist() == list(range(8)), "ONNX Runtime itself would read it"
    checkpoint = Checkpoint("onnx", {}, {graph.GRAPH_FILE: data})
    for work in (graph.session, graph.external, graph.join):
        with pytest.raises(CorruptionError, match=r"farm\.pem"):
            work(checkpoint)
