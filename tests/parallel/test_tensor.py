"""Which layers are cut among ranks, and that shares put together are what was cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modelpress.checkpoint import Checkpoint, from_module
from modelpress.errors import ConfigError, CorruptionError, CoverageError
from modelpress.parallel.slices import Share, assembled, cut_of, joined, share_name, sliced, sources
from modelpress.parallel.tensor import axis_of, plan_tensors, slice_of
from tests.parallel.models import batch, make


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return make("llama")


def test_a_model_states_its_plan_itself(llama: nn.Module) -> None:
    plan = plan_tensors(llama, 2)
    layer = {name.removeprefix("model.model.layers.0."): style for name, style in plan.items() if ".layers.0." in name}
    assert layer == {
        **{f"self_attn.{name}_proj": "column" for name in "qkv"},
        "self_attn.o_proj": "row",
        **{f"mlp.{name}_proj": "column" for name in ("gate", "up")},
        "mlp.down_proj": "row",
    }
    assert plan["model.lm_head"] == "gathered"
    assert len(plan) == 4 * 7 + 1


def test_weights_that_all_heads_share_are_whole_and_summed() -> None:
    plan = plan_tensors(make("qwen"), 2)
    assert {name for name, style in plan.items() if style == "summed"} == {
        f"model.model.layers.{layer}.self_attn.{name}_norm" for layer in range(2) for name in "qk"
    }
    assert axis_of("model.model.layers.0.self_attn.q_norm.weight", plan) is None


def test_a_tied_output_layer_stays_whole() -> None:
    assert "model.lm_head" not in plan_tensors(make("tied"), 2)


def test_heads_that_the_ranks_do_not_divide_are_refused(llama: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"k_proj for 4 tensor-parallel ranks(.|\n)*found: 2 heads"):
        plan_tensors(llama, 4)
    with pytest.raises(ConfigError, match=r"lm_head for 3 tensor-parallel ranks(.|\n)*found: 32 rows"):
        plan_tensors(llama, 3)


def test_without_a_stated_plan_the_trace_tells() -> None:
    module, (inputs, _) = make("bert"), batch("bert")
    plan = plan_tensors(module, 2, inputs)
    layer = {name.removeprefix("bert.encoder.layer.0."): style for name, style in plan.items() if ".layer.0." in name}
    assert layer == {
        **{f"attention.self.{name}": "column" for name in ("query", "key", "value")},
        "attention.output.dense": "row",
        "intermediate.dense": "column",
        "output.dense": "row",
    }
    assert len(plan) == 2 * 6
    with pytest.raises(ConfigError, match="found: 4 heads"):
        plan_tensors(module, 3, inputs)
    with pytest.raises(CoverageError, match="no declared plan"):
        plan_tensors(module, 2)


def test_an_unknown_style_is_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    module._tp_plan = {"0": "packed_colwise"}  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="0: 'packed_colwise'"):
        plan_tensors(module, 2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_cut_checkpoint_comes_back(llama: nn.Module, ranks: int) -> None:
    plan, whole = plan_tensors(llama, 2), from_module(llama)
    cut = sliced(whole, lambda name: axis_of(name, plan), ranks)
    name = "model.model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(cut.tensors[share_name(name, ranks - 1, ranks)], whole.tensors[name].chunk(ranks, 1)[-1])
    assert "model.model.norm.weight" in cut.tensors
    back = joined(cut.tensors, cut.metadata)
    assert back.keys() == whole.tensors.keys()
    assert all(torch.equal(back[name], whole.tensors[name]) for name in back)
    with pytest.raises(ConfigError, match="cut already"):
        sliced(cut, lambda name: axis_of(name, plan), ranks)
    del cut.tensors[share_name(name, 0, ranks)]
    with pytest.raises(CorruptionError, match=rf"no rank0of{ranks}\.{name}"):
        joined(cut.tensors, cut.metadata)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weight\n  found: \[3, 4\]"):
        sliced(Checkpoint("torch", {"weight": torch.zeros(3, 4)}), lambda _: 0, 2)
    with pytest.raises(ConfigError, match="no tensor that is cut"):
        sliced(Checkpoint("torch", {"weight": torch.zeros(4)}), lambda _: None, 2)


@pytest.mark.parametrize(
    "stated", [3, {}, {"ranks": 0, "axes": {}}, {"ranks": 2, "axes": {"a": -1}}, {"ranks": True, "axes": {"a": 0}}]
)
def test_metadata_that_lie_are_refused(stated: object) -> None:
    with pytest.raises(CorruptionError, match="slices"):
        cut_of({"slices": stated})


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 1), st.data())
def test_any_share_comes_from_any_cut(stored: int, ranks: int, axis: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, ranks - 1))
    wanted = Share(data.draw(st.integers(0, 1)), rank, ranks)
    tensor = torch.arange(3600).view(60, 60)
    parts = list(tensor.chunk(stored, axis))
    chosen = sources(wanted if wanted.axis == axis else None, stored)
    found = assembled([parts[one] for one in chosen], wanted, axis, stored)
    assert torch.equal(found, slice_of(tensor, wanted.axis, rank, ranks))
