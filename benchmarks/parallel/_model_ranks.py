"""What each of four processes does for `benchmarks.parallel.model`; it writes what it measured as JSON."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from modelpress.cache import BlobCache
from modelpress.load.names import load_manifest
from modelpress.parallel.mesh import MeshSizes, make_mesh
from modelpress.parallel.outline import outline
from modelpress.parallel.partition import balanced
from modelpress.parallel.rank_load import load_into_, load_tensors
from modelpress.parallel.runner import Runner
from modelpress.parallel.slices import share_name
from modelpress.parallel.tensor import plan_tensors, whole
from modelpress.parallel.traffic import open_sockets, sent_bytes
from modelpress.store import Store, observe, open_store

RANKS = 4
MESHES = {
    "pipeline 4": (MeshSizes(pipeline=4), "1f1b"),
    "pipeline 4, GPipe": (MeshSizes(pipeline=4), "gpipe"),
    "pipeline 2 × tensor 2": (MeshSizes(pipeline=2, tensor=2), "1f1b"),
    "data 2 × tensor 2": (MeshSizes(data=2, tensor=2), "1f1b"),
    "data 2 × pipeline 2": (MeshSizes(data=2, pipeline=2), "1f1b"),
    "data 2 × pipeline 2, interleaved": (MeshSizes(data=2, pipeline=2), "interleaved"),
    "tensor 4": (MeshSizes(tensor=4), "1f1b"),
}
LOADED = {
    "pipeline 4": MeshSizes(pipeline=4),
    "pipeline 2 × tensor 2": MeshSizes(pipeline=2, tensor=2),
    "data 2 × tensor 2": MeshSizes(data=2, tensor=2),
}
"""Whose ranks read their parts of packs."""
MICROBATCHES = 4
VOCABULARY = 512


def in_one_precision(model: nn.Module) -> nn.Module:
    """A decoder of transformers that computes in the dtype of its weights alone, in place.

    Its own norms, and the softmax of its eager attention, round to float32 whatever that dtype is. Where sums in
    another order move a float64 over a border between two float32, all that follows differs as float32 does: the
    comparison would be one of single precision. Make it with `attn_implementation="sdpa"`.
    """
    for name, child in list(model.named_modules()):
        if type(child).__name__.endswith("RMSNorm") and not isinstance(child, nn.RMSNorm):
            weight: Any = child.weight
            norm = nn.RMSNorm(weight.shape, eps=float(child.variance_epsilon))
            norm.weight = weight
            model.set_submodule(name, norm, strict=True)
    return model


class Decoder(nn.Module):
    """A Llama; logits of every token."""

    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        make: Any = LlamaConfig
        config = make(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=False,
            use_cache=False, attn_implementation="sdpa",
        )  # fmt: skip
        self.model = in_one_precision(LlamaForCausalLM(config))

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, length) → (batch, length, vocabulary)."""
        logits: Tensor = self.model(input_ids).logits
        return logits


def parts_of(sizes: MeshSizes, schedule: str) -> int:
    """Of the pipeline: one for each of its ranks, or two."""
    return sizes.pipeline * (2 if schedule == "interleaved" else 1)


def decoder(quick: bool, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(seed)
    width, layers = (64, 4) if quick else (256, 8)
    return Decoder(width, layers, VOCABULARY).to(dtype).eval()


def batch(quick: bool) -> tuple[dict[str, Tensor], Tensor]:
    """The whole step's tokens, and those that follow."""
    tokens = torch.randint(0, VOCABULARY, (16, 33 if quick else 65), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()


def loss(output: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the next token."""
    return nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten())


def work(rank: int, folder: Path, quick: bool, pack: str) -> None:
    """All that one rank does."""
    torch.set_num_threads(1)
    before = open_sockets()
    timeout = datetime.timedelta(seconds=500)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=timeout
    )
    found: dict[str, Any] = {}
    for name in MESHES:
        for dtype in (torch.float32, torch.float64):
            found[f"{name} {dtype}"] = _step(folder, name, dtype, quick, before)
    found["loads"] = _loads(folder, quick, pack)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # nothing waits for the other ranks' sockets


def _step(folder: Path, name: str, dtype: torch.dtype, quick: bool, before: set[int]) -> dict[str, float]:
    """Errors of outputs and gradients against one process, and what a second step's sockets sent."""
    expected = safetensors.torch.load_file(folder / f"{dtype}.safetensors")
    sizes, schedule = MESHES[name]
    module, (inputs, targets) = decoder(quick, dtype), batch(quick)
    mesh, outlined = make_mesh(sizes), outline(module, inputs)
    copy, copies = mesh.get_local_rank("data"), sizes.data
    inputs = {key: tensor.chunk(copies)[copy] for key, tensor in inputs.items()}
    targets = targets.chunk(copies)[copy]
    plan = plan_tensors(module, sizes.tensor) if sizes.tensor > 1 else {}
    bounds = balanced([1.0] * len(outlined.blocks), parts_of(sizes, schedule)).bounds
    options: Any = {"microbatches": MICROBATCHES, "loss": loss, "schedule": schedule}
    runner = Runner(module, outlined, bounds, mesh, list(inputs), plan=plan, **options)
    output = runner.infer(inputs)
    runner.train_step(inputs, targets)
    errors = [
        _error(whole(one.grad), expected[key])
        for stage in runner.stages.values()
        for key, one in stage.body.named_parameters()
        if one.grad is not None
    ]
    sockets = open_sockets() - before
    sent = sent_bytes(sockets)
    runner.train_step(inputs, targets)
    again = sent_bytes(sockets)
    dist.barrier()
    measured = {"gradients": max(errors)}
    if output is not None:
        measured["outputs"] = _error(output, expected["output"].chunk(copies)[copy])
    if sent is not None and again is not None:
        measured["sent"] = again - sent
    return measured


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest difference ÷ largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


class _Counted:
    """Bytes and requests that the store's blobs cost this rank."""

    def __init__(self) -> None:
        self.requests = 0

    @contextlib.contextmanager
    def __call__(self, operation: str, _uri: str) -> Iterator[None]:
        self.requests += operation in ("get", "read_into", "download")
        yield


def _loads(folder: Path, quick: bool, pack: str) -> dict[str, Any]:
    """A part by each rank; then the whole pack by each, in three ways."""
    store = open_store(str(folder / "store"))
    found: dict[str, Any] = {}
    for name, sizes in LOADED.items():
        module, (inputs, _) = decoder(quick, torch.float32, seed=7), batch(quick)
        outlined, mesh = outline(module, inputs), make_mesh(sizes)
        bounds = balanced([1.0] * len(outlined.blocks), sizes.pipeline).bounds
        plan = plan_tensors(module, sizes.tensor) if sizes.tensor > 1 else {}
        runner = Runner(module, outlined, bounds, mesh, list(inputs), plan=plan, microbatches=MICROBATCHES)
        for form in ("by layer", "by layer and rank", "by rank", "by size"):
            manifest = load_manifest(store, form.replace(" ", "-"), (folder / f"{form}.digest").read_text())
            inner = runner.stage.body.get_submodule("model")
            report = load_into_(inner, store, manifest.name, manifest.digest)
            stored = {entry.name: entry.stored_bytes for entry in manifest.tensors}
            share, shares = mesh.get_local_rank("tensor"), sizes.tensor
            own = 0
            for key, tensor in inner.state_dict().items():
                of_rank = share_name(key, share, shares)
                # A pack that is not cut, or cut for other ranks: the share of its bytes, as far as one can tell.
                every = sum(size for one, size in stored.items() if one == key or one.endswith(f"of2.{key}"))
                part = tensor.to_local().numel() / tensor.numel() if isinstance(tensor, DTensor) else 1
                own += stored[of_rank] if of_rank in stored else round(every * part)
            found[f"{name}: {form}"] = {"own_bytes": own, **report.model_dump()}
    wanted = dict.fromkeys(decoder(quick, torch.float32).get_submodule("model").state_dict())
    cache = BlobCache(folder / "cache", 2**32)
    ways: dict[str, Callable[[Store], Any]] = {
        "each alone": lambda one: load_tensors(one, "by-layer", pack, wanted),
        "shared cache": lambda one: load_tensors(one, "by-layer", pack, wanted, cache=cache),
        "sent in a group": lambda one: load_tensors(one, "by-layer", pack, wanted, group=dist.group.WORLD),
    }
    for way, load in ways.items():
        dist.barrier()
        counted = _Counted()
        watching: Callable[[str, str], AbstractContextManager[Any]] = counted
        observe.watch(watching)
        try:
            _, report = load(store)
        finally:
            observe.watch(None)
        found[way] = {"requests": counted.requests, **report.model_dump()}
    return found
