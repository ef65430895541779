"""Models whose structures are pruned: convolutions, residual sums, gates, attention, a small encoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from tests.train.toy import Toy


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 12, 3, padding=1), nn.GELU(), nn.Flatten()),
        *(nn.Linear(12 * 9, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3)),
    )


class Residual(nn.Module):
    """Two producers that meet in a sum, then a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.depthwise = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.norm(x + self.branch(x)).relu()
        return self.head(self.depthwise(x).flatten(1))


class Gated(nn.Module):
    """A gated feed-forward block beside a residual stream with layer normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.gate, self.up, self.down = nn.Linear(6, 10, bias=False), nn.Linear(6, 10), nn.Linear(10, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        x = x + self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))
        return self.head(x.mean(dim=1))


class Attention(nn.Module):
    """Self-attention by one fused product; the number of heads follows from the shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(x.mean(dim=1))


class Bert(nn.Module):
    """A tiny Hugging Face encoder (post-norm), averaged."""

    def __init__(self, layers: int = 2, **sizes: object) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=24,
            max_position_embeddings=16, attn_implementation="eager", **sizes,
        )  # fmt: skip
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 10).long().clamp(max=29)
        return self.head(self.bert(tokens).last_hidden_state.mean(dim=1))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "cnn": (cnn, (1, 8, 8), {"channels", "neurons"}),
    "residual": (Residual, (1, 8, 8), {"channels"}),
    "gated": (Gated, (5, 6), {"neurons"}),
    "attention": (Attention, (5, 8), {"heads"}),
    "bert": (Bert, (7,), {"heads", "neurons"}),
}
ALL = ["channels", "neurons", "heads"]


def toy_of(case: str) -> Toy:
    make, shape, _ = CASES[case]
    return Toy(make, shape, samples=120)


def settled(toy: Toy) -> nn.Module:
    """The source after batch normalisation has seen data, with biases that are not zero."""
    module = toy.source().train()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        module(toy.x)
    return module.eval()
