"""One block at a time: the numbers of the whole model in memory, folders that are whole or not there, named errors."""

from __future__ import annotations

import gc
import json
import resource
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from modelpress import cli
from modelpress.blockwise import prune_folder, quantize_folder
from modelpress.compressed_tensors import deliver
from modelpress.config import PruneConfig, QuantizeConfig, WorkloadConfig
from modelpress.errors import (
    ConfigError,
    CorruptionError,
    ModelpressError,
    StageError,
    StoreFullError,
    WorkloadError,
)
from modelpress.prune import prune_
from modelpress.workloads.causal_lm import CausalLM
from tests.decoders import make_decoder_folder, make_text_folder
from tests.train.toy import Toy

LAYERS = 4


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_folder(tmp_path_factory.mktemp("texts"), ("json",))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """Four blocks in several shards; the output layer is not the embedding."""
    folder = make_decoder_folder(tmp_path_factory.mktemp("decoder"), texts, layers=LAYERS)
    reshard(folder, folder)
    return folder


def reshard(folder: Path, to: Path, **changes: object) -> Path:
    """Save a decoder again in shards of 60 kB, with other keys in its config or in another dtype."""
    model = LlamaForCausalLM.from_pretrained(folder)
    dtype = changes.pop("dtype", None)
    if changes.pop("tie", False):
        model.config.tie_word_embeddings = True
        model.tie_weights()
    if to != folder:
        shutil.copytree(folder, to)
    for path in to.glob("model*"):
        path.unlink()
    (model.to(dtype) if dtype else model).save_pretrained(to, max_shard_size="60KB")
    return to


def workload(folder: Path, texts: Path) -> CausalLM:
    return CausalLM(
        WorkloadConfig(kind="causal-lm", model=str(folder), data=str(texts), length=24, calibration_samples=40)
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's files; each stands in one of them, the one that the index names."""
    found: dict[str, torch.Tensor] = {}
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in found
            assert index.pop(name) == path.name
            found[name] = tensor
    assert not index
    return found


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("tie", [False, True])
def test_pruned_block_by_block_is_pruned_in_memory_bit_by_bit(
    tmp_path: Path, decoder: Path, texts: Path, method: str, tie: bool
) -> None:
    folder = reshard(decoder, tmp_path / "tied", tie=True) if tie else decoder
    one = workload(folder, texts)
    config = PruneConfig(method=method, sparsity=0.5)
    module = one.source()
    expected = prune_(module, one, config)
    report = prune_folder(one, config, tmp_path / "out")
    assert report == expected
    made, whole = tensors(tmp_path / "out"), state(module)
    assert ("lm_head.weight" in made) is not tie
    assert len(made) == len(whole) - tie
    assert all(torch.equal(tensor, whole[name]) for name, tensor in made.items())
    again = state(workload(tmp_path / "out", texts).source())  # transformers reads it, index and all
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("options", "dtype", "tie"),
    [
        ({"algorithm": "gptq", "num_bits": 4}, torch.bfloat16, True),
        ({"algorithm": "gptq", "act_order": True, "symmetric": False}, torch.float32, False),
        (
            {"algorithm": "rtn", "num_bits": 4, "symmetric": False, "ignore": ["lm_head", "*.1.mlp"]},
            torch.float16,
            False,
        ),
        ({"algorithm": "fp8"}, torch.bfloat16, False),
    ],
)
def test_quantized_block_by_block_is_the_folder_of_the_whole_model(
    tmp_path: Path, decoder: Path, texts: Path, options: dict[str, Any], dtype: torch.dtype, tie: bool
) -> None:
    """The same tensors bit by bit as `modelpress quantize` writes, which compressed-tensors' own code reads."""
    one = workload(reshard(decoder, tmp_path / "in", dtype=dtype, tie=tie), texts)
    groups = {} if options["algorithm"] == "fp8" else {"group_size": 16}
    config = QuantizeConfig.model_validate({"method": "weight-only"} | groups | options)
    report = quantize_folder(one, config, tmp_path / "out")
    whole = config.model_copy(update={"max_quality_drop": 0.2})
    assert report == deliver(one.source(), one, whole, tmp_path / "whole", max_shard_size=20_000).quantize
    made, expected = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name].view(torch.uint8), tensor.view(torch.uint8)), name
    stated = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in ("out", "whole")
    ]
    assert stated[0] == stated[1]
    assert stated[0]["ignore"][0] == "lm_head"
    assert len(report.layers) == 7 * LAYERS - (3 if "ignore" in options else 0)


class Counted(CausalLM):
    """Counts what is in memory whenever any module of the model is called."""

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        module = super().skeleton(architecture)
        self.most = 0

        def count(*_: Any) -> None:
            self.most = max(self.most, sum(one.nbytes for one in module.parameters() if not one.is_meta))

        for child in module.modules():
            child.register_forward_pre_hook(count)
        return module


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_no_more_than_a_block_is_in_memory(tmp_path: Path, decoder: Path, texts: Path, method: str) -> None:
    """Of six parts of about the same size (the embedding, four blocks, the output layer), one at a time."""
    one = Counted(workload(decoder, texts).config)
    config = PruneConfig(method=method, ignore=["*.layers.1"])
    prune_folder(one, config, tmp_path / "out", scratch_on_disk=method == "sparsegpt")
    whole = sum(tensor.nbytes for tensor in tensors(decoder).values())
    sizes = json.loads((tmp_path / "out" / "blockwise_report.json").read_text())["sizes"]
    assert sizes["model_bytes"] == whole
    assert max(one.most, sizes["block_bytes"]) <= sizes["most_live_bytes"] < whole / 5
    assert one.most > 0 or method == "magnitude"  # which calls nothing
    kept = tensors(tmp_path / "out")
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors(decoder).items() if "layers.1." in name)


def damaged(decoder: Path, to: Path, how: str) -> Path:
    shutil.copytree(decoder, to)
    index = json.loads((to / "model.safetensors.index.json").read_text())
    name = "model.layers.2.mlp.up_proj.weight"
    shard = to / index["weight_map"][name]
    if how == "missing shard":
        shard.unlink()
    elif how == "missing tensor":
        del index["weight_map"][name]
        (to / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "cut short":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how in ("not a number", "strange"):
        found = load_file(shard)
        if how == "strange":
            found["adapter.weight"] = torch.ones(3)
            index["weight_map"]["adapter.weight"] = shard.name
            (to / "model.safetensors.index.json").write_text(json.dumps(index))
        found[name][3, 4] = float("nan") if how == "not a number" else 0.0
        save_file(found, shard, {"format": "pt"})
    elif how == "no blocks":
        config = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 0}))
    elif how == "another size":
        config = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps(config | {"intermediate_size": 72}))
    return to


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("missing shard", WorkloadError, r"no model-0000\d-of-"),
        ("missing tensor", WorkloadError, r"no tensor 'model\.layers\.2\.mlp\.up_proj\.weight'"),
        ("cut short", CorruptionError, r"opening .*model-0000\d-of-(.|\n)*copy the file again"),
        ("not a number", StageError, r"tensor model\.layers\.2\.mlp\.up_proj\.weight(.|\n)*NaN or infinite"),
        ("strange", WorkloadError, r"'adapter\.weight'"),
        ("no blocks", WorkloadError, r"without a list of blocks"),
        ("another size", WorkloadError, r"shape \[\d+, \d+\](.|\n)*72"),
    ],
)
def test_a_damaged_folder_is_named_and_nothing_is_left(
    tmp_path: Path, decoder: Path, texts: Path, how: str, kind: type[ModelpressError], said: str
) -> None:
    folder = damaged(decoder, tmp_path / "in", how)
    with pytest.raises(kind, match=said):
        prune_folder(workload(folder, texts), PruneConfig(method="wanda"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, decoder: Path, texts: Path) -> None:
    one = workload(decoder, texts)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a block has 37 kB
    try:
        with pytest.raises(StoreFullError, match=r"writing .*shard-1\.safetensors"):
            prune_folder(one, PruneConfig(method="magnitude"), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_scratch_on_a_full_disk_says_so(tmp_path: Path, decoder: Path, texts: Path) -> None:
    """Room is taken before it is used: a mapped page without any would end the process."""
    one = workload(decoder, texts)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.raises(StoreFullError, match=r"writing .*scratch"):
            prune_folder(one, PruneConfig(method="wanda"), tmp_path / "out", scratch_on_disk=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux which files are mapped")
def test_files_are_let_go_and_only_those_of_the_model_are_copied(tmp_path: Path, decoder: Path, texts: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(decoder, folder)
    (folder / "pytorch_model.bin.index.json").write_text("{}")  # of shards that do not come along
    (folder / ".login.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "download.json").write_text("{}")
    gc.disable()
    try:
        prune_folder(workload(folder, texts), PruneConfig(method="wanda"), tmp_path / "out", scratch_on_disk=True)
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    finally:
        gc.enable()
    assert not mapped
    assert sorted(path.name for path in (tmp_path / "out").glob("*.index.json")) == ["model.safetensors.index.json"]
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not list((tmp_path / "out").rglob(".*")), "what is hidden is no part of the model"


def test_what_needs_the_whole_model_is_refused(tmp_path: Path, decoder: Path, texts: Path) -> None:
    one = workload(decoder, texts)
    for options in ({"method": "structured"}, {"method": "magnitude", "scope": "global"}, {"recovery": {"epochs": 1}}):
        with pytest.raises(ConfigError, match="needs the whole model in memory"):
            prune_folder(one, PruneConfig.model_validate({"method": "wanda"} | options), tmp_path / "out")
    for config, said in (
        (QuantizeConfig(method="static"), "method 'static'"),
        (QuantizeConfig(method="weight-only", max_quality_drop=0.5), r"max_quality_drop 0\.5"),
    ):
        with pytest.raises(ConfigError, match=said):
            quantize_folder(one, config, tmp_path / "out")
    with pytest.raises(StageError, match=r"32 inputs of 'model\.layers\.0\.self_attn\.q_proj'"):
        quantize_folder(one, QuantizeConfig(method="weight-only", algorithm="rtn", group_size=64), tmp_path / "out")
    with pytest.raises(WorkloadError, match="not read from a Hugging Face folder"):
        prune_folder(Toy(lambda: nn.Linear(2, 2), shape=(2,)), PruneConfig(method="magnitude"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="something there already"):
        prune_folder(one, PruneConfig(method="magnitude"), tmp_path / "link")
    with pytest.raises(ConfigError, match="something there already"):
        prune_folder(one, PruneConfig(method="magnitude"), tmp_path / "out")


def _sum(weight: Tensor) -> None:
    weight.sum().item()


def _multiply(weight: Tensor) -> None:
    """What torch computes without a word, on memory that is not there."""
    nn.functional.linear(torch.ones(1, weight.shape[1]), weight)


@pytest.mark.parametrize("use", [_sum, _multiply])
def test_a_weight_that_another_module_uses_is_said(
    tmp_path: Path, decoder: Path, texts: Path, use: Callable[[Tensor], None]
) -> None:
    class Borrowing(CausalLM):
        def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
            module = super().skeleton(architecture)
            module.model.model.norm.register_forward_pre_hook(lambda *_: use(module.model.lm_head.weight))
            return module

    one = Borrowing(workload(decoder, texts).config)
    with pytest.raises(StageError, match="used outside the module that it belongs to"):
        prune_folder(one, PruneConfig(method="wanda"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_error_that_names_a_path_stays_what_it_is(tmp_path: Path, decoder: Path, texts: Path) -> None:
    class Failing(CausalLM):
        def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
            def fail(*_: Any) -> None:
                raise RuntimeError("/models/meta-llama/kernel.so: no such file")

            module = super().skeleton(architecture)
            module.register_forward_pre_hook(fail)
            return module

    with pytest.raises(RuntimeError, match=r"^/models/meta-llama/kernel\.so"):
        prune_folder(Failing(workload(decoder, texts).config), PruneConfig(method="wanda"), tmp_path / "out")


def test_from_the_command_line(tmp_path: Path, decoder: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"workload: {{kind: causal-lm, model: {decoder}, data: {texts}, length: 24, calibration_samples: 40}}\n"
        "quantize: {method: weight-only, algorithm: rtn, group_size: 32}\n"
    )
    with pytest.raises(SystemExit) as ended:
        cli.main(["blockwise", str(recipe), "--to", str(tmp_path / "out")])
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "model.layers.3.mlp.down_proj.weight" in out
    assert "not measured" in out  # rounding to the nearest asks no data
    assert (tmp_path / "out" / "config.json").is_file()
    recipe.write_text(recipe.read_text() + "prune: {method: wanda}\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["blockwise", str(recipe), "--to", str(tmp_path / "other")])
    assert ended.value.code == ConfigError.exit_code
    assert "one of prune and quantize" in capsys.readouterr().err
