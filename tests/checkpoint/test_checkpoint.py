"""What a checkpoint holds comes back bit for bit, and a module is rebuilt from it whatever was cut away."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modelpress.checkpoint import Checkpoint, fit_module, from_module, to_module
from modelpress.errors import CorruptionError, WorkloadError
from modelpress.progress import Progress, silent
from modelpress.workload import Batch, Split, Workload

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.output = nn.Linear(6, 11, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens).mean(dim=1)
        for layer in self.layers:
            hidden = hidden + layer(hidden).relu()
        return self.output(hidden)


class Bare(Workload):
    """Only what a checkpoint needs of a workload."""

    metric = "none"

    def __init__(self, make: Any) -> None:
        self.make = make

    def source(self, progress: Progress = silent) -> nn.Module:
        return self.make()

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        return self.make()

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        raise NotImplementedError

    def score(self, outputs: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def identity(self) -> str:
        return "any"


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=4),
    data=st.randoms(use_true_random=False),
    files=st.dictionaries(st.text(min_size=1, max_size=8).filter(str.isprintable), st.binary(max_size=40), max_size=3),
    note=st.text(max_size=8),
)
def test_any_bits_come_back(
    dtype: torch.dtype, shape: list[int], data: Any, files: dict[str, bytes], note: str
) -> None:
    count = int(np.prod(shape)) * dtype.itemsize
    content = bytearray(data.randbytes(count)) if dtype != torch.bool else bytearray(data.choices(b"\0\1", k=count))
    tensor = (
        torch.frombuffer(content, dtype=torch.uint8).view(dtype).view(shape) if count else torch.empty(shape).to(dtype)
    )
    checkpoint = Checkpoint("onnx", {"a.weight": tensor, "b": tensor.clone()}, files, {"note": note, "list": [1, 2.5]})
    back = Checkpoint.from_bytes(checkpoint.to_bytes())
    assert back.kind == "onnx"
    assert back.files == files
    assert back.metadata == checkpoint.metadata
    assert {n: (t.dtype, list(t.shape), raw(t)) for n, t in back.tensors.items()} == {
        n: (t.dtype, list(t.shape), raw(t)) for n, t in checkpoint.tensors.items()
    }
    assert back.to_bytes() == checkpoint.to_bytes()


def test_payloads_of_nan_and_negative_zero_survive() -> None:
    bits = torch.tensor([0x7FC00001, -0x3FFFFF, 0x7F800001, -0x80000000, 0x00000001], dtype=torch.int64).to(torch.int32)
    module = nn.Linear(5, 1, bias=False)
    module.weight = nn.Parameter(bits.view(torch.float32).view(1, 5))
    back = Checkpoint.from_bytes(from_module(module).to_bytes())
    assert torch.equal(back.tensors["weight"].view(torch.int32).flatten(), bits)


def test_bytes_do_not_depend_on_the_order_of_names() -> None:
    a, b = torch.ones(2), torch.zeros(3)
    first = Checkpoint("torch", {"a": a, "b": b}, {"x": b"1", "y": b""}, {"p": 1, "q": 2})
    second = Checkpoint("torch", {"b": b, "a": a}, {"y": b"", "x": b"1"}, {"q": 2, "p": 1})
    assert first.to_bytes() == second.to_bytes()


def test_a_snapshot_does_not_move_with_the_module() -> None:
    module = nn.Linear(2, 2)
    checkpoint = from_module(module)
    before = checkpoint.tensors["weight"].clone()
    with torch.no_grad():
        module.weight.add_(1)
    assert torch.equal(checkpoint.tensors["weight"], before)


def test_tied_weights_are_stored_once_and_tied_again() -> None:
    module = Tied().eval()
    checkpoint = Checkpoint.from_bytes(from_module(module).to_bytes())
    assert "output.weight" not in checkpoint.tensors
    back = to_module(checkpoint, Bare(Tied))
    assert back.output.weight is back.embedding.weight
    tokens = torch.arange(8).view(2, 4)
    assert torch.equal(back(tokens), module(tokens))


def test_tied_weights_stay_tied_when_they_shrank() -> None:
    module = Tied().eval()
    module.embedding.weight = nn.Parameter(module.embedding.weight.detach()[:7].clone())
    module.output.weight = module.embedding.weight
    del module.layers[2:]
    back = to_module(from_module(module), Bare(Tied))
    assert back.output.weight is back.embedding.weight
    assert len(back.layers) == 2
    tokens = torch.arange(6).view(2, 3)
    assert torch.equal(back(tokens), module(tokens))


@pytest.mark.parametrize(
    ("make", "example"),
    [
        (lambda width: nn.Sequential(nn.Conv1d(2, width, 3), nn.BatchNorm1d(width), nn.Conv1d(width, 2, 1)), (2, 2, 9)),
        (
            lambda width: nn.Sequential(
                nn.Conv2d(3, width, 3, bias=False),
                nn.BatchNorm2d(width),
                nn.Conv2d(width, width, 3, groups=width),
                nn.Flatten(),
                nn.Linear(width, 4),
            ),
            (2, 3, 5, 5),
        ),
        (lambda width: nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 3)), (2, 4)),
    ],
    ids=["conv1d", "depthwise", "layernorm"],
)
def test_a_narrower_module_is_rebuilt_from_a_wider_skeleton(make: Any, example: tuple[int, ...]) -> None:
    narrow, inputs = make(5).eval(), torch.randn(example)
    back = to_module(from_module(narrow), Bare(lambda: make(8)))
    assert torch.equal(back(inputs), narrow(inputs))
    assert repr(back) == repr(narrow)


class Listed(nn.Module):
    """Layers and activations in one list, called in turn."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_children_without_tensors_stay_at_the_end_of_a_list() -> None:
    module = Listed(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Tanh(), nn.Sigmoid()).eval()
    back = to_module(
        from_module(module), Bare(lambda: Listed(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Tanh(), nn.Sigmoid()))
    )
    x = torch.randn(3, 4)
    assert torch.equal(back(x), module(x))
    assert repr(back) == repr(module)


def test_tensors_of_another_model_are_refused_and_not_fitted_to() -> None:
    checkpoint = Checkpoint("torch", {"other.weight": torch.ones(2)})
    with pytest.raises(WorkloadError, match=r"layers\.0\.weight"):
        to_module(checkpoint, Bare(lambda: Listed(nn.Linear(4, 3))))


def test_rebuilding_leaves_the_global_random_state_alone() -> None:
    checkpoint = from_module(nn.Linear(3, 3))
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    to_module(checkpoint, Bare(lambda: nn.Linear(3, 3)))
    assert torch.equal(torch.rand(1), expected)


def test_fitting_what_fits_changes_nothing() -> None:
    module = Tied()
    before = {name: id(parameter) for name, parameter in module.named_parameters()}
    fit_module(module, module.state_dict())
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == before


def header(text: str, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        header("[]"),
        header("{}"),
        header(json.dumps({"__metadata__": {"kind": "torch"}})),
        header(json.dumps({"__metadata__": {"kind": "pickle", "metadata": "{}"}})),
        header(json.dumps({"__metadata__": {"kind": "torch", "metadata": "[]"}})),
        header(json.dumps({"__metadata__": {"kind": "torch", "metadata": "{"}})),
        header(json.dumps({"__metadata__": {"kind": "torch", "metadata": "[" * 100_000}})),
        header('{"__metadata__": ' + "[" * 50_000 + "]" * 50_000 + "}"),
    ],
    ids=["empty", "long", "list", "bare", "no metadata", "kind", "metadata list", "cut json", "deep metadata", "deep"],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptionError):
        Checkpoint.from_bytes(data)


@given(st.data())
def test_cut_bytes_are_refused(data: st.DataObject) -> None:
    whole = Checkpoint("torch", {"a": torch.arange(10)}, {"f": b"123"}, {"k": [1]}).to_bytes()
    with pytest.raises(CorruptionError):
        Checkpoint.from_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])


def test_what_does_not_fit_is_named() -> None:
    checkpoint = from_module(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(WorkloadError, match=r"1\.weight"):
        to_module(checkpoint, Bare(lambda: nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(WorkloadError, match="onnx"):
        to_module(Checkpoint("onnx", {}), Bare(lambda: nn.Linear(2, 2)))
    with pytest.raises(WorkloadError, match="gone"):
        to_module(Checkpoint("torch", {}, metadata={"tied": {"weight": "gone"}}), Bare(lambda: nn.Linear(2, 2)))
