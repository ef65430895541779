"""Depth pruning: what is cut equals what skips, gaps are filled by least squares, and the result lives on elsewhere."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel, Qwen2Config, Qwen2Model

from modelpress.blocks import drop_layers_, layer_list
from modelpress.checkpoint import Checkpoint, from_module, to_module
from modelpress.config import ExportConfig, PruneConfig, TrainConfig, WorkloadConfig
from modelpress.distill import count_parameters
from modelpress.errors import ConfigError, CoverageError, StageError
from modelpress.export import export
from modelpress.graph import run, session
from modelpress.prune import prune_
from modelpress.prune.layers import last_filled
from modelpress.prune.recovery import _matched_blocks
from modelpress.prune.refit import find_joint, refit_
from modelpress.workload import Batch, Split
from modelpress.workloads.sentence_embedding import SentenceEmbedding
from tests.encoders import make_encoder_folder
from tests.prune.stacks import CASES, Block, Stack, toy_of, uneven
from tests.train.toy import Toy

TRAINING = TrainConfig(epochs=2, batch_size=16, learning_rate=1e-3)


def skipping(dense: nn.Module, gone: list[int]) -> nn.Module:
    """The dense model with the identity in the place of blocks."""
    module = copy.deepcopy(dense)

    def skip(_block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: object) -> object:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for number in gone:
        layer_list(module)[number].register_forward_hook(skip, with_kwargs=True)
    return module


def removed(kept: list[int], blocks: int) -> list[int]:
    return [number for number in range(blocks) if number not in kept]


@pytest.mark.parametrize("importance", ["activation", "taylor"])
@pytest.mark.parametrize("case", CASES)
def test_the_cut_model_equals_the_one_that_skips(case: str, importance: str) -> None:
    toy = toy_of(case)
    dense = uneven(toy)
    cut = copy.deepcopy(dense)
    config = PruneConfig(structures=["layers"], sparsity=0.5, importance=importance, repair=False)
    report = prune_(cut, toy, config)
    blocks = len(layer_list(dense))
    gone = removed(report.kept_layers, blocks)
    assert len(gone) == round(0.5 * blocks)
    expected = skipping(dense, gone)(toy.x)
    assert (cut(toy.x) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (expected - dense(toy.x)).abs().max() > 1e-3
    assert len(layer_list(cut)) == blocks - len(gone)
    assert report.parameters_after == count_parameters(cut)
    assert report.parameters_before - report.touched_parameters == report.parameters_after
    assert report.coverage == report.touched_parameters / report.eligible_parameters == len(gone) / blocks
    assert report.refitted_layers == []
    least = sorted(range(blocks), key=lambda number: report.influences[number])[: len(gone)]
    assert sorted(least) == gone
    assert all(parameter.requires_grad for parameter in cut.parameters())


def test_the_block_that_does_nothing_goes_first() -> None:
    for importance in ("activation", "taylor"):
        toy = toy_of("stack")
        module = uneven(toy)
        module.body.blocks[3].down.weight.data.zero_()
        expected = module(toy.x)
        report = prune_(module, toy, PruneConfig(structures=["layers"], sparsity=0.2, importance=importance))
        assert report.kept_layers == [0, 1, 2, 4]
        assert report.influences[3] == pytest.approx(0, abs=1e-6)
        assert torch.allclose(module(toy.x), expected, atol=1e-4)


def test_influence_is_one_minus_the_cosine() -> None:
    toy = toy_of("stack")
    module = uneven(toy)
    x = toy.x[toy.rows["calibration"]]
    states = [module.body.stem(x)]
    for block in module.body.blocks:
        states.append(block(states[-1]))
    expected = [
        float((1 - nn.functional.cosine_similarity(a, b, dim=-1)).mean().detach())
        for a, b in itertools.pairwise(states)
    ]
    report = prune_(module, toy, PruneConfig(structures=["layers"], sparsity=0.4))
    assert report.influences == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_repair_is_nearer_to_the_dense_model(case: str) -> None:
    toy = toy_of(case)
    dense = uneven(toy)
    x = toy.x[toy.rows["calibration"]]
    error = {}
    for repair in (False, True):
        module = copy.deepcopy(dense)
        config = PruneConfig(structures=["layers"], sparsity=0.5, repair=repair, ignore=[first_block(dense)])
        report = prune_(module, toy, config)
        assert bool(report.refitted_layers) == repair
        error[repair] = float((module(x) - dense(x)).square().mean().detach())
    assert error[True] < 0.8 * error[False]


def first_block(module: nn.Module) -> str:
    return next(name for name, child in module.named_modules() if child is layer_list(module)[0])


def test_the_refit_is_the_regression() -> None:
    """What a block reads explains what the gap behind it adds: W + (t − h) a⁺, by numpy's least squares."""
    toy = toy_of("stack")
    dense, module = uneven(toy), uneven(toy)
    block = layer_list(module)[1]
    with torch.no_grad():
        for parameter in layer_list(dense)[2].parameters():
            parameter.zero_()
        layer_list(dense)[2].up.bias.fill_(1.0)
        layer_list(dense)[2].down.weight.fill_(0.25)  # adds a constant
        dense.body.blocks[1].down = nn.Linear(40, 12)
        dense.body.blocks[1].down.weight.copy_(block.down.weight)
        dense.body.blocks[1].down.bias.zero_()
        module.body.blocks[1].down = copy.deepcopy(dense.body.blocks[1].down)
        joint = find_joint(module, block, "block", toy.example(3))
        refit_(module, joint, dense, layer_list(dense)[2], toy)
    assert joint.norm is None
    assert torch.allclose(block.down.bias, torch.full((12,), 10.0), rtol=1e-4)
    assert torch.allclose(block.down.weight, dense.body.blocks[1].down.weight, atol=1e-4)


def test_a_block_before_a_gap_is_matched_to_the_last_of_the_gap() -> None:
    toy = toy_of("stack")
    dense = uneven(toy)
    cut = copy.deepcopy(dense)
    drop_layers_(cut, [0, 2, 4])
    pairs = _matched_blocks(dense, cut, toy, [1, 3])
    before, after = list(layer_list(dense)), list(layer_list(cut))
    assert [(before.index(taught), after.index(learned)) for taught, learned in pairs] == [(2, 0), (4, 1)]


class Flat(Stack):
    """Blocks that flatten (batch, length, dim), as OPT's do, under a mask that leaves positions out."""

    def __init__(self) -> None:
        super().__init__()

        class FlatBlock(Block):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.reshape(-1, 12)).view(x.shape)

        self.blocks = nn.ModuleList([FlatBlock() for _ in range(5)])

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return (super().forward(x) * attention_mask[..., None]).sum(dim=1)


class Masked(Toy):
    """Every second sample is 5 positions long; what stands behind is noise that must not count."""

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        return Flat()

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        for batch in super().batches(split, batch_size, seed):
            x = batch.inputs["x"].clone()
            mask = torch.ones(x.shape[:2], dtype=torch.int64)
            mask[::2, 5:] = 0
            x[::2, 5:] *= 100
            yield Batch({"x": x, "attention_mask": mask}, batch.targets)


def test_blocks_that_flatten_are_refitted_without_the_padding() -> None:
    toy = Masked(Flat, (8, 6), samples=120)
    dense = uneven(toy)
    batch = next(toy.batches("calibration", 32))
    error = {}
    for repair in (False, True):
        module = copy.deepcopy(dense)
        config = PruneConfig(structures=["layers"], sparsity=0.4, repair=repair, ignore=["blocks.0"])
        report = prune_(module, toy, config)
        assert bool(report.refitted_layers) == repair
        error[repair] = float((module(**batch.inputs) - dense(**batch.inputs)).square().mean().detach())
    assert error[True] < 0.5 * error[False]


class Coarse(Toy):
    """The model and what it reads are bfloat16."""

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        return super().skeleton(architecture).bfloat16()

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        for batch in super().batches(split, batch_size, seed):
            yield Batch({"x": batch.inputs["x"].bfloat16()}, batch.targets)


def test_a_bfloat16_model_is_refitted_too() -> None:
    toy = Coarse(Stack, (6,), samples=120)
    dense = uneven(toy)
    x = toy.x[toy.rows["calibration"]].bfloat16()
    error = {}
    for repair in (False, True):
        module = copy.deepcopy(dense)
        prune_(module, toy, PruneConfig(structures=["layers"], sparsity=0.4, repair=repair, ignore=["body.blocks.0"]))
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
        error[repair] = float((module(x) - dense(x)).float().square().mean().detach())
    assert error[True] < 0.5 * error[False]


def test_a_recovery_learns_from_what_the_gap_gave() -> None:
    assert last_filled([0, 2, 5], 7) == {0: 1, 2: 4, 5: 6}
    assert last_filled([0, 1, 2], 3) == {0: 0, 1: 1, 2: 2}
    toy = toy_of("bert")
    module = uneven(toy)
    report = prune_(module, toy, PruneConfig(structures=["layers"], recovery=TRAINING))
    assert report.matched_states == 2
    assert report.recovery is not None
    assert report.recovery.final_loss < report.recovery.first_loss


@pytest.mark.parametrize("case", CASES)
def test_a_cut_model_is_rebuilt_from_its_checkpoint(case: str) -> None:
    toy = toy_of(case)
    module = uneven(toy)
    prune_(module, toy, PruneConfig(structures=["layers"], sparsity=0.5))
    again = prune_(module, toy, PruneConfig(structures=["neurons"], sparsity=0.25))
    assert again.kept_layers == []
    back = to_module(Checkpoint.from_bytes(from_module(module).to_bytes()), toy)
    assert torch.equal(back(toy.x), module(toy.x))
    assert repr(back) == repr(module)
    for child, other in zip(module.modules(), back.modules(), strict=True):
        assert getattr(child, "layer_idx", None) == getattr(other, "layer_idx", None)
        config, other_config = getattr(child, "config", None), getattr(other, "config", None)
        assert getattr(config, "num_hidden_layers", 2) == getattr(other_config, "num_hidden_layers", 2) == 2


def test_a_decoder_generates_with_its_cache_after_the_cut() -> None:
    toy = toy_of("llama")
    module = uneven(toy)
    prune_(module, toy, PruneConfig(structures=["layers"], sparsity=0.5, ignore=["body.model.model.layers.1"]))
    model = module.body.model
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    prompt = torch.arange(3, 8)[None]
    texts = [
        model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0, eos_token_id=29)
        for cache in (True, False)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("kind", ["bert", "qwen2"])
def test_a_folder_of_the_cut_model_loads(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    if kind == "bert":
        model: nn.Module = BertModel(BertConfig(**sizes, intermediate_size=24)).eval()
    else:
        config = Qwen2Config(**sizes, num_key_value_heads=2, intermediate_size=24)
        model = Qwen2Model(config).eval()
    drop_layers_(model, [1])
    assert model.config.num_hidden_layers == 2
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    ids = torch.arange(5)[None]
    assert torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)


def test_through_the_line_with_a_recovery(tmp_path: Path) -> None:
    """prune, save, rebuild, export: what `tasks.models` does, stage by stage."""
    folder = make_encoder_folder(tmp_path / "encoder", pairs=60)
    workload = SentenceEmbedding(
        WorkloadConfig(kind="sentence-embedding", model=str(folder), data=str(folder / "pairs.jsonl"))
    )
    module = workload.source()
    config = PruneConfig(structures=["layers"], sparsity=0.34, recovery=TRAINING)
    report = prune_(module, workload, config)
    assert len(report.kept_layers) == report.matched_states == 2
    saved = from_module(module, {}).to_bytes()
    rebuilt = to_module(Checkpoint.from_bytes(saved), workload)
    graph, _ = export(rebuilt, workload, ExportConfig())
    inputs = workload.example(4)
    with torch.no_grad():
        expected = module(**inputs)
    assert torch.equal(rebuilt(**inputs), expected)
    assert torch.allclose(torch.from_numpy(run(session(graph, threads=1), inputs)), expected, atol=1e-5)
    module.model.save_pretrained(tmp_path / "small")
    assert AutoModel.from_pretrained(tmp_path / "small").config.num_hidden_layers == 2


def test_errors_come_before_anything_changed() -> None:
    toy = toy_of("stack")
    module = uneven(toy)
    before = copy.deepcopy(module.state_dict())
    layers = PruneConfig(structures=["layers"])
    with pytest.raises(CoverageError, match=r"5 blocks(.|\n)*at least one left"):
        prune_(module, toy, layers.model_copy(update={"sparsity": 0.95}))
    with pytest.raises(CoverageError, match="removes nothing"):
        prune_(module, toy, layers.model_copy(update={"sparsity": 0.05}))
    with pytest.raises(ConfigError, match="blcks"):
        prune_(module, toy, layers.model_copy(update={"targets": ["body.blcks.1"]}))
    toy.x[toy.rows["calibration"][0]] = float("inf")
    with pytest.raises(StageError, match=r"influence of body\.blocks\.0"):
        prune_(module, toy, layers)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert len(layer_list(module)) == 5


def test_targets_and_ignore_choose_blocks() -> None:
    toy = toy_of("stack")
    report = prune_(uneven(toy), toy, PruneConfig(structures=["layers"], targets=["body.blocks.[13]"]))
    assert report.kept_layers in ([0, 1, 2, 4], [0, 2, 3, 4])
    report = prune_(uneven(toy), toy, PruneConfig(structures=["layers"], ignore=["body.blocks.[0124]"], sparsity=0.9))
    assert report.kept_layers == [0, 1, 2, 4]
