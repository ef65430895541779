"""Statistics of the layers' inputs, block by block: those of plain forward passes, whatever the module looks like."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modelpress.errors import StageError
from modelpress.layerwise import LayerInputs, walk_
from modelpress.survey import MOST_STEPS
from modelpress.workload import Batch
from tests.layerwise.models import CASES, Block, Chain, Repeated, batches, linears, made


def plain(module: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Σ x xᵀ over tokens that are not padding, in float64, by one hook per layer and forward passes of the whole."""
    sums = {name: torch.zeros(()) for name in names}
    mask = torch.ones(0)

    def hook(name: str) -> Callable[..., None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].double()
            rows = rows[mask.bool()] if rows.dim() == 3 else rows
            sums[name] = sums[name] + rows.T @ rows

        return add

    handles = [module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for batch in batches():
            mask = batch.inputs["attention_mask"]
            module(**batch.inputs)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("case", [*CASES, "repeated"])
def test_statistics_are_those_of_plain_forward_passes(case: str) -> None:
    module = made(CASES.get(case, Repeated))
    names = [name for name in linears(module) if case != "repeated" or not name.startswith(("blocks.1", "blocks.2"))]
    expected = plain(module, names)
    seen: dict[str, LayerInputs] = {}
    module.train()
    walk_(module, names, batches(), lambda inputs: seen.update({inputs.name: inputs}))
    assert module.training
    assert set(seen) == set(names)
    tokens = sum(int(batch.inputs["attention_mask"].sum()) for batch in batches())
    for name, inputs in seen.items():
        assert inputs.second_moment.dtype == torch.float64
        assert torch.allclose(inputs.second_moment, expected[name], rtol=1e-5, atol=1e-6), name
        calls = 3 if case == "repeated" and name.startswith("blocks") else 1
        assert inputs.rows == (12 if name == "head" else calls * tokens)


@pytest.mark.parametrize("case", CASES)
def test_each_input_is_what_the_changed_layers_before_it_give(case: str) -> None:
    """Halving each weight when it is visited, and looking at the whole module again for the next input."""
    module = made(CASES[case])
    names = linears(module)
    changed = copy.deepcopy(module)
    state: dict[str, Tensor] = {}
    last: list[Tensor] = []
    shared: list[str] = []

    def visit(inputs: LayerInputs) -> None:
        if not last or inputs.second_moment is not last[0]:  # one input's layers: from before the first of them changed
            last[:] = [inputs.second_moment]
            state.update(plain(copy.deepcopy(changed), names))
        else:
            shared.append(inputs.name.rpartition(".")[2])
        assert torch.allclose(inputs.second_moment, state[inputs.name], rtol=1e-5, atol=1e-6), inputs.name
        inputs.layer.weight.mul_(0.5)

    walk_(changed, names, batches(), visit)
    for name in names:
        assert torch.equal(changed.get_submodule(name).weight, module.get_submodule(name).weight * 0.5)
    assert set(shared) == {"bert": {"key", "value"}, "llama": {"k_proj", "v_proj", "up_proj"}}.get(case, set())


def test_what_is_changed_in_place_between_two_layers_is_not_shared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden: Tensor, scale: Tensor) -> tuple[Tensor, str]:
            found = self.first(hidden) + self.second(hidden)
            return hidden + found + self.third(hidden.relu_()), "anything"

    torch.manual_seed(0)
    module = Chain().eval()
    module.blocks = nn.ModuleList(Twice() for _ in range(2))
    names = [name for name in linears(module) if name.startswith("blocks")]
    expected = plain(copy.deepcopy(module), names)
    seen: dict[str, Tensor] = {}
    walk_(module, names, batches(), lambda inputs: seen.update({inputs.name: inputs.second_moment}))
    assert seen["blocks.1.first"] is seen["blocks.1.second"]
    assert seen["blocks.1.second"] is not seen["blocks.1.third"]
    for name in names:
        assert torch.allclose(seen[name], expected[name], rtol=1e-5, atol=1e-6), name


def test_many_inputs_of_one_block_are_measured_in_a_few_passes() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3 * MOST_STEPS))

        def forward(self, hidden: Tensor, scale: Tensor) -> tuple[Tensor, str]:
            return hidden + sum(expert(hidden * index) for index, expert in enumerate(self.experts)), "anything"

    module = made(Chain)
    module.blocks = nn.ModuleList(Experts() for _ in range(2))
    calls: list[nn.Module] = []
    module.blocks[1].register_forward_pre_hook(lambda block, _: calls.append(block))
    names = [name for name in linears(module) if name.startswith("blocks.1.")]
    seen: list[str] = []
    walk_(module, names, batches(), lambda inputs: seen.append(inputs.name))
    assert seen == names
    assert len(calls) == (1 + MOST_STEPS) * len(batches())


def test_a_chain_runs_each_block_for_each_of_its_inputs_and_twice_more() -> None:
    """Once to look, once for each input's statistics, once for the next block's: no pass of the whole for each."""
    module = made(Chain)
    calls = [0, 0, 0]
    for index, block in enumerate(module.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    names = [name for name in linears(module) if name.startswith("blocks")]
    walk_(module, names, batches(), lambda _: None)
    assert calls == [15, 12, 9]  # the first is called once more for what it takes, and does not run


def test_a_shared_weight_is_visited_once_with_all_inputs() -> None:
    class Shared(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[2].up.weight = self.blocks[0].up.weight

    module = made(Shared)
    names = [name for name in linears(module) if name != "blocks.2.up"]
    both = plain(module, ["blocks.0.up", "blocks.2.up"])
    seen: list[str] = []

    def visit(inputs: LayerInputs) -> None:
        seen.append(inputs.name)
        if inputs.name == "blocks.0.up":
            assert torch.allclose(inputs.second_moment, both["blocks.0.up"] + both["blocks.2.up"], rtol=1e-5)

    walk_(module, names, batches(), visit)
    assert sorted(seen) == sorted(names)
    assert "blocks.0.up" in seen[:2]  # before the blocks are changed


def test_a_head_that_shares_the_embedding_is_visited_before_the_blocks() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
            self.head.weight = self.table.weight
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = self.table((x[..., 0].abs() * 10).long().clamp(max=29))
            for block in self.blocks:
                hidden = block(hidden, 1.0)[0]
            return self.head(hidden)

    seen: list[str] = []
    module = made(Head)
    walk_(module, linears(module), batches(), lambda inputs: seen.append(inputs.name))
    assert seen == ["head", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def test_padding_does_not_count() -> None:
    """What stands in padded places changes nothing, not even as NaN; in tokens it is an error that names the layer."""
    module = made(Chain)
    sums: list[list[Tensor]] = []
    for value in (0.0, float("nan")):
        data = batches()
        for batch in data:
            batch.inputs["x"][batch.inputs["attention_mask"] == 0] = value
        seen: list[Tensor] = []
        walk_(module, ["project", "blocks.0.up"], data, lambda inputs, seen=seen: seen.append(inputs.second_moment))
        sums.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True))


def test_bad_data_names_the_layer_before_anything_changed() -> None:
    module = made(Chain)
    visited: list[str] = []

    def walk(names: list[str], data: list[Batch], min_rows: int = 1) -> None:
        walk_(module, names, data, lambda inputs: visited.append(inputs.name), min_rows=min_rows)

    data = batches()
    data[2].inputs["x"][3, 0, 0] = float("inf")
    with pytest.raises(StageError, match=r"inputs of project(.|\n)*NaN or infinite"):
        walk(linears(module), data)
    with pytest.raises(StageError, match=r"inputs of head(.|\n)*12 rows(.|\n)*at least 13"):
        walk(linears(module), batches(), min_rows=13)
    module.unused = nn.Linear(2, 2)
    with pytest.raises(StageError, match=r"unused(.|\n)*no call"):
        walk(linears(module), batches())
    module.grouped = nn.Conv2d(4, 4, 3, groups=2)
    with pytest.raises(StageError, match=r"grouped(.|\n)*2 groups"):
        walk(["grouped"], batches())
    with pytest.raises(StageError, match="no call"):
        walk(["project"], [])
    assert not visited


def test_a_visit_that_breaks_the_module_is_named_where_it_shows() -> None:
    module = made(Chain)

    def visit(inputs: LayerInputs) -> None:
        if inputs.name == "blocks.1.down":
            inputs.layer.weight.fill_(float("nan"))

    with pytest.raises(StageError, match=r"inputs of blocks\.2\.up(.|\n)*NaN or infinite"):
        walk_(module, linears(module), batches(), visit)


class Residual(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.lin, self.in_place = nn.Linear(8, 8), in_place

    def forward(self, x: Tensor) -> Tensor:
        change = self.lin(x).relu()
        return x.add_(change) if self.in_place else x + change


class Residuals(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Residual(in_place) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


class Windows(nn.Module):
    """Blocks whose masks are the same for short inputs and differ for long ones."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x: Tensor, window: Tensor) -> Tensor:
            return x + window * self.lin(x)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList([Windows.Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            window = x.new_ones(x.shape[1], 1)
            window[4:] = float(index > 0)
            x = block(x, window)
        return x


def traces(module: nn.Module, batches: list[Batch]) -> list[float]:
    found: dict[str, float] = {}
    names = [f"blocks.{index}.lin" for index in range(3)]
    walk_(module, names, batches, lambda seen: found.update({seen.name: float(seen.second_moment.trace())}))
    return [found[name] for name in names]


def test_a_block_may_change_its_input_in_place() -> None:
    batches = [Batch({"x": torch.randn(4, 8)}) for _ in range(2)]
    assert traces(Residuals(in_place=True), batches) == pytest.approx(traces(Residuals(in_place=False), batches))


def test_arguments_that_differ_in_a_later_batch_are_seen() -> None:
    short, long = Batch({"x": torch.randn(2, 4, 8)}), Batch({"x": torch.randn(2, 16, 8)})
    assert traces(Windows(), [short, long]) == pytest.approx(traces(Windows(), [long, short]))
