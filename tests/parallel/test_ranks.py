"""Four processes against one: outputs, gradients and weights; what they read; and what they say when one is gone."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from modelpress import keys
from modelpress.checkpoint import from_module
from modelpress.cipher import LocalKey, seal_pack, secrets
from modelpress.compress import compress
from modelpress.config import ShardConfig
from modelpress.manifest import Manifest
from modelpress.parallel.slices import share_name, sliced
from modelpress.parallel.tensor import axis_of, plan_tensors
from modelpress.publish import publish
from modelpress.shard import draft_manifest, layer_of, write_shards
from modelpress.store.local import LocalStore
from tests.packs import COMPRESS
from tests.parallel.forks import server
from tests.parallel.models import batch, loss, make
from tests.parallel.work import DEAD, KEY, MISSING, RANKS, STRANGER, work

pytestmark = pytest.mark.distributed

BOUND = 1e-11
"""Of the largest gradient, or output: what sums in another order may change in float64."""
LIVING = [rank for rank in range(RANKS) if rank != DEAD]


@dataclass
class Launch:
    """What the ranks left behind."""

    folder: Path
    manifest: Manifest
    exit_codes: list[int | None]

    def facts(self, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"facts-{rank}.json").read_text())
        return found

    def tensors(self, name: str, rank: int) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self.folder / f"{name}-{rank}.safetensors")


def make_packs(folder: Path) -> tuple[Manifest, Manifest]:
    """The Llama, its tensors cut for two ranks, a shard for each layer and rank; and the same encrypted."""
    module = make("llama")
    plan = plan_tensors(module, 2)
    coded, _ = compress(sliced(from_module(module), lambda name: axis_of(name, plan), 2), COMPRESS)
    shards, _ = write_shards(coded, ShardConfig(by="layer"), folder / "shards")
    manifest, blobs = draft_manifest("llama", coded, shards)
    publish(LocalStore(folder / "store"), manifest, shards, blobs, source_bytes=1)
    shutil.copytree(folder / "store", folder / "lacking")
    LocalStore(folder / "lacking").delete(keys.blob(manifest.shards[MISSING].sha256))
    store = LocalStore(folder / "sealed")
    secret = secrets.current(store, "llama", [LocalKey(KEY)])
    sealed, shards, blobs = seal_pack(manifest, shards, blobs, secret, folder / "sealing")
    publish(store, sealed, shards, blobs, source_bytes=1)
    return manifest, sealed


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    folder = tmp_path_factory.mktemp("ranks")
    manifest, sealed = make_packs(folder)
    plans = {kind: plan_tensors(make(kind), 2, batch(kind)[0]) for kind in ("llama", "tied", "qwen", "bert")} | {
        "residual": {}
    }
    told = (folder, plans, manifest.digest, sealed.digest)
    ranks = [server().Process(target=work, args=(rank, *told)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(280)
    for rank in ranks:
        rank.kill()
    return Launch(folder, manifest, [rank.exitcode for rank in ranks])


def alone(kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, loss and gradients of the whole batch in this process."""
    module, (inputs, targets) = make(kind), batch(kind)
    output = module(**inputs)
    lost = loss(output, targets)
    lost.backward()
    grads = {name: one.grad for name, one in module.named_parameters(remove_duplicate=False) if one.grad is not None}
    return output.detach(), lost.detach(), grads


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    assert float((found - expected).abs().max()) <= BOUND * max(1.0, float(expected.abs().max())), what


def test_every_rank_came_to_its_end(launch: Launch) -> None:
    assert launch.exit_codes == [9 if rank == DEAD else 0 for rank in range(RANKS)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[("1f1b", "llama"), ("gpipe", "residual"), ("hybrid", "tied"), ("copies", "llama")],
        *[("norms", "qwen"), ("tensor", "bert"), ("interleaved", "tied")],
    ],
)
def test_ranks_together_compute_what_one_process_computes(launch: Launch, name: str, kind: str) -> None:
    output, lost, grads = alone(kind)
    outputs: list[Tensor] = []
    losses: list[float] = []
    seen: set[str] = set()
    for rank in range(RANKS):
        found = launch.tensors(name, rank)
        if "output" in found:
            outputs.append(found["output"])
            losses.append(float(found["loss"]))
        for key, value in found.items():
            if key.startswith("grad "):
                seen.add(key.removeprefix("grad "))
                assert_close(value, grads[key.removeprefix("grad ")], f"{name}, rank {rank}: {key}")
    assert seen == set(grads)
    # The comparison could fail: but for biases before a softmax, all are far larger than the bound.
    large = [name for name, grad in grads.items() if float(grad.abs().max()) > 1e6 * BOUND]
    assert set(grads) - set(large) <= {name for name in grads if name.endswith(("key.bias", "query.bias"))}
    assert_close(torch.cat(outputs), output, f"{name}: outputs")  # of the copies, in their order
    assert sum(losses) / len(losses) == pytest.approx(float(lost), abs=BOUND)


def test_a_layer_costs_two_sums_in_each_direction(launch: Launch) -> None:
    """One for attention and one for the feed-forward part, and not one for each layer that reads the same."""
    assert [launch.facts(rank)["sums"] for rank in range(RANKS)] == [2 * 2 * 2] * RANKS


def test_a_rank_reads_its_own_shards_and_no_other(launch: Launch) -> None:
    """Stages 0 and 1 of two blocks each, two tensor-parallel ranks: by name, shard and digest."""
    module = make("llama")
    plan, whole = plan_tensors(module, 2), module.state_dict()
    entries = {entry.name: entry for entry in launch.manifest.tensors}
    every: list[str] = []
    for rank in range(RANKS):
        facts = launch.facts(rank)["pack"]
        loaded = safetensors.torch.load_file(launch.folder / f"pack-{rank}.st")
        loaded.pop("output", None)
        stored = set()
        for name, tensor in loaded.items():
            axis = axis_of(name, plan)
            expected = whole[name] if axis is None else whole[name].chunk(2, axis)[rank % 2]
            assert torch.equal(tensor, expected), name
            stored.add(name if axis is None else share_name(name, rank % 2, 2))
        shards = {launch.manifest.shards[position].sha256 for name in stored for position in entries[name].shards}
        assert sorted(facts["read"]) == sorted(keys.blob(digest) for digest in shards)
        others = {entry.name for entry in launch.manifest.tensors if set(entry.shards) & positions(launch, shards)}
        assert {layer_of(name) for name in others} == {layer_of(name) for name in stored}
        assert facts["report"]["needed_bytes"] == facts["report"]["read_bytes"]
        assert facts["part"] == rank // 2
        every += facts["read"]
    assert set(every) == {keys.blob(shard.sha256) for shard in launch.manifest.shards}


def positions(launch: Launch, digests: set[str]) -> set[int]:
    return {number for number, shard in enumerate(launch.manifest.shards) if shard.sha256 in digests}


def test_a_model_filled_from_a_pack_answers_as_it_did(launch: Launch) -> None:
    output, _, _ = alone("llama")
    for rank in (2, 3):
        found = safetensors.torch.load_file(launch.folder / f"pack-{rank}.st")
        assert_close(found["output"], output, f"rank {rank}")


@pytest.mark.parametrize("way", ["cached", "sent"])
def test_copies_read_one_copy(launch: Launch, way: str) -> None:
    """Four ranks, each with the whole pack: the store is asked for each shard once."""
    facts = [launch.facts(rank)["copies"] for rank in range(RANKS)]
    assert all(one["equal"] for one in facts)
    read = [key for one in facts for key in one[way]]
    assert sorted(read) == sorted(keys.blob(shard.sha256) for shard in launch.manifest.shards)
    if way == "sent":
        assert sum(one["sent_bytes"] for one in facts) == sum(shard.size_bytes for shard in launch.manifest.shards)
        assert all(one["sent"] for one in facts)


@pytest.mark.faults
def test_a_missing_shard_is_named_on_every_rank(launch: Launch) -> None:
    digest = launch.manifest.shards[MISSING].sha256
    for rank in range(RANKS):
        facts = launch.facts(rank)["refusals"]
        kind = "NotFoundError" if rank == MISSING % RANKS else "StoreError"
        assert facts["missing"].startswith(f"{kind}: reading shard {MISSING} ({digest})")
        assert facts["missing alone"].startswith(f"NotFoundError: reading shard {MISSING} ({digest})")
        if rank != MISSING % RANKS:
            assert f"found: rank {MISSING % RANKS} of the group" in facts["missing"]


def test_an_encrypted_pack_is_not_sent_between_ranks(launch: Launch) -> None:
    for rank in range(RANKS):
        facts = launch.facts(rank)["sealed"]
        assert facts["group"].startswith("ConfigError: reading pack llama in a group of 4 ranks\n  found: an encrypted")
        assert facts["read for a group"] == []
        assert facts["equal"], "each by itself, with the key"


@pytest.mark.faults
def test_a_rank_with_another_key_is_told_so_and_nobody_waits_for_it(launch: Launch) -> None:
    for rank in range(RANKS):
        facts = launch.facts(rank)["sealed"]
        stranger = rank == STRANGER
        assert facts["group of a stranger"].startswith("EncryptionKeyError: " if stranger else "ConfigError: ")
        assert facts["alone"].startswith("EncryptionKeyError: " if stranger else "no error")
        assert (LocalKey(KEY).id in facts["alone"]) == stranger, "the key that it lacks"


def test_what_does_not_fit_is_refused(launch: Launch) -> None:
    for rank in range(RANKS):
        facts = launch.facts(rank)["refusals"]
        assert "ConfigError: making a mesh of data × pipeline × tensor = 3 × 1 × 1" in facts["mesh"]
        assert "3 microbatches by 1f1b" in facts["microbatches"]
        assert "2 parts\n  expected: 4" in facts["parts"]
        assert "3 parts of the model, interleaved\n  expected: 4, 6, …" in facts["uneven parts"]
        assert "3 microbatches by interleaved\n  expected: a multiple of 2" in facts["uneven rounds"]
        assert f"found: parts {rank % 2}, {rank % 2 + 2} of 4" in facts["stage of several"]
        assert "2 tensor-parallel ranks, and no plan" in facts["plan"]
        assert "wants other shards, or another pack" in facts["others"]
        assert "into 4 microbatches\n  found: input_ids: 6 samples" in launch.facts(rank)["uneven"]


@pytest.mark.faults
@pytest.mark.parametrize("how", ["silent", "dead sender", "dead", "dead shares"])
def test_a_rank_that_is_gone_is_an_error_and_no_wait(launch: Launch, how: str) -> None:
    """In a sum and an exchange of ours, in the pipeline's sends, and in a sum within a layer."""
    for rank in LIVING if how != "dead shares" else [DEAD - 1]:
        error = launch.facts(rank)[how]
        assert error.startswith("StageError: "), error
        assert f"on rank {rank} of {RANKS}\n  found: another rank died, or did not answer in time: " in error
