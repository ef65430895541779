"""What one rank needs of a pack, and no more: its own layers, its own shares, from its own shards.

A pack that is cut `by: layer` has the shards of each layer apart, so a stage of a pipeline fetches those of its layers;
one whose tensors were cut for tensor-parallel ranks (`modelpress.parallel.slices`) has each rank's shares apart too.
From any other pack a rank fetches the shards that hold something of its own, and decodes that alone.

Copies of a model need not fetch copies of its bytes: processes of one host share `MODELPRESS_CACHE`, where one of them
fetches a shard while the others wait for it; ranks of several hosts give a `group`, in which each shard is read by one
rank and sent to the others.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from modelpress.cache import BlobCache, open_cache
from modelpress.container.read import Begun, read_shard
from modelpress.cores import usable_cores
from modelpress.errors import ConfigError, ModelpressError, StoreError, WorkloadError
from modelpress.load.names import load_manifest, resolve
from modelpress.load.read import Parts, open_parts
from modelpress.manifest import Manifest, TensorEntry
from modelpress.parallel.mesh import answered
from modelpress.parallel.slices import Share, assembled, cut_of, share_name, sources
from modelpress.progress import Progress, silent
from modelpress.reports import RankLoadReport
from modelpress.store.base import Store, open_store

IN_FLIGHT = 2
"""Shards that are on their way while one is decoded."""


@dataclass
class _Wanted:
    """What is to be read of a pack."""

    manifest: Manifest
    entries: list[TensorEntry]
    """Stored tensors, in the manifest's order."""
    made_of: dict[str, list[str]] = field(default_factory=dict)
    """By the name that was asked for: the stored tensors that it is made from."""
    axes: dict[str, int | None] = field(default_factory=dict)
    """By the name that was asked for: along which axis it is stored in shares; None: it is stored whole."""
    users: dict[str, list[str]] = field(default_factory=dict)
    """By stored tensor: the names that were asked for that it is needed for."""

    @property
    def positions(self) -> list[int]:
        """The shards that hold something of it."""
        return sorted({position for entry in self.entries for position in entry.shards})


def load_tensors(
    store: Store | str,
    name: str,
    ref: str,
    wanted: Mapping[str, Share | None],
    *,
    tied: Mapping[str, str] | None = None,
    group: dist.ProcessGroup | None = None,
    cache: BlobCache | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Tensor], RankLoadReport]:
    """Some tensors of a torch pack, or shares of them, verified, from the shards that hold them.

    Args:
        store: the publication store, or its URI.
        name: of the pack.
        ref: an alias, a digest, or at least 12 of its first digits. Ranks give a digest: an alias may move between two
            of them.
        wanted: by name, with the share of each, or None for all of it.
        tied: names that stand for another's tensor, as {name: stored name}, beside those that the pack itself states.
        group: ranks that want shards of the same pack in common: each shard is read by one and sent to the others, on
            the CPU (gloo). All must call this with the same names.
        cache: local cache; None takes the one that MODELPRESS_CACHE names, if any.
        progress: counts the bytes that this rank reads itself.

    Raises:
        WorkloadError: no torch pack, or a tensor that it does not have.
        NotFoundError, CorruptionError, EncryptionKeyError: see `load.load_checkpoint`; the shard is named. With a
            `group` the ranks that did not read it themselves get a StoreError that names who did.
        ConfigError: the ranks of the group want different shards, or the pack is encrypted and its shards would travel
            in the clear.
        StageError: another rank of the group is gone.
    """
    started = time.perf_counter()
    opened = open_store(store) if isinstance(store, str) else store
    manifest = load_manifest(opened, name, resolve(opened, name, ref))
    stored_ranks, axes = cut_of(manifest.metadata)
    tied = {**(tied or {}), **manifest.metadata.get("tied", {})}
    reading = _wanted(manifest, wanted, tied, stored_ranks, axes)
    parts = open_parts(opened, manifest, progress, cache or open_cache())
    positions = reading.positions
    mine = positions if group is None else positions[dist.get_rank(group) :: group.size()]
    own = _brought(manifest, mine, parts)
    shards: Iterator[tuple[int, bytes | memoryview]] = own
    if group is not None:
        _check_group(manifest, positions, group)
        shards = _sent(manifest, positions, own, group)
    stored: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for source, tensor in _decoded(reading, shards, parts):
        stored[source] = tensor
        for one in reading.users[source]:
            pieces = [stored[made] for made in reading.made_of[one] if made in stored]
            if one not in found and len(pieces) == len(reading.made_of[one]):
                found[one] = assembled(pieces, wanted[one], reading.axes[one], stored_ranks)
        for spent in [made for made in stored if all(one in found for one in reading.users[made])]:
            del stored[spent]
    report = RankLoadReport(
        pack=manifest.digest,
        tensors=len(found),
        tensor_bytes=sum(tensor.numel() * tensor.element_size() for tensor in found.values()),
        shards=len(positions),
        pack_shards=len(manifest.shards),
        needed_bytes=sum(manifest.shards[position].size_bytes for position in positions),
        read_bytes=sum(manifest.shards[position].size_bytes for position in mine),
        seconds=time.perf_counter() - started,
    )
    return found, report


def load_into_(
    module: nn.Module,
    store: Store | str,
    name: str,
    ref: str,
    *,
    tied: Mapping[str, str] | None = None,
    group: dist.ProcessGroup | None = None,
    cache: BlobCache | None = None,
    progress: Progress = silent,
) -> RankLoadReport:
    """Fill a module, such as a stage's `body`, with a pack's tensors of the same names, in place.

    A parameter that is a DTensor cut over a mesh takes this rank's share. Meta tensors become real ones; a share of the
    pack's own dtype and shape is asked for, and nothing is converted.

    Args:
        module: its state dict names what is wanted.
        store: as for `load_tensors`, and so are the others.
        name: see `load_tensors`.
        ref: see `load_tensors`.
        tied: see `load_tensors`; `tied_names` of the whole model.
        group: see `load_tensors`.
        cache: see `load_tensors`.
        progress: see `load_tensors`.

    Raises:
        WorkloadError: a tensor has another dtype or shape than the module's.
        ConfigError: a parameter is cut over several dimensions of a mesh.
        and see `load_tensors`.
    """
    targets = module.state_dict(keep_vars=True)
    wanted = {one: _share(one, target) for one, target in targets.items()}
    tensors, report = load_tensors(store, name, ref, wanted, tied=tied, group=group, cache=cache, progress=progress)
    homes: dict[int, list[str]] = {}
    for one, target in targets.items():
        homes.setdefault(id(target), []).append(one)
    with torch.no_grad():
        for names in homes.values():
            _put(module, names, targets[names[0]], tensors[names[0]])
    return report


def tied_names(module: nn.Module) -> dict[str, str]:
    """The names in a model's state dict that stand for a tensor that has another name before: {name: first name}."""
    first: dict[int, str] = {}
    named = {name: first.setdefault(id(tensor), name) for name, tensor in module.state_dict(keep_vars=True).items()}
    return {name: stored for name, stored in named.items() if name != stored}


def _wanted(
    manifest: Manifest,
    wanted: Mapping[str, Share | None],
    tied: Mapping[str, str],
    stored_ranks: int,
    axes: Mapping[str, int],
) -> _Wanted:
    doing = f"loading a part of pack {manifest.name}@{manifest.digest}"
    if manifest.kind != "torch":
        raise WorkloadError(doing, found=f"a pack of kind {manifest.kind}", expected="torch")
    present = {entry.name for entry in manifest.tensors}
    made_of: dict[str, list[str]] = {}
    cut: dict[str, int | None] = {}
    for name, share in wanted.items():
        stored = name if name in present else tied.get(name, name)
        cut[name] = axes.get(stored)
        if stored in axes:
            alike = share is None or share.axis == axes[stored]
            ranks = sources(share if alike else None, stored_ranks)
            made_of[name] = [share_name(stored, rank, stored_ranks) for rank in ranks]
        else:
            made_of[name] = [stored]
    users: dict[str, list[str]] = {}
    for name, found in made_of.items():
        for source in found:
            users.setdefault(source, []).append(name)
    entries = [entry for entry in manifest.tensors if entry.name in users]
    missing = sorted(users.keys() - {entry.name for entry in entries})
    if missing:
        raise WorkloadError(
            doing, found=f"no tensor {missing[0]!r}", expected=f"the {len(wanted)} tensors of this rank's part"
        )
    return _Wanted(manifest, entries, made_of, cut, users)


def _decoded(
    reading: _Wanted, shards: Iterable[tuple[int, bytes | memoryview]], parts: Parts
) -> Iterator[tuple[str, Tensor]]:
    """The wanted tensors, while their shards come; nothing else of these is decoded."""
    threads = usable_cores()
    begun: dict[str, Begun] = {}
    for entry in reading.entries:
        if entry.is_base:
            yield entry.name, Begun(entry).finish(f"reading tensor {entry.name!r} from the base", parts.base)
    for position, data in shards:
        shard = {reading.manifest.shards[position].sha256: data}
        pieces = {piece.name: piece for piece in read_shard(reading.manifest, position, shard.__getitem__)}
        for entry in reading.entries:
            if position not in entry.shards:
                continue
            doing = f"reading tensor {entry.name!r} from shard {reading.manifest.shards[position].sha256}"
            started = begun.setdefault(entry.name, Begun(entry))
            started.add(pieces.get(entry.name), doing, threads)
            if position == entry.shards[-1]:
                yield entry.name, begun.pop(entry.name).finish(doing, parts.base)


def _brought(manifest: Manifest, positions: Sequence[int], parts: Parts) -> Generator[tuple[int, bytes], None, None]:
    """Shards in order, the next ones on their way; whoever closes it waits for no server."""
    stopped = threading.Event()
    coming: deque[tuple[int, Future[bytes]]] = deque()
    left = iter(positions)
    pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="rank-shard")

    def start() -> None:
        position = next(left, None)
        if position is not None:
            digest = manifest.shards[position].sha256
            coming.append((position, pool.submit(parts.blobs.fetch, digest, stopped)))

    try:
        for _ in range(IN_FLIGHT):
            start()
        while coming:
            position, future = coming.popleft()
            data = future.result()
            start()
            yield position, data
    finally:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _check_group(manifest: Manifest, positions: Sequence[int], group: dist.ProcessGroup) -> None:
    """All ranks want the same shards, and these may be sent."""
    doing = f"reading pack {manifest.name} in a group of {group.size()} ranks"
    if manifest.encryption is not None:
        raise ConfigError(
            doing,
            found="an encrypted pack",
            expected="one whose shards may travel between ranks in the clear",
            fix="read it without a group; processes of one host share MODELPRESS_CACHE, where blobs stay encrypted",
        )
    text = f"{manifest.digest} {list(positions)}"
    mine = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    every = [torch.empty_like(mine) for _ in range(group.size())]
    with answered(doing):
        dist.all_gather(every, mine, group=group)
    others = [rank for rank, digest in enumerate(every) if not torch.equal(digest, mine)]
    if others:
        raise ConfigError(
            doing,
            found=f"rank {others[0]} of it wants other shards, or another pack",
            expected="the same of all ranks",
            fix="make a group of the ranks that hold the same part, and name the pack by its digest",
        )


def _sent(
    manifest: Manifest, positions: Sequence[int], own: Iterator[tuple[int, bytes]], group: dist.ProcessGroup
) -> Iterator[tuple[int, bytes | memoryview]]:
    """All shards in order on every rank of the group: this rank's own it reads and sends, the others it receives."""
    rank = dist.get_rank(group)
    for turn, position in enumerate(positions):
        doing = f"reading shard {position} ({manifest.shards[position].sha256}) of pack {manifest.name}"
        reader = turn % group.size()
        status, failure = torch.zeros(1, dtype=torch.int64), None
        buffer = torch.empty(manifest.shards[position].size_bytes, dtype=torch.uint8)
        if reader == rank:
            try:
                _, data = next(own)
                buffer.numpy()[:] = np.frombuffer(data, np.uint8)
            except (ModelpressError, ValueError) as error:  # ValueError: another length than the manifest says
                status, failure = torch.ones(1, dtype=torch.int64), error
        with answered(doing):
            dist.broadcast(status, group=group, group_src=reader)
            if not status.item():
                dist.broadcast(buffer, group=group, group_src=reader)
        if failure is not None:
            raise failure
        if status.item():
            raise StoreError(
                doing, found=f"rank {reader} of the group could not read it", fix="see what that rank says"
            )
        yield position, buffer.numpy().data


def _share(name: str, target: Tensor) -> Share | None:
    if not isinstance(target, DTensor):
        return None
    cut = [(axis, placement) for axis, placement in enumerate(target.placements) if isinstance(placement, Shard)]
    if len(cut) > 1:
        raise ConfigError(
            f"loading {name}", found=f"placements {target.placements}", expected="a cut over one dimension of a mesh"
        )
    if not cut:
        return None
    ((dimension, placement),) = cut
    return Share(placement.dim, target.device_mesh.get_local_rank(dimension), target.device_mesh.size(dimension))


def _put(module: nn.Module, names: Sequence[str], target: Tensor, tensor: Tensor) -> None:
    """Give a module's tensor, under all of its names, the values that were read."""
    local = target.to_local() if isinstance(target, DTensor) else target
    if (local.dtype, local.shape) != (tensor.dtype, tensor.shape):
        raise WorkloadError(
            f"loading {names[0]} into {type(module).__name__}",
            found=f"{tensor.dtype} {list(tensor.shape)} in the pack",
            expected=f"{local.dtype} {list(local.shape)}",
        )
    if not local.is_meta:
        local.copy_(tensor)
        return
    made: Tensor = tensor.contiguous()
    if isinstance(target, DTensor):
        made = DTensor.from_local(
            made, target.device_mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
        )
    if isinstance(target, nn.Parameter):
        made = nn.Parameter(made, requires_grad=target.requires_grad)
    for name in names:
        owner, _, key = name.rpartition(".")
        holder = module.get_submodule(owner)
        if isinstance(made, nn.Parameter):
            holder.register_parameter(key, made)
        else:
            holder.register_buffer(key, made)
