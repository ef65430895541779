"""Models of blocks in a row, of which some are cut out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from modelpress.blocks import layer_list
from tests.prune.models import Bert
from tests.train.toy import Toy


class Llama(nn.Module):
    """A tiny pre-norm decoder of four layers with tied embeddings and grouped queries; logits of the last token."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=24, max_position_embeddings=16, attn_implementation="eager", tie_word_embeddings=True,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 10).long().clamp(max=29)
        return self.model(tokens, use_cache=False).logits[:, -1, :3]


class Stack(nn.Module):
    """Residual blocks that return a plain tensor, behind a stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.blocks = nn.ModuleList([Block() for _ in range(5)])
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 40), nn.Linear(40, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "bert": (partial(Bert, 4), (12,)),
    "llama": (Llama, (12,)),
    "stack": (Stack, (6,)),
}


def toy_of(case: str) -> Toy:
    make, shape = CASES[case]
    return Toy(make, shape, samples=120)


def uneven(toy: Toy) -> nn.Module:
    """The source with weights large enough for each block to matter, each to another degree."""
    module = toy.source()
    with torch.no_grad():
        for number, block in enumerate(layer_list(module)):
            for parameter in block.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(2.0 + (3 * number) % 4)
    return module
