"""Small models in float64, so that what a split changes is told from what rounding does."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.parallel._model_ranks import in_one_precision

BLOCKS = 4


class Llama(nn.Module):
    """A decoder with grouped queries; logits of every token, (batch, length, 32)."""

    def __init__(self, *, tied: bool = False, layers: int = BLOCKS) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=24, max_position_embeddings=16, attn_implementation="sdpa", tie_word_embeddings=tied,
            use_cache=False,
        )  # fmt: skip
        self.model = in_one_precision(LlamaForCausalLM(config))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids, attention_mask=attention_mask).logits
        return logits


class Qwen(nn.Module):
    """A decoder that normalises each head's queries and keys by weights that all heads share."""

    def __init__(self) -> None:
        super().__init__()
        config = Qwen3Config(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=4, intermediate_size=24, max_position_embeddings=16, attn_implementation="sdpa", use_cache=False,
            tie_word_embeddings=False,
        )  # fmt: skip
        self.model = in_one_precision(Qwen3ForCausalLM(config))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids, attention_mask=attention_mask).logits
        return logits


class Bert(nn.Module):
    """An encoder, the mean over its tokens, and a head of three classes."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
            max_position_embeddings=16, attn_implementation="eager",
        )  # fmt: skip
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        logits: Tensor = self.head(hidden.mean(dim=1))
        return logits


class Residual(nn.Module):
    """Blocks that give a tensor, behind a stem whose output is wider than its input, and before a mean."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.blocks = nn.ModuleList([_Block(width, 8 * (number + 1)) for number in range(5)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.tanh())
        return logits


class Bridged(Residual):
    """What runs after the blocks reads what ran before them: the hidden state is not all that crosses."""

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x + first)
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def make(kind: str, seed: int = 0) -> nn.Module:
    """A model by name, random, in eval mode."""
    torch.manual_seed(seed)
    makers = {"llama": Llama, "tied": lambda: Llama(tied=True), "qwen": Qwen, "bert": Bert}
    return (makers | {"residual": Residual, "bridged": Bridged})[kind]().double().eval()


def batch(kind: str, samples: int = 8) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs, some positions of them masked, and targets."""
    generator = torch.Generator().manual_seed(1)
    if kind in ("residual", "bridged"):
        x = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
        return {"x": x}, torch.randint(0, 3, (samples,), generator=generator)
    ids = torch.randint(0, 32, (samples, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0
    shape = (samples,) if kind == "bert" else (samples, 7)
    return {"input_ids": ids, "attention_mask": mask}, torch.randint(0, 3, shape, generator=generator)


def loss(output: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, the mean over samples (and tokens, as many in each)."""
    return nn.functional.cross_entropy(output.flatten(0, -2), targets.flatten())
