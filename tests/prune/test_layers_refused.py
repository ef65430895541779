"""Layers that cannot leave: each kind says why, and the model stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2Model

from modelpress.blocks import unlike
from modelpress.config import DistillConfig, PruneConfig
from modelpress.distill.students import make_student
from modelpress.errors import StageError, WorkloadError
from modelpress.prune import prune_
from tests.prune.stacks import Block, Stack, uneven
from tests.train.toy import Toy


class Twice(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in [*self.blocks, self.blocks[0]]:
            x = block(x)
        return self.head(x)


class Outside(Stack):
    """The residual sum stands outside of the blocks."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Counted(Stack):
    """What comes after the blocks depends on their number."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x * len(self.blocks))


class Zipped(Stack):
    """Each block has a number of its own beside it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, _ in zip(self.blocks, range(5), strict=True):
            x = block(x)
        return self.head(x)


class Unlike(Stack):
    """One block has another activation, which no tensor tells."""

    def __init__(self) -> None:
        super().__init__()

        class Other(Block):
            def forward(self, x: Tensor) -> Tensor:
                return x + self.down(self.up(x).tanh())

        self.blocks[4] = Other()


class Longer(Stack):
    """The first block has a layer more, and so tensors that the others have not."""

    def __init__(self) -> None:
        super().__init__()

        class Normed(Block):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.LayerNorm(12)

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(self.norm(x))

        self.blocks[0] = Normed()


class Product(Stack):
    """Blocks that end in a product."""

    def __init__(self) -> None:
        super().__init__()

        class Gate(Block):
            def forward(self, x: Tensor) -> Tensor:
                return x * (1 + self.down(self.up(x).relu()))

        self.blocks = nn.ModuleList([Gate() for _ in range(5)])


class Narrowing(Stack):
    """Blocks that each give less than they take."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(12 - index, 11 - index) for index in range(5)])
        self.head = nn.Linear(7, 3)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Narrowing, r"body\.blocks\.0(.|\n)*shape \[\d+, 11\] of inputs of shape \[\d+, 12\]"),
        (Twice, "not called exactly once"),
        (Outside, "more than what the one before gave"),
        (Counted, r"skips them(.|\n)*wherever they stand"),
        (Zipped, r"skips them(.|\n)*ValueError: zip\(\)(.|\n)*wherever they stand"),
        (Unlike, r"rebuilding(.|\n)*class is 'Block' and(.|\n)*differ in their tensors alone"),
        (Product, r"body\.blocks\.\d(.|\n)*prune\.repair to false"),
        (lambda: nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 3)), r"no torch\.nn\.ModuleList"),
    ],
    ids=["narrowing", "twice", "outside", "counted", "zipped", "unlike", "product", "no blocks"],
)
def test_what_cannot_be_cut_says_why_and_stays(make: Callable[[], nn.Module], reason: str) -> None:
    toy = Toy(make, (6,))
    module = toy.source()
    before = copy.deepcopy(module.state_dict())
    config = PruneConfig(structures=["layers"], targets=["body.blocks.[23]"] if make is not Product else [])
    with pytest.raises(StageError, match=reason):
        prune_(module, toy, config)
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_blocks_scaled_by_their_number_are_noticed() -> None:
    """GPT-2 may divide by the layer's number: a block that moves up would compute something else."""

    class Gpt2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = GPT2Config(
                vocab_size=30, n_embd=16, n_layer=4, n_head=2, n_positions=16, attn_implementation="eager",
                scale_attn_by_inverse_layer_idx=True,
            )  # fmt: skip
            self.model = GPT2LMHeadModel(config)

        def forward(self, x: Tensor) -> Tensor:
            return self.model((x.abs() * 10).long().clamp(max=29), use_cache=False).logits[:, -1, :3]

    toy = Toy(Gpt2, (5,))
    module = uneven(toy)
    config = PruneConfig(structures=["layers"], repair=False, ignore=["body.model.transformer.h.[13]"])
    with pytest.raises(StageError, match="differ in their tensors alone"):
        prune_(module, toy, config)


def test_blocks_whose_tensors_have_other_names_are_named() -> None:
    toy = Toy(Longer, (6,))
    config = PruneConfig(structures=["layers"], targets=["body.blocks.0"], sparsity=0.9, repair=False)
    with pytest.raises(StageError, match=r"rebuilding(.|\n)*layers 0 and 1, whose class"):
        prune_(toy.source(), toy, config)


class Windowed(nn.Module):
    """A decoder of which one layer looks back 16 tokens: inputs of 12 show no difference."""

    def __init__(self) -> None:
        super().__init__()
        config = Qwen2Config(
            vocab_size=30, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=24, use_sliding_window=True, sliding_window=16, attn_implementation="eager",
            layer_types=["full_attention", "sliding_attention", "full_attention", "full_attention"],
        )  # fmt: skip
        self.model = Qwen2Model(config)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 10).long().clamp(max=29)
        return self.head(self.model(tokens, use_cache=False).last_hidden_state[:, -1])


def test_a_window_that_short_inputs_do_not_show_is_noticed() -> None:
    """A checkpoint without layer 1 would be rebuilt from layers 0 to 2: with the window, in another place."""
    toy = Toy(Windowed, (12,))
    config = PruneConfig(structures=["layers"], targets=["body.model.layers.1"], sparsity=0.9, repair=False)
    with pytest.raises(
        StageError, match=r"layers 1 and 2, whose self_attn\.\w+ is (.|\n)*differ in their tensors alone"
    ):
        prune_(toy.source(), toy, config)
    with pytest.raises(WorkloadError, match=r"dropping layers(.|\n)*distill\.keep_layers"):
        make_student(toy.source(), toy, DistillConfig(student="layer-drop", keep_layers=[0, 2]))
    report = prune_(toy.source(), toy, config.model_copy(update={"targets": ["body.model.layers.3"]}))
    assert report.kept_layers == [0, 1, 2]


def test_layers_that_count_themselves_or_have_other_sizes_are_alike() -> None:
    class Numbered(Block):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number, self.rate = number, nn.Dropout(number / 10)
            self.up, self.down = nn.Linear(12, 40 + number), nn.Linear(40 + number, 12)

    module = Stack()
    module.blocks = nn.ModuleList(map(Numbered, range(5)))
    assert unlike(module, [1, 3]) == ""
    module.blocks[4].number = 7
    assert "layers 2 and 4, whose number is 2 and 7" in unlike(module, [1, 3])
