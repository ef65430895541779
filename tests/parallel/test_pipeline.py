"""Stages, one after the other in one process, are the model; each holds its own part and nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from modelpress.errors import ConfigError, StageError
from modelpress.parallel.outline import Outline, outline
from modelpress.parallel.partition import balanced
from modelpress.parallel.pipeline import Stage, prove
from tests.parallel.models import batch, make

KINDS = ["llama", "tied", "bert", "residual"]


@pytest.fixture(scope="module")
def outlined() -> dict[str, tuple[nn.Module, Outline]]:
    models = {kind: make(kind) for kind in KINDS}
    return {kind: (module, outline(module, batch(kind)[0])) for kind, module in models.items()}


def test_ends_are_found_where_they_run(outlined: dict[str, tuple[nn.Module, Outline]]) -> None:
    llama = outlined["llama"][1]
    assert llama.before == ("model.model.embed_tokens",)
    assert llama.after == ("model.model.norm", "model.lm_head")
    bert = outlined["bert"][1]
    assert set(bert.before) == {
        f"bert.embeddings.{name}"
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
    }
    assert bert.after == ("head",)
    assert outlined["residual"][1].shared == ()


@pytest.mark.parametrize("kind", KINDS)
def test_every_split_answers_what_the_model_answers(outlined: dict[str, tuple[nn.Module, Outline]], kind: str) -> None:
    module, found = outlined[kind]
    inputs, _ = batch(kind)
    blocks = len(found.blocks)
    for parts in range(1, blocks + 1):
        prove(module, found, balanced([1.0] * blocks, parts).bounds, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_stages_hold_each_tensor_once(outlined: dict[str, tuple[nn.Module, Outline]], kind: str) -> None:
    """But for one that two ends share; their names are the model's."""
    module, found = outlined[kind]
    bounds = tuple(range(len(found.blocks) + 1))
    stages = [Stage(module, found, bounds, part, list(batch(kind)[0])) for part in range(len(bounds) - 1)]
    held = [set(stage.body.state_dict()) for stage in stages]
    assert set().union(*held) == set(module.state_dict())
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(held, 2))
    for part, (stage, names) in enumerate(zip(stages, held, strict=True)):
        assert names == set(found.parameters(module, bounds, part))
        own = dict(stage.body.named_parameters(remove_duplicate=False))
        whole = dict(module.named_parameters(remove_duplicate=False))
        assert all(own[name] is whole[name] for name in own)
    ends = {"model.model.embed_tokens.weight", "model.lm_head.weight"}
    assert (kind in ("llama", "tied")) == (ends <= held[0] | held[-1])


def test_the_model_is_left_as_it_was(outlined: dict[str, tuple[nn.Module, Outline]]) -> None:
    module, found = outlined["tied"]
    inputs, _ = batch("tied")
    with torch.no_grad():
        before = module(**inputs)
        Stage(module, found, (0, 2, 4), 1, list(inputs))(torch.zeros(8, 7, 16, dtype=torch.float64), **inputs)
        assert torch.equal(module(**inputs), before)
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_a_model_whose_ends_share_more_is_refused() -> None:
    module, (inputs, _) = make("bridged"), batch("bridged")
    with pytest.raises(StageError, match="another answer") as caught:
        prove(module, outline(module, inputs), (0, 2, 5), inputs)
    assert "split it elsewhere" in str(caught.value)


@pytest.mark.parametrize("bounds", [(0, 2), (0, 4, 4, 5), (1, 5), (0, 3, 2, 5), (0,)])
def test_bounds_that_are_none_are_refused(
    outlined: dict[str, tuple[nn.Module, Outline]], bounds: tuple[int, ...]
) -> None:
    module, found = outlined["residual"]
    with pytest.raises(ConfigError, match="5 blocks"):
        Stage(module, found, bounds, 0, ["x"])


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(StageError, match=r"no torch\.nn\.ModuleList"):
        outline(nn.Sequential(nn.Linear(2, 2)), {"input": torch.zeros(2, 2)})
