"""Layers that cannot leave: each kind says why, and the model stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from modelpress.config import PruneConfig
from modelpress.errors import StageError
from modelpress.prune import prune_
from tests.prune.test_layers import Block, Stack, uneven
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


class Unlike(Stack):
    """One block has another activation, which no tensor tells."""

    def __init__(self) -> None:
        super().__init__()

        class Other(Block):
            def forward(self, x: Tensor) -> Tensor:
                return x + self.down(self.up(x).tanh())

        self.blocks[4] = Other()


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
        (Unlike, r"rebuilding(.|\n)*differ in their tensors alone"),
        (Product, r"body\.blocks\.\d(.|\n)*prune\.repair to false"),
        (lambda: nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 3)), r"no torch\.nn\.ModuleList"),
    ],
    ids=["narrowing", "twice", "outside", "counted", "unlike", "product", "no blocks"],
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
