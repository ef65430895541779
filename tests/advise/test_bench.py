"""Single products, by every kernel, in ONNX Runtime; and the file that keeps what they took."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from modelpress import graph
from modelpress.advise import bench, micro
from modelpress.advise.work import KERNELS, Work
from modelpress.errors import ConfigError
from modelpress.reports import NotPredicted, Predicted

MATMUL = Work("MatMul", (64, 128), (2, 4, 64))
GEMM = Work("Gemm", (128, 64), (4, 64), transposed=True)
CONV = Work("Conv", (8, 8, 3, 3), (2, 8, 6, 6), strides=(1, 1), pads=(1, 1, 1, 1))
OPERATORS = {"float": "", "dynamic": "MatMulInteger", "static": "QuantizeLinear", "nbits-8": "MatMulNBits"}


@pytest.mark.parametrize("work", [MATMUL, GEMM, CONV], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chained", [False, True])
def test_each_kernel_is_what_it_says(work: Work, kernel: str, chained: bool) -> None:
    if not work.takes(kernel):  # type: ignore[arg-type]
        return
    checkpoint, inputs = micro.products(work, kernel, 3, chained=chained)  # type: ignore[arg-type]
    assert [name[0] for name in inputs] == (["u"] * 3 if kernel == "static" and chained else ["x"] * 3)
    nodes = [node.op_type for node in graph.parse(checkpoint).graph.node]
    wanted = {"nbits-4": "MatMulNBits"}.get(kernel, OPERATORS.get(kernel, "")) or work.op_type
    assert nodes.count(wanted) == 3
    assert nodes.count("QuantizeLinear") == (3 if kernel == "static" else 0)
    found = graph.session(checkpoint).run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    assert [np.size(one) for one in found] == [1, 1, 1]
    assert np.isfinite(np.asarray(found, dtype=np.float64)).all()


def test_speeds_are_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "advise" / "speeds.json"
    first = bench.Bench(path, 0.01, chained=False)
    found = {kernel: first.seconds(MATMUL, kernel) for kernel in KERNELS}
    assert first.measured == 1  # all kernels of a product at once, in turns
    assert all(isinstance(one, Predicted) and 0 < one.low <= one.value <= one.high for one in found.values())
    again = bench.Bench(path, 0.01, chained=False)
    assert {kernel: again.seconds(MATMUL, kernel) for kernel in KERNELS} == found
    assert again.measured == 0
    # In a network of convolutions static int8 has other neighbours: it is measured anew, the others are not asked.
    chained = bench.Bench(path, 0.01, chained=True)
    assert chained.seconds(MATMUL, "float") == found["float"]
    assert chained.measured == 0
    chained.seconds(MATMUL, "static")
    assert chained.measured == 1
    assert isinstance(first.seconds(CONV, "nbits-8"), NotPredicted)
    assert list(path.parent.iterdir()) == [path]  # no partial file stays


@pytest.mark.parametrize("text", ["[]", "{", '{"a": [1.0]}', '{"a": [0.0, 1.0]}', '{"a": {"b": 1}}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "speeds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"(?s)reading measured speeds.*delete it"):
        bench.Bench(path, 0.01, chained=False)


def test_a_kernel_that_is_refused_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept in the file as well: it is not tried again and again."""
    real = micro.products

    def products(work: Work, kernel: str, count: int, *, chained: bool):  # type: ignore[no-untyped-def]
        if kernel == "nbits-4":
            raise ConfigError("making it", found="no such kernel")
        return real(work, kernel, count, chained=chained)  # type: ignore[arg-type]

    monkeypatch.setattr(micro, "products", products)
    path = tmp_path / "speeds.json"
    found = bench.Bench(path, 0.01, chained=False).seconds(GEMM, "nbits-4")
    assert isinstance(found, NotPredicted)
    assert "no such kernel" in found.not_predicted
    assert "no such kernel" in json.loads(path.read_text()).values()
