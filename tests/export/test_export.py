from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modelpress import graph
from modelpress.config import ExportConfig
from modelpress.errors import ExportError, WorkloadError
from modelpress.export import check_inputs, export
from tests.toys import ImageToy, TextToy, TinyEncoder, Wrapped


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class NoOperator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class FrozenNoise(nn.Module):
    """Adds what numpy makes of the data: the tracer takes it for a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x + float(np.random.default_rng(x.shape[0]).random()) * (x.shape[0] == 7)


@pytest.fixture(scope="module")
def cnn():
    workload = ImageToy()
    checkpoint, report = export(workload.module, workload, ExportConfig())
    return workload, checkpoint, report


def test_the_graph_computes_what_the_module_computes_at_any_batch(cnn) -> None:
    workload, checkpoint, report = cnn
    session = graph.session(checkpoint)
    for batch_size in (1, 2, 5, 40):
        inputs = workload.example(batch_size)
        with torch.inference_mode():
            expected = workload.module(**inputs).numpy()
        np.testing.assert_allclose(graph.run(session, inputs), expected, atol=1e-5)
    assert 0 <= report.max_difference < 1e-5
    assert report.opset == 18
    assert report.nodes == len(graph.parse(checkpoint).graph.node)


def test_nodes_and_weights_carry_the_names_of_the_modules(cnn) -> None:
    _, checkpoint, _ = cnn
    model = graph.parse(checkpoint)
    names = {node.name for node in model.graph.node}
    assert {"body.0.Conv", "body.3.Conv", "body.7.Gemm", "body.9.Gemm"} <= names
    assert len(names) == len(model.graph.node), "names are unique"
    assert set(checkpoint.tensors) == {"body.3.weight", "body.7.weight"}, "the others are below 1 KiB"
    assert [one.name for one in model.graph.output] == ["output"]


def test_nothing_of_the_exporters_traces_is_left(cnn) -> None:
    data = cnn[1].files[graph.GRAPH_FILE]
    assert b"stack_trace" not in data
    assert b".py" not in data
    assert len(data) < 4096


def test_length_is_dynamic_by_name() -> None:
    workload = TextToy()
    checkpoint, _ = export(workload.module, workload, ExportConfig())
    model = graph.parse(checkpoint)
    axes = {one.name: [axis.dim_param for axis in one.type.tensor_type.shape.dim] for one in model.graph.input}
    assert axes == {"ids": ["batch", "length"], "mask": ["batch", "length"]}
    session = graph.session(checkpoint)
    for rows, length in ((1, 1), (3, 19), (9, 40)):
        inputs = {"ids": torch.randint(0, 100, (rows, length)), "mask": torch.ones(rows, length, dtype=torch.int64)}
        with torch.inference_mode():
            expected = workload.module(**inputs).numpy()
        np.testing.assert_allclose(graph.run(session, inputs), expected, atol=1e-5)


class TiedHead(TinyEncoder):
    """Compares each token with all words: the table is read as rows, and transposed in a product."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = super().forward(ids, mask).unsqueeze(1) + self.table(ids)
        return nn.functional.linear(hidden, self.table.weight).mean(dim=1) + self.table.weight[ids[:, 0]].sum()


def test_a_tied_weight_is_stored_once() -> None:
    module = TiedHead().eval()
    checkpoint, _ = export(module, TextToy(module), ExportConfig(tolerance=1e-2))
    assert sum(tensor.numel() == 3200 for tensor in checkpoint.tensors.values()) == 1


def test_the_compared_inputs_differ_in_batch_and_length() -> None:
    shapes = [tuple(inputs["ids"].shape) for _, inputs in check_inputs(TextToy())]
    assert len({rows for rows, _ in shapes}) >= 2
    assert len({length for _, length in shapes}) >= 2


@pytest.mark.parametrize(("broken", "operator"), [(Branching, "data-dependent"), (NoOperator, "bessel_j0")])
def test_a_module_that_cannot_be_exported_is_named(broken: type[nn.Module], operator: str) -> None:
    module = Wrapped(nn.Sequential(nn.Flatten(), nn.Sequential(nn.ReLU(), broken())))
    with pytest.raises(ExportError) as caught:
        export(module.eval(), ImageToy(module), ExportConfig())
    assert f"'body.1.1' ({broken.__name__})" in caught.value.doing
    assert operator in str(caught.value.found)
    assert broken.__name__ in str(caught.value.fix)


class NewOperator(nn.Module):
    """Mish came with operator set 18."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.mish(x)


def test_an_operator_set_that_cannot_be_had_is_refused() -> None:
    module = Wrapped(nn.Sequential(nn.Flatten(), NewOperator())).eval()
    with pytest.raises(ExportError, match=r"(?s)operator set 18.*expected: operator set 17.*export\.opset to 18"):
        export(module, ImageToy(module), ExportConfig(opset=17))
    assert export(module, ImageToy(module), ExportConfig(opset=21))[1].opset == 21


class DoubleConvolution(nn.Module):
    """ONNX Runtime has no such kernel on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.double()).float().flatten(1)


def test_a_graph_that_the_runtime_refuses_is_no_corruption() -> None:
    module = Wrapped(DoubleConvolution()).eval()
    with pytest.raises(ExportError, match=r"(?s)loading the exported graph.*Conv"):
        export(module, ImageToy(module), ExportConfig())


def test_a_graph_that_computes_something_else_is_refused() -> None:
    module = Wrapped(nn.Sequential(nn.Flatten(), FrozenNoise())).eval()
    with pytest.raises(ExportError, match=r"batch 7|'body\.1'"):
        export(module, ImageToy(module), ExportConfig())


def test_the_tolerance_is_held() -> None:
    workload = ImageToy()
    with pytest.raises(ExportError, match=r"export\.tolerance"):
        export(workload.module, workload, ExportConfig(tolerance=1e-12))


def test_a_module_of_other_inputs_is_refused() -> None:
    with pytest.raises(WorkloadError, match=r"x: torch\.float32"):
        export(TinyEncoder(), ImageToy(), ExportConfig())


def test_a_module_of_two_outputs_is_refused() -> None:
    with pytest.raises(WorkloadError, match="tuple"):
        export(TwoOutputs(), ImageToy(), ExportConfig())


def test_exporting_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    workload = ImageToy()
    export(workload.module, workload, ExportConfig())
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""
