"""Models in parts: how even the parts are, what ranks compute against one process, what they read and send.

`python -m benchmarks.parallel.model [--quick] [--json PATH] [--write]`. Four processes on this machine, over gloo. What
is sent is counted at their sockets (Linux), without TCP's headers and repeats, over the second training step.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from benchmarks._report import Row, main
from benchmarks.parallel._model_ranks import MESHES, RANKS, VOCABULARY, Decoder, batch, decoder, loss, parts_of, work
from modelpress.checkpoint import Checkpoint, from_module
from modelpress.compress import compress
from modelpress.config import CompressConfig, ShardConfig
from modelpress.parallel.costs import By, costs_of
from modelpress.parallel.mesh import MeshSizes
from modelpress.parallel.outline import outline
from modelpress.parallel.partition import Partition, balanced, equal_counts
from modelpress.parallel.slices import sliced
from modelpress.parallel.tensor import axis_of, plan_tensors
from modelpress.publish import publish
from modelpress.shard import draft_manifest, write_shards
from modelpress.store import open_store

NOTE = (
    "**Partitions**: the dearest part's cost ÷ the mean part's, 1 is perfect. `greedy` closes a part as soon as it has "
    "its share of the total. `optimum` tries every partition.\n\n"
    "**Equality**: largest difference ÷ largest value against one process, over all outputs and all gradients.\n\n"
    "**Sent**: bytes of one training step that all ranks' sockets sent, and the least that the mesh needs: for a "
    "pipeline, each border's activations and their gradients; for tensor parallelism, two sums of activations a "
    "layer in each direction (one for attention, one for the feed-forward part), and for the output layer logits "
    "gathered and one sum back; for copies, one sum of the gradients. A sum over n ranks costs each 2(n−1)/n of the "
    "tensor, a gathering (n−1)/n.\n\n"
    "**Bytes read**: by the ranks together. `own` are the coded bytes of the tensors, or shares of them, that the "
    "ranks hold then: what is read beside them are headers, and what others hold.\n"
)


def measure(quick: bool) -> Iterator[Row]:
    """All rows."""
    yield from _partitions(quick)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _references(folder, quick)
        packs = _packs(folder, quick)
        ranks = _launch(folder, quick, packs["by layer"])
        yield from _equality(ranks, quick)
        yield from _loads(ranks)


def greedy(costs: Sequence[float], parts: int) -> Partition:
    """Close a part when it has its share of the total; what many planners do."""
    share, bounds, filled = sum(costs) / parts, [0], 0.0
    for number, cost in enumerate(costs):
        left = parts - len(bounds)
        if left and len(bounds) <= number and (filled + cost > share or len(costs) - number == left) and filled:
            bounds.append(number)
            filled = 0.0
        filled += cost
    while len(bounds) < parts:  # the last ones took less than their share
        bounds.append(next(at for at in range(len(costs) - 1, 0, -1) if at not in bounds))
    return Partition(tuple(costs), (*sorted(bounds), len(costs)))


def _optimum(costs: Sequence[float], parts: int) -> float:
    cuts = itertools.combinations(range(1, len(costs)), parts - 1)
    return min(Partition(tuple(costs), (0, *cut, len(costs))).imbalance for cut in cuts)


def _partitions(quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    module, (inputs, _) = Decoder(64 if quick else 256, 12, 2048 if quick else 8192).eval(), batch(quick)
    outlined = outline(module, inputs)
    kinds: tuple[By, ...] = ("bytes", "flops", "seconds")
    for by in kinds:
        costs = costs_of(module, outlined, inputs, by)
        for parts in (2, 3, 4):
            case = f"partition: decoder of {len(costs)} blocks by {by}"
            yield from _imbalances(case, f"{parts} parts", [costs], parts)
    generator = np.random.default_rng(0)
    drawn = [list(generator.lognormal(0.0, 1.0, 20)) for _ in range(10 if quick else 200)]
    for parts in (2, 4, 6):
        yield from _imbalances(
            "partition: 20 blocks of lognormal costs, mean of all draws", f"{parts} parts", drawn, parts
        )


def _imbalances(case: str, metric: str, drawn: Sequence[Sequence[float]], parts: int) -> Iterator[Row]:
    systems = {
        "modelpress": [balanced(costs, parts).imbalance for costs in drawn],
        "optimum": [_optimum(costs, parts) for costs in drawn],
        "greedy": [greedy(costs, parts).imbalance for costs in drawn],
        "equally many blocks": [equal_counts(costs, parts).imbalance for costs in drawn],
    }
    for system, found in systems.items():
        yield Row(case, system, metric, "1", sum(found) / len(found))


def _references(folder: Path, quick: bool) -> None:
    """Outputs and gradients of one process."""
    for dtype in (torch.float32, torch.float64):
        module, (inputs, targets) = decoder(quick, dtype), batch(quick)
        output = module(**inputs)
        torch.autograd.backward(loss(output, targets))
        grads = {name: one.grad for name, one in module.named_parameters() if one.grad is not None}
        safetensors.torch.save_file(grads | {"output": output.detach()}, folder / f"{dtype}.safetensors")


def _packs(folder: Path, quick: bool) -> dict[str, str]:
    """The decoder as packs that are cut in three ways; their digests."""
    module = decoder(quick, torch.float32)
    plan, whole = plan_tensors(module, 2), from_module(module.get_submodule("model"))
    cut = sliced(whole, lambda name: axis_of(f"model.{name}", plan), 2)
    forms: dict[str, tuple[Checkpoint, ShardConfig]] = {
        "by layer": (whole, ShardConfig(by="layer")),
        "by layer and rank": (cut, ShardConfig(by="layer")),
        "by rank": (cut, ShardConfig(by="rank")),
        "by size": (whole, ShardConfig(max_shard_size=2**20)),
    }
    digests = {}
    for form, (checkpoint, config) in forms.items():
        coded, _ = compress(checkpoint, CompressConfig())
        shards, _ = write_shards(coded, config, folder / f"shards {form}")
        manifest, blobs = draft_manifest(form.replace(" ", "-"), coded, shards)
        publish(open_store(str(folder / "store")), manifest, shards, blobs, source_bytes=1)
        (folder / f"{form}.digest").write_text(manifest.digest)
        digests[form] = manifest.digest
    return digests


def _launch(folder: Path, quick: bool, pack: str) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.parallel._model_ranks"])
    ranks = [context.Process(target=work, args=(rank, folder, quick, pack)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise SystemExit(f"ranks ended with {[rank.exitcode for rank in ranks]}")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


def _equality(ranks: list[dict[str, Any]], quick: bool) -> Iterator[Row]:
    for dtype in (torch.float32, torch.float64):
        for name, (sizes, schedule) in MESHES.items():
            found = [rank[f"{name} {dtype}"] for rank in ranks]
            case = f"four processes against one, {str(dtype).removeprefix('torch.')}"
            yield Row(case, name, "outputs", "1", max(one["outputs"] for one in found if "outputs" in one))
            yield Row(case, name, "gradients", "1", max(one["gradients"] for one in found))
            least = _least_bytes(sizes, schedule, dtype, quick)
            sent = sum(one["sent"] for one in found) if all("sent" in one for one in found) else None
            yield Row(case, name, "sent in a step", "bytes", sent)
            yield Row(case, name, "least", "bytes", least)
            yield Row(case, name, "sent ÷ least", "1", sent / least if sent is not None else None)


def _least_bytes(sizes: MeshSizes, schedule: str, dtype: torch.dtype, quick: bool) -> float:
    """What all ranks together must send in a step; see the note."""
    module, (inputs, _) = decoder(quick, dtype), batch(quick)
    outlined, tokens = outline(module, inputs), inputs["input_ids"].numel()
    size = next(module.parameters()).element_size()
    width = outlined.shapes[outlined.blocks[0]][-1]
    hidden, logits = tokens * width * size, tokens * VOCABULARY * size  # of all copies together
    # Each tensor-parallel rank sends to its own.
    boundaries = 2 * (parts_of(sizes, schedule) - 1) * hidden * sizes.tensor
    shared = 2 * (sizes.tensor - 1)  # of a sum, over all ranks that make it
    layers = (4 * len(outlined.blocks) + 1) * hidden * shared
    gathered = logits * (sizes.tensor - 1) if sizes.tensor > 1 else 0
    plan = plan_tensors(module, sizes.tensor) if sizes.tensor > 1 else {}
    weights = 0.0
    for name, one in module.named_parameters():
        weights += one.numel() * size * (sizes.tensor if axis_of(name, plan) is None else 1)
    return float(boundaries + layers + gathered + 2 * (sizes.data - 1) * weights)


def _loads(ranks: list[dict[str, Any]]) -> Iterator[Row]:
    loads = [rank["loads"] for rank in ranks]
    for name in (one for one in loads[0] if ": " in one):
        mesh, _, form = name.partition(": ")
        found = [one[name] for one in loads]
        read, own = (sum(one[key] for one in found) for key in ("read_bytes", "own_bytes"))
        case = f"a part for each rank, {mesh}"
        yield Row(case, f"pack {form}", "read", "bytes", read)
        yield Row(case, f"pack {form}", "own", "bytes", own)
        yield Row(case, f"pack {form}", "read ÷ own", "1", read / own)
        yield Row(case, f"pack {form}", "requests of the busiest rank", "1", max(one["shards"] for one in found))
        yield Row(case, f"pack {form}", "shards of the pack that a rank reads", "%", 100 * _share(found))
    once = loads[0]["each alone"]["needed_bytes"]
    for way in ("each alone", "shared cache", "sent in a group"):
        found = [one[way] for one in loads]
        blobs = [one["requests"] - 1 for one in found]  # one of them is for the manifest
        case = "a whole pack for each of four ranks"
        yield Row(case, way, "reads of shards", "1", sum(blobs))
        yield Row(case, way, "copies over the network", "1", sum(blobs) / loads[0]["each alone"]["shards"])
        if way != "shared cache":
            yield Row(case, way, "bytes ÷ one copy's", "1", sum(one["read_bytes"] for one in found) / once)


def _share(found: list[dict[str, Any]]) -> float:
    return float(sum(one["shards"] / one["pack_shards"] for one in found) / len(found))


if __name__ == "__main__":
    main("parallel.model", measure, note=NOTE)
