"""What each of four processes does in `test_ranks`; it writes what it found for the parent to judge.

One launch serves all tests: starting a process and importing torch takes longer than everything that is done here.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import Buffer

from modelpress import keys
from modelpress.blockwise.paged import without_memory
from modelpress.cache import BlobCache
from modelpress.errors import ModelpressError
from modelpress.parallel.mesh import MeshSizes, answered, make_mesh, wait_for
from modelpress.parallel.outline import outline
from modelpress.parallel.rank_load import load_into_, load_tensors
from modelpress.parallel.runner import Runner
from modelpress.parallel.tensor import TensorPlan, whole
from modelpress.store.local import LocalStore
from tests.parallel.models import batch, loss, make

RANKS = 4
DEAD = 3
"""The rank that ends without a word."""
MISSING = 1
"""The shard that the store without it lacks."""

KEY = bytes(range(32))
"""That opens the encrypted pack."""
STRANGER = 2
"""The rank that comes to have another."""
INTERLEAVED: dict[str, object] = {"schedule": "interleaved"}

Facts = dict[str, object]


class CountingStore(LocalStore):
    """Counts what is read of blobs, as a server would."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read: list[str] = []

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        self.read += [key] if key.startswith(keys.BLOBS) else []
        return super().get(key, start, length)

    def read_into(
        self, key: str, buffer: Buffer, start: int = 0, arrived: Callable[[memoryview], None] = lambda _: None
    ) -> None:
        self.read += [key] if key.startswith(keys.BLOBS) else []
        super().read_into(key, buffer, start, arrived)


def runner_of(kind: str, sizes: MeshSizes, bounds: list[int], plan: TensorPlan, **options: object) -> Runner:
    """Of a model that each rank makes alike."""
    module, (inputs, _) = make(kind), batch(kind)
    found = outline(module, inputs)
    return Runner(module, found, bounds, make_mesh(sizes), list(inputs), plan=plan, loss=loss, **options)  # type: ignore[arg-type]


def own_slice(runner: Runner, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """The copy's part of the batch."""
    inputs, targets = batch(kind)
    copies, copy = runner.mesh["data"].size(), runner.mesh.get_local_rank("data")
    return {name: tensor.chunk(copies)[copy] for name, tensor in inputs.items()}, targets.chunk(copies)[copy]


def trained(folder: Path, rank: int, name: str, kind: str, runner: Runner) -> None:
    """Outputs, loss and whole gradients after one step; asking for outputs leaves gradients as they are."""
    inputs, targets = own_slice(runner, kind)
    found: dict[str, Tensor] = {}
    lost = runner.train_step(inputs, targets)
    output = runner.infer(inputs)
    if output is not None and lost is not None and runner.mesh.get_local_rank("tensor") == 0:
        found |= {"output": output.contiguous(), "loss": lost.reshape(1)}
    for stage in runner.stages.values():
        for parameter_name, parameter in stage.body.named_parameters(remove_duplicate=False):
            assert parameter.grad is not None, parameter_name
            found[f"grad {parameter_name}"] = whole(parameter.grad).detach().clone().contiguous()
    safetensors.torch.save_file(found, folder / f"{name}-{rank}.safetensors")


def splits(folder: Path, rank: int, plans: dict[str, TensorPlan]) -> None:
    """Each kind of mesh, against one process."""
    for name, kind, sizes, bounds, options in (
        ("1f1b", "llama", MeshSizes(pipeline=4), [0, 1, 2, 3, 4], {"microbatches": 4}),
        ("gpipe", "residual", MeshSizes(pipeline=4), [0, 2, 3, 4, 5], {"microbatches": 2, "schedule": "gpipe"}),
        ("hybrid", "tied", MeshSizes(pipeline=2, tensor=2), [0, 1, 4], {"microbatches": 2}),
        ("copies", "llama", MeshSizes(data=2, pipeline=2), [0, 2, 4], {"microbatches": 4}),
        ("interleaved", "tied", MeshSizes(data=2, pipeline=2), [0, 1, 2, 3, 4], INTERLEAVED | {"microbatches": 4}),
        ("norms", "qwen", MeshSizes(pipeline=2, tensor=2), [0, 1, 2], {"microbatches": 2}),
        ("tensor", "bert", MeshSizes(data=2, tensor=2), [0, 2], {}),
    ):
        trained(folder, rank, name, kind, runner_of(kind, sizes, bounds, plans[kind], **options))


class Sums(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts DTensor's sums over ranks."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # what it does inside is seen
        self.count += str(func).startswith("_c10d_functional.all_reduce")
        return func(*args, **(kwargs or {}))


def sums(plans: dict[str, TensorPlan]) -> int:
    """How often a training step of the encoder sums over its two tensor-parallel ranks."""
    runner = runner_of("bert", MeshSizes(data=2, tensor=2), [0, 2], plans["bert"])
    with Sums() as counted:
        runner.train_step(*own_slice(runner, "bert"))
    return counted.count


def from_pack(folder: Path, rank: int, plans: dict[str, TensorPlan], pack: str) -> Facts:
    """A hybrid mesh filled from a pack: nothing but its own shards; another model's weights are in place before."""
    store = CountingStore(folder / "store")
    inputs, _ = batch("llama")
    found = outline(make("llama"), inputs)
    with without_memory() if rank >= 2 else contextlib.nullcontext():  # the second stage's
        module = make("llama", seed=5)
    mesh = make_mesh(MeshSizes(pipeline=2, tensor=2))
    runner = Runner(module, found, [0, 2, 4], mesh, list(inputs), plan=plans["llama"])
    report = load_into_(runner.stage.body, store, "llama", pack)
    output = runner.infer(inputs)
    local = {
        name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone().contiguous()
        for name, tensor in runner.stage.body.state_dict().items()
    }
    safetensors.torch.save_file(local | ({"output": output} if output is not None else {}), folder / f"pack-{rank}.st")
    return {"report": report.model_dump(), "read": store.read, "part": runner.index}


def copies(folder: Path, rank: int, pack: str) -> Facts:
    """The whole pack on every rank: over a shared cache, and by sending."""
    wanted = dict.fromkeys(make("llama").state_dict())
    cached, sent = CountingStore(folder / "store"), CountingStore(folder / "store")
    cache = BlobCache(folder / "cache", 2**30)
    dist.barrier()
    over_cache, first = load_tensors(cached, "llama", pack, wanted, cache=cache)
    by_sending, second = load_tensors(sent, "llama", pack, wanted, group=dist.group.WORLD)
    expected = make("llama").state_dict()
    return {
        "cached": cached.read,
        "sent": sent.read,
        "equal": all(
            torch.equal(over_cache[name], expected[name]) and torch.equal(by_sending[name], expected[name])
            for name in expected
        ),
        "cached_bytes": first.read_bytes,
        "sent_bytes": second.read_bytes,
    }


def failed(action: Callable[[], object]) -> str:
    """Kind and text of the error that it ends with."""
    try:
        action()
    except ModelpressError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def interleaved(bounds: list[int], microbatches: int) -> Runner:
    """Several parts of a model on each of two ranks, and a copy of it."""
    return runner_of("llama", MeshSizes(data=2, pipeline=2), bounds, {}, microbatches=microbatches, **INTERLEAVED)


def refusals(folder: Path, rank: int, pack: str) -> Facts:
    """Meshes and groups that do not fit, and a store that lacks a shard."""
    wanted = dict.fromkeys(make("llama").state_dict())
    store = LocalStore(folder / "lacking")
    other = dict(list(wanted.items())[: len(wanted) - rank])
    return {
        "mesh": failed(lambda: make_mesh(MeshSizes(data=3))),
        "microbatches": failed(lambda: runner_of("llama", MeshSizes(pipeline=4), [0, 1, 2, 3, 4], {}, microbatches=3)),
        "parts": failed(lambda: runner_of("llama", MeshSizes(pipeline=4), [0, 2, 4], {}, microbatches=4)),
        "uneven parts": failed(lambda: interleaved([0, 2, 3, 4], 2)),
        "uneven rounds": failed(lambda: interleaved([0, 1, 2, 3, 4], 3)),
        "stage of several": failed(lambda: interleaved([0, 1, 2, 3, 4], 2).stage),
        "plan": failed(lambda: runner_of("llama", MeshSizes(pipeline=2, tensor=2), [0, 2, 4], {}, microbatches=2)),
        "missing": failed(lambda: load_tensors(store, "llama", pack, wanted, group=dist.group.WORLD)),
        "missing alone": failed(lambda: load_tensors(store, "llama", pack, wanted)),
        "others": failed(lambda: load_tensors(store, "llama", pack, other, group=dist.group.WORLD)),
    }


def sealed(folder: Path, rank: int, pack: str) -> Facts:
    """An encrypted pack: with the key, in a group and alone; and where one rank of four has another key."""
    wanted = dict.fromkeys(make("llama").state_dict())
    store = CountingStore(folder / "sealed")
    os.environ["MODELPRESS_KEY"] = base64.b64encode(KEY).decode()
    found: Facts = {
        "group": failed(lambda: load_tensors(store, "llama", pack, wanted, group=dist.group.WORLD)),
        "read for a group": list(store.read),
    }
    tensors, _ = load_tensors(store, "llama", pack, wanted)
    found["equal"] = all(torch.equal(tensors[name], tensor) for name, tensor in make("llama").state_dict().items())
    if rank == STRANGER:
        os.environ["MODELPRESS_KEY"] = base64.b64encode(KEY[::-1]).decode()
    found["group of a stranger"] = failed(lambda: load_tensors(store, "llama", pack, wanted, group=dist.group.WORLD))
    found["alone"] = failed(lambda: load_tensors(store, "llama", pack, wanted))
    return found


def silence(folder: Path, rank: int) -> Facts:
    """One rank does not come; the others wait for as long as their group says."""
    patient = dist.new_group(timeout=datetime.timedelta(seconds=3))
    if rank == DEAD:
        while len(list(folder.glob("silent-*"))) < RANKS - 1:
            time.sleep(0.05)
        return {}
    found = {"silent": failed(lambda: _reduce(patient))}
    (folder / f"silent-{rank}").touch()
    return found


def _reduce(group: dist.ProcessGroup) -> None:
    with answered("adding up"):
        dist.all_reduce(torch.zeros(1), group=group)


def death(folder: Path, rank: int, stages: Runner, shares: Runner) -> Facts:
    """One rank ends without a word, while the others wait for it; in front of a step they miss its stage, and one of
    them its shares too."""
    if rank == DEAD:
        while len(list(folder.glob("awaited-*"))) < RANKS - 1:
            time.sleep(0.05)
        os._exit(9)
    awaited = dist.irecv(torch.zeros(1), DEAD)
    assert awaited is not None
    (folder / f"awaited-{rank}").touch()
    found: Facts = {"dead sender": failed(lambda: _wait(awaited))}
    if shares.mesh.get_local_rank("data") == 1:
        found["dead shares"] = failed(lambda: shares.train_step(*own_slice(shares, "bert")))
    return found | {"dead": failed(lambda: stages.infer(batch("llama")[0]))}


def _wait(work: dist.Work) -> None:
    with answered("receiving"):
        wait_for([work])


def work(rank: int, folder: Path, plans: dict[str, TensorPlan], pack: str, sealed_pack: str) -> None:
    """All of it, on one rank."""
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": RANKS, "timeout": datetime.timedelta(seconds=200)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", **options)  # type: ignore[arg-type]
    splits(folder, rank, plans)
    facts: Facts = {"pack": from_pack(folder, rank, plans, pack), "copies": copies(folder, rank, pack)}
    facts["refusals"] = refusals(folder, rank, pack)
    facts["sealed"] = sealed(folder, rank, sealed_pack)
    facts["sums"] = sums(plans)
    facts |= silence(folder, rank)
    last = runner_of("llama", MeshSizes(pipeline=4), [0, 1, 2, 3, 4], {}, microbatches=4)
    uneven = {name: tensor[:6] for name, tensor in batch("llama")[0].items()}
    facts["uneven"] = failed(lambda: last.infer(uneven))
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts))
    facts |= death(folder, rank, last, runner_of("bert", MeshSizes(data=2, tensor=2), [0, 2], plans["bert"]))
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts))
    os._exit(0)  # the group is broken: nothing of it can be ended in good order
