"""A model larger than memory: one block at a time against the whole model in memory, on the same folder.

A Llama of random weights is written shard by shard; memory and time do not depend on what the weights are. Each stage
runs in a process of its own, first by `modelpress.blockwise`, then in memory (`prune_`, `round_linears_`, and
`save_pretrained`). Memory is the process's anonymous memory (RssAnon of /proc/self/status, sampled each 5 ms) at most,
less what it was when the data were loaded and the stage began: files that are mapped do not count, the kernel takes
their pages back when it needs them. Each runs under RLIMIT_DATA, which lets the process have half of the model's bytes
beyond what it has when the stage begins: a limit that the kernel holds, and not a measurement. A route that it stops
runs once more without it.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._report import Row, main
from modelpress.blockwise import prune_folder, quantize_folder
from modelpress.blockwise.paged import without_memory
from modelpress.config import PruneConfig, QuantizeConfig, WorkloadConfig
from modelpress.prune import prune_
from modelpress.prune.zeros import BATCH_SIZE
from modelpress.quantize.linear import choose_linears, round_linears_
from modelpress.workloads.causal_lm import CausalLM
from modelpress.workloads.text_corpus import Text, train_tokenizer

SOME = ["*.layers.0", "*.layers.1"]
"""What the slow methods change: how much is held does not depend on how many blocks there are."""
STAGES: dict[str, PruneConfig | QuantizeConfig] = {
    "magnitude, 50%": PruneConfig(method="magnitude"),
    "wanda, 2:4": PruneConfig(method="wanda", pattern="2:4"),
    "sparsegpt, 2:4, of two blocks": PruneConfig(method="sparsegpt", pattern="2:4", targets=SOME),
    "rtn, int4": QuantizeConfig(method="weight-only", algorithm="rtn", num_bits=4),
    "gptq, int4, of two blocks": QuantizeConfig(
        method="weight-only", algorithm="gptq", num_bits=4, targets=SOME, min_coverage=0
    ),
}
QUICK = ("magnitude, 50%", "wanda, 2:4", "rtn, int4")
SYSTEMS = {
    "blockwise": "modelpress, one block at a time",
    "scratch": "the same, scratch on disk",
    "memory": "modelpress, all in memory",
}
"""By route."""
WITH_SCRATCH = ("wanda, 2:4", "sparsegpt, 2:4, of two blocks", "gptq, int4, of two blocks")
SAMPLE_SECONDS = 0.005
MOMENT_BYTES = {"wanda": 4, "sparsegpt": 8, "gptq": 8}
"""Of an element of a second moment, by method or algorithm; the others have none."""
NOTE = (
    "Memory is beyond what the process had when the stage began, with interpreter, libraries and data loaded. `second "
    "moment` is that of the widest input, in whose matrix its factor is made too (a file, with scratch on disk); "
    "`activations` is what one block in memory takes to run on the calibration data, its outputs kept: measured. Both "
    "follow the widths and the data, and not the depth. `the rest` is the peak without them: the block itself, and "
    "what the method makes of one layer. `differing tensors` compares the two folders bit by bit.\n"
)


def measure(quick: bool) -> Iterator[Row]:
    """Rows of each stage, by both routes."""
    with tempfile.TemporaryDirectory(prefix="modelpress-") as place:
        home = Path(place)
        config = _sizes(quick)
        _make_folder(home / "model", config)
        facts = {"block": _block_bytes(config), "model": _bytes_of(home / "model")}
        facts |= {"widest": config.intermediate_size, "activations": _activations(home)}
        yield Row("model", "random Llama", "blocks", "", config.num_hidden_layers)
        yield Row("model", "random Llama", "block", "MB", facts["block"] / 1e6)
        yield Row("model", "random Llama", "model", "MB", facts["model"] / 1e6)
        yield Row("model", "random Llama", "activations", "MB", facts["activations"] / 1e6)
        for stage in QUICK if quick else STAGES:
            yield from _stage(stage, home, facts)


def _stage(stage: str, home: Path, facts: dict[str, int]) -> Iterator[Row]:
    half = facts["model"] // 2
    for route, system in SYSTEMS.items():
        if route == "scratch" and stage not in WITH_SCRATCH:
            continue
        held = _child(stage, route, home, half)
        yield Row(stage, system, "finishes within half of the model", "", float(held["finished"]))
        found = held if held["finished"] else _child(stage, route, home, None)
        yield Row(stage, system, "peak", "MB", found["peak"] / 1e6)
        yield Row(stage, system, "peak, in blocks", "", found["peak"] / facts["block"])
        if route != "memory":
            for part, size in _parts(stage, route, found["peak"], facts).items():
                yield Row(stage, system, f"{part}, in blocks", "", size / facts["block"])
        yield Row(stage, system, "peak, of the model", "%", 100 * found["peak"] / facts["model"])
        yield Row(stage, system, "time", "s", found["seconds"])
        yield Row(stage, system, "written", "MB", _bytes_of(home / route) / 1e6)
    if isinstance(STAGES[stage], PruneConfig):
        differing = _differing(home / "blockwise", home / "memory")
        yield Row(stage, SYSTEMS["blockwise"], "differing tensors", "", differing)
    for route in SYSTEMS:
        shutil.rmtree(home / route, ignore_errors=True)


def _parts(stage: str, route: str, peak: int, facts: dict[str, int]) -> dict[str, int]:
    """Bytes of a peak that the data and the widths ask for, and the rest."""
    config = STAGES[stage]
    method = config.method if isinstance(config, PruneConfig) else config.algorithm
    each = MOMENT_BYTES.get(method, 0)
    parts = {
        "second moment": 0 if route == "scratch" else each * facts["widest"] ** 2,
        "activations": facts["activations"] if each else 0,
    }
    return parts | {"the rest": peak - sum(parts.values())}


def _sizes(quick: bool) -> LlamaConfig:
    width, inner, blocks = (768, 2048, 16) if quick else (1280, 3456, 20)
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=1024,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )


def _make_folder(folder: Path, config: LlamaConfig) -> None:
    """A shard per block, each written and let go before the next; a tokenizer, and texts beside it."""
    with without_memory():
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    places: dict[str, str] = {}
    for shard, names in shards.items():
        tensors = {name: _random(model.get_parameter(name), generator) for name in names}
        save_file(tensors, folder / f"model-{shard}.safetensors", {"format": "pt"})
        places |= dict.fromkeys(names, f"model-{shard}.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    texts = folder.with_name("texts")
    texts.mkdir()
    for path in sorted((Path(sysconfig.get_path("stdlib")) / "json").glob("*.py")):
        shutil.copyfile(path, texts / path.name)
    content = [Text(str(one), one.read_text()) for one in sorted(texts.glob("*.py"))]
    train_tokenizer(content, 300).save(str(folder / "tokenizer.json"))


def _random(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if like.dim() == 1:
        return torch.ones(like.shape)
    return torch.randn(like.shape, generator=generator) / math.sqrt(like.shape[1])


def _block_bytes(config: LlamaConfig) -> int:
    with without_memory():
        model = LlamaForCausalLM(config)
    return sum(one.nbytes for name, one in model.named_parameters() if ".layers.0." in name)


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _differing(folder: Path, other: Path) -> int:
    """Tensors that are not the same bits in both, read one at a time."""

    def places(of: Path) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in of.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    ours, theirs = places(folder), places(other)
    count = len(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        with safe_open(ours[name], "pt") as file, safe_open(theirs[name], "pt") as second:
            count += not torch.equal(file.get_tensor(name), second.get_tensor(name))
    return count


def _child(stage: str, route: str, home: Path, limit: int | None) -> dict[str, Any]:
    """Run `child` in a process of its own; what it printed, and whether it finished."""
    return _call(f"child({stage!r}, {route!r}, {str(home)!r}, {limit})", limit is not None)


def _activations(home: Path) -> int:
    """Run `forward` in a process of its own."""
    return int(_call(f"forward({str(home)!r})", False)["peak"])


def _call(call: str, limited: bool) -> dict[str, Any]:
    code = f"from benchmarks.methods import larger_than_memory as module; module.{call}"
    # glibc would keep freed blocks of up to 32 MiB; so it gives them back, as it always does larger ones.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return {**json.loads(done.stdout.splitlines()[-1]), "finished": True}
    refused = ("allocate memory", "MemoryError", "bad_alloc", "ENOMEM")
    if not limited or not any(word in done.stderr for word in refused):
        raise RuntimeError(done.stderr[-3000:])
    return {"finished": False}


def child(stage: str, route: str, home: str, limit: int | None) -> None:
    """One stage by one route in this process; prints peak and seconds as JSON.

    Args:
        stage: of `STAGES`.
        route: `blockwise`, `scratch` (the same, scratch on disk) or `memory`; also the name of the folder to write.
        home: where `model` and `texts` are.
        limit: bytes that the process may have beyond what it has when the stage begins.
    """
    place, config, workload = Path(home), STAGES[stage], _workload(Path(home))
    _warm_up(workload)
    if limit is not None:
        most = _status("VmData") + limit
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    with _Peak() as peak:
        started = time.perf_counter()
        if route != "memory":
            on_disk = route == "scratch"
            if isinstance(config, PruneConfig):
                prune_folder(workload, config, place / route, scratch_on_disk=on_disk)
            else:
                quantize_folder(workload, config, place / route, scratch_on_disk=on_disk)
        else:
            module = workload.source()
            if isinstance(config, PruneConfig):
                prune_(module, workload, config)
            else:
                round_linears_(module, choose_linears(module, config), workload, config)
            module.get_submodule("model").save_pretrained(place / route)  # type: ignore[operator]
        seconds = time.perf_counter() - started
    print(json.dumps({"peak": peak.bytes, "seconds": seconds}))


def forward(home: str) -> None:
    """One block, in memory before the clock starts, on the calibration data; prints the peak as JSON."""
    workload = _workload(Path(home))
    _warm_up(workload)
    module = workload.skeleton({"num_hidden_layers": 1}).eval()
    kept: list[torch.Tensor] = []
    (block,) = (child for name, child in module.named_modules() if name.endswith("layers.0"))
    block.register_forward_hook(lambda _block, _args, output: kept.append(output))
    with _Peak() as peak, torch.no_grad():
        for batch in workload.batches("calibration", BATCH_SIZE):
            module(**batch.inputs)
            time.sleep(10 * SAMPLE_SECONDS)  # a look at what stays, however short the pass was
    print(json.dumps({"peak": peak.bytes}))


def _workload(home: Path) -> CausalLM:
    return CausalLM(
        WorkloadConfig(
            kind="causal-lm",
            model=str(home / "model"),
            data=str(home / "texts"),
            length=64,
            calibration_samples=16,
        )
    )


def _warm_up(workload: CausalLM) -> None:
    """What libraries load and allocate when they are first used is no part of a stage."""
    with without_memory():
        workload.skeleton({})
    small = workload.skeleton({"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64})
    with torch.no_grad():
        small(torch.zeros(16, 64, dtype=torch.int64))
    torch.linalg.cholesky(torch.eye(512, dtype=torch.float64))


class _Peak:
    """The most anonymous memory while it is open, beyond what there was when it was opened."""

    def __enter__(self) -> _Peak:
        self.bytes, self._base, self._stop = 0, _status("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, _status("RssAnon") - self._base)


def _status(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main("methods.larger_than_memory", measure, note=NOTE)
