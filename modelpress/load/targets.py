"""A pack in the form that runs: an ONNX Runtime session, a torch state dict, or tensors as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from modelpress.cache import BlobCache, open_cache
from modelpress.container.read import decode_tensor, pieces_of
from modelpress.cores import usable_cores
from modelpress.errors import ConfigError, SetupError, WorkloadError
from modelpress.load.names import load_manifest, resolve
from modelpress.load.read import Parts, load_checkpoint, open_parts
from modelpress.parallel.slices import joined
from modelpress.progress import Progress, silent
from modelpress.store.base import Store, open_store

if TYPE_CHECKING:
    from modelpress.graph import Session


def open_session(
    store: Store | str,
    name: str,
    ref: str = "champion",
    provider: str = "CPUExecutionProvider",
    threads: int = 0,
    *,
    progress: Progress = silent,
    cache: BlobCache | None = None,
) -> Session:
    """An ONNX Runtime session of a pack, from memory: no byte of the model is written to disk.

    Args:
        store: the publication store, or its URI.
        name: of the pack.
        ref: an alias, a digest, or at least 12 of its first digits.
        provider: execution provider that must be in use.
        threads: intra-operator threads; 0 takes the cores that this process may use.
        progress: counts bytes.
        cache: local cache; None takes the one that MODELPRESS_CACHE names, if any.

    Raises:
        ModelpressError: see `resolve`, `load_checkpoint` and `graph.session`.
    """
    from modelpress import graph

    opened = open_store(store) if isinstance(store, str) else store
    digest = resolve(opened, name, ref)
    _, checkpoint = load_checkpoint(opened, name, digest, progress, cache=cache or open_cache())
    return graph.session(checkpoint, provider, threads)


def state_dict(
    store: Store | str,
    name: str,
    ref: str = "champion",
    device: torch.device | str = "cpu",
    *,
    progress: Progress = silent,
    cache: BlobCache | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a torch pack by name, tied ones under each of their names, verified, on a device. Tensors that are
    stored as the shares of tensor-parallel ranks come whole.

    On CUDA each tensor goes through pinned memory and is copied while the next ones are fetched and decoded; its digest
    was checked before. Beyond the model and the shards in flight this takes two tensors of host memory.

    Args:
        store: the publication store, or its URI.
        name: of the pack.
        ref: an alias, a digest, or at least 12 of its first digits.
        device: ``cpu`` or a CUDA device.
        progress: counts bytes.
        cache: local cache; None takes the one that MODELPRESS_CACHE names, if any.

    Raises:
        WorkloadError: the pack is no torch one.
        SetupError: no such device.
        ConfigError: neither a CPU nor a CUDA device.
        and see `resolve` and `load_checkpoint`.
    """
    opened = open_store(store) if isinstance(store, str) else store
    place = _device(device)
    manifest = load_manifest(opened, name, resolve(opened, name, ref))
    if manifest.kind != "torch":
        raise WorkloadError(
            f"loading {name}@{ref} as a state dict",
            found=f"a pack of kind {manifest.kind}",
            expected="torch",
            fix="modelpress.load.open_session",
        )
    tensors = open_parts(opened, manifest, progress, cache or open_cache()).stream()
    found = dict(tensors) if place.type == "cpu" else _to_cuda(tensors, place)
    found = joined(found, manifest.metadata)
    tied: dict[str, str] = manifest.metadata.get("tied", {})
    return found | {alias: found[stored] for alias, stored in tied.items() if stored in found}


def open_pack(store: Store | str, name: str, ref: str = "champion", *, cache: BlobCache | None = None) -> PackTensors:
    """A pack as a mapping from names to tensors, each fetched and verified when it is asked for.

    Raises:
        see `resolve` and `load_manifest`.
    """
    opened = open_store(store) if isinstance(store, str) else store
    manifest = load_manifest(opened, name, resolve(opened, name, ref))
    return PackTensors(open_parts(opened, manifest, silent, cache or open_cache()))


class PackTensors(Mapping[str, torch.Tensor]):
    """Tensors by name, in the manifest's order; nothing is fetched before it is asked for, and nothing is kept.

    Reading a tensor fetches the shards that hold it, so that a cache pays off for many small ones.
    """

    def __init__(self, parts: Parts) -> None:
        self.manifest = parts.manifest
        """What the pack holds, by name, with dtypes, shapes and digests."""
        self._parts = parts
        self._entries = {entry.name: entry for entry in parts.manifest.tensors}

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        pieces = pieces_of(self.manifest, name, self._parts.fetch)
        return decode_tensor(entry, pieces, original=self._parts.base, threads=usable_cores())

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<pack {self.manifest.name} {self.manifest.digest[:12]}: {len(self)} tensors>"


def _device(device: torch.device | str) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError("loading to a device", found=repr(device), expected="cpu or cuda") from error
    if place.type not in ("cpu", "cuda"):
        raise ConfigError("loading to a device", found=str(place), expected="cpu or cuda")
    if place.type == "cuda" and not (torch.cuda.is_available() and (place.index or 0) < torch.cuda.device_count()):
        found = f"{torch.cuda.device_count()} CUDA devices that torch {torch.__version__} can use"
        raise SetupError(f"loading to {place}", found=found, expected=str(place), fix="load to the CPU: device='cpu'")
    return place


def _to_cuda(tensors: Iterator[tuple[str, torch.Tensor]], device: torch.device) -> dict[str, torch.Tensor]:
    """Copies on a stream of their own, out of two pinned buffers in turn, while the next tensors are decoded."""
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's stubs
    staging: list[tuple[torch.Tensor, torch.cuda.Event] | None] = [None, None]
    found = {}
    for number, (name, tensor) in enumerate(tensors):
        turn, raw = number % 2, tensor.reshape(-1).view(torch.uint8)
        used = staging[turn]
        if used is not None:
            used[1].synchronize()
        pinned = used[0] if used is not None and used[0].numel() >= raw.numel() else _pinned(raw.numel())
        pinned[: raw.numel()].copy_(raw)
        # The caller's stream owns the tensor, and its memory may still be in use there.
        found[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        copying.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copying):
            found[name].reshape(-1).view(torch.uint8).copy_(pinned[: raw.numel()], non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(copying)
        staging[turn] = (pinned, done)
    copying.synchronize()
    return found


def _pinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
