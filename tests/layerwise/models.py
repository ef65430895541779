"""Models of many shapes whose layers are walked, and their data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from modelpress.workload import Batch


class Chain(nn.Module):
    """A projection, three blocks that take hidden states and a mask, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.project(x)
        for block in self.blocks:
            hidden = block(hidden, scale=attention_mask.unsqueeze(-1))[0]
        return self.head(hidden.mean(dim=1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, hidden: Tensor, scale: Tensor) -> tuple[Tensor, str]:
        return hidden + self.down(self.up(hidden).relu()) * scale, "anything"


class Residual(Chain):
    """The sum stands outside the blocks, so that no block takes what the one before it gave."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.project(x)
        for block in self.blocks:
            hidden = hidden + block(hidden, attention_mask.unsqueeze(-1))[0]
        return self.head(hidden.mean(dim=1))


class Skip(Chain):
    """The last block takes more than the first one took: an earlier block's output."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        first = self.blocks[0](self.project(x), attention_mask.unsqueeze(-1))[0]
        second = self.blocks[1](first, attention_mask.unsqueeze(-1))[0]
        return self.head(self.blocks[2](second, first)[0].mean(dim=1))


class Repeated(Chain):
    """One block, called three times."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.project(x)
        for _ in range(3):
            hidden = self.blocks[0](hidden, attention_mask.unsqueeze(-1))[0]
        return self.head(hidden.mean(dim=1))


class Tokens(nn.Module):
    """A transformer whose token numbers come from the toy's floats."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = (x[..., 0].abs() * 10).long().clamp(max=29)
        return self.model(input_ids=tokens, attention_mask=attention_mask).last_hidden_state.mean(dim=1)


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    return Tokens(BertModel(config, add_pooling_layer=False))


def llama() -> nn.Module:
    """A decoder whose blocks are handed a cache that grows with each call."""
    config = LlamaConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16,
    )  # fmt: skip
    return Tokens(LlamaModel(config))


CASES: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain, "residual": Residual, "skip": Skip, "bert": bert, "llama": llama,
}  # fmt: skip


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def batches(count: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(count):
        mask = torch.ones(4, 5, dtype=torch.int64)
        mask[0, 3:] = 0
        mask[1, 2 + index :] = 0
        found.append(Batch({"x": torch.randn(4, 5, 6, generator=generator), "attention_mask": mask}))
    return found


def linears(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
