"""What happens around a model that is served: its bytes at rest, its transfer, its start in a new process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor

from modelpress import keys
from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import CompressConfig, ShardConfig
from modelpress.errors import StageError
from modelpress.load import load_manifest
from modelpress.manifest import Manifest
from modelpress.profile.child import Found, Task
from modelpress.publish import publish
from modelpress.reports.measured import Figure, Measured, NotMeasured, value_of
from modelpress.reports.profile import ColdStart, MemoryPoint, MemoryProfile, StorageProfile, TransferTime
from modelpress.shard import draft_manifest, write_shards
from modelpress.store import Store
from modelpress.store.local import LocalStore

MAX_POINTS = 400
"""Of the timeline of memory; where there are more, the highest of each neighbours is kept."""
_CHILD_SECONDS = 900
_READ_BYTES = 2**20
NO_PACK = "only a graph is published and served, and the torch module was profiled"


@dataclass(frozen=True)
class Placed:
    """A pack in a store."""

    store: Store
    manifest: Manifest
    signed: bool
    """Whether the settings' trust file is asked: a pack that is made to be profiled carries no signature."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of shards, files and manifest."""
        return self.manifest.published_bytes


def put_away(checkpoint: Checkpoint, name: str, compression: CompressConfig | None, to: Path) -> Placed:
    """Publish a graph in a folder, as the line would in its store, without golden samples and signatures.

    Shards have the default size: a recipe's is for what its stages leave, and a source model's tensors may not fit it.

    Args:
        checkpoint: what would be published.
        name: of the pack.
        compression: of its tensors; None stores them raw. A `base` is left out: the pack stands alone.
        to: an empty folder.
    """
    if compression is not None:
        compression = compression.model_copy(update={"base": None})
    coded, _ = compress(checkpoint, compression)
    shards, _ = write_shards(coded, ShardConfig(), to / "shards")
    manifest, blobs = draft_manifest(name, coded, shards)
    store = LocalStore(to / "store")
    publish(store, manifest, shards, blobs, source_bytes=manifest.raw_bytes)
    return Placed(store, manifest, signed=False)


def open_placed(store: Store, name: str, digest: str) -> Placed:
    """A pack that is published already."""
    return Placed(store, load_manifest(store, name, digest), signed=True)


def storage(placed: Placed, bandwidths: Mapping[str, float], start: ColdStart) -> StorageProfile:
    """Bytes at rest, the time to read them from disk, and on paper their transfer."""
    decode = _sum(start.verify_seconds, start.decode_seconds)
    seconds = value_of(decode)
    raw = placed.manifest.raw_bytes
    return StorageProfile(
        raw_bytes=raw,
        stored_bytes=Measured(value=placed.stored_bytes),
        read_seconds=read_cold(placed),
        decode_seconds=decode,
        decode_bytes_per_second=Measured(value=raw / seconds)
        if seconds
        else NotMeasured(not_measured="the time to decode was not measured"),
        transfers=[
            TransferTime(
                network=network,
                bytes_per_second=rate,
                modelled_seconds=Measured(value=placed.stored_bytes / rate, by="stored bytes ÷ bandwidth"),
            )
            for network, rate in sorted(bandwidths.items(), key=lambda item: item[1])
        ],
    )


def no_storage(checkpoint: Checkpoint) -> StorageProfile:
    """Of a model that is not published in the form that was profiled."""
    raw = sum(tensor.nbytes for tensor in checkpoint.tensors.values()) + sum(map(len, checkpoint.files.values()))
    none = NotMeasured(not_measured=NO_PACK)
    return StorageProfile(
        raw_bytes=raw, stored_bytes=none, read_seconds=none, decode_seconds=none, decode_bytes_per_second=none
    )


def read_cold(placed: Placed) -> Figure:
    """Seconds to read a pack's blobs from the disk of this machine, after the kernel was told to forget them."""
    if not isinstance(placed.store, LocalStore):
        return NotMeasured(not_measured=f"{placed.store.uri} is no folder on this machine")
    if not hasattr(os, "posix_fadvise"):
        return NotMeasured(not_measured="this system has no posix_fadvise, so that memory would be read, not the disk")
    files = [placed.store.folder / keys.blob(digest) for digest in placed.manifest.blobs()]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not written yet cannot be forgotten
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(_READ_BYTES):
                pass
    return Measured(value=time.perf_counter() - before, by="page cache dropped by posix_fadvise")


def start_anew(
    placed: Placed, provider: str, threads: int, batches: Sequence[Mapping[str, Tensor]], folder: Path, *, watch: bool
) -> Found:
    """Load a pack in a new process that answers the first of `batches`, and say what it found.

    With `watch` it runs all of them, and its memory is sampled.

    Raises:
        StageError: the process failed; what it said is in the error.
    """
    inputs = []
    for number, batch in enumerate(batches):
        inputs.append(str(folder / f"inputs-{number}.safetensors"))
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in batch.items()}, inputs[-1])
    environment = dict(os.environ)
    if not placed.signed:
        for name in ("MODELPRESS_TRUST", "MODELPRESS_SIGNING_KEY_FILE", "MODELPRESS_NUDGE_URLS"):
            environment.pop(name, None)
    task = Task(
        forked=time.perf_counter(),
        store=placed.store.uri,
        name=placed.manifest.name,
        digest=placed.manifest.digest,
        provider=provider,
        threads=threads,
        inputs=inputs,
        watch=watch,
    )
    command = [sys.executable, "-m", "modelpress.profile.child"]
    done = subprocess.run(
        command,
        input=json.dumps(task),
        env=environment,
        text=True,
        capture_output=True,
        check=False,
        timeout=_CHILD_SECONDS,
    )
    if done.returncode != 0:
        raise StageError(
            f"starting {placed.manifest.name} in a new process",
            found=f"exit code {done.returncode}: {done.stderr.strip()[-2000:]}",
            expected="an answer",
        )
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def cold_start(found: Found) -> ColdStart:
    """The parts of a start as a report."""
    seconds: dict[str, Figure] = {name: Measured(value=value) for name, value in found["parts"].items()}
    if not found["verified"]:
        seconds["verify"] = NotMeasured(not_measured="an encrypted pack is verified as it is fetched")
    return ColdStart(
        interpreter_seconds=seconds["interpreter"],
        import_seconds=seconds["import"],
        fetch_seconds=seconds["fetch"],
        verify_seconds=seconds["verify"],
        decode_seconds=seconds["decode"],
        session_seconds=seconds["session"],
        first_answer_seconds=seconds["first_answer"],
        total_seconds=Measured(value=sum(found["parts"].values()), by="the parts one after the other"),
    )


def no_cold_start() -> ColdStart:
    """Of a model that is not published in the form that was profiled."""
    none = NotMeasured(not_measured=NO_PACK)
    return ColdStart(**dict.fromkeys(ColdStart.model_fields, none))


def memory_profile(found: Found, weights_bytes: int, activations: Figure, device: Figure) -> MemoryProfile:
    """Memory of a new process that loads the model and runs each batch size."""
    timeline = thin(found["points"], found["marks"])
    loaded = next((seconds for seconds, mark in found["marks"] if mark == "fetch"), 0.0)
    before = max((resident for seconds, resident in found["points"] if seconds <= loaded), default=None)
    peak = found["peak_bytes"] or max((resident for _, resident in found["points"]), default=None)
    unknown = NotMeasured(not_measured="resident memory was not sampled")
    return MemoryProfile(
        weights_bytes=weights_bytes,
        activations_bytes=activations,
        peak_resident_bytes=Measured(value=peak, by="a new process") if peak is not None else unknown,
        rise_resident_bytes=Measured(value=peak - before, by="above the process with its imports")
        if peak is not None and before is not None
        else unknown,
        device_bytes=device,
        timeline=timeline,
    )


def thin(points: Sequence[tuple[float, int]], marks: Sequence[tuple[float, str]]) -> list[MemoryPoint]:
    """At most `MAX_POINTS` points, the highest of each run of neighbours, and each mark on the next point."""
    step = max(1, -(-len(points) // MAX_POINTS))
    kept = [max(points[at : at + step], key=lambda point: point[1]) for at in range(0, len(points), step)]
    names = [""] * len(kept)
    for seconds, mark in marks:
        place = next((number for number, point in enumerate(kept) if point[0] >= seconds), None)
        if place is not None:
            names[place] = f"{names[place]}, {mark}" if names[place] else mark
    start = kept[0][0] if kept else 0.0
    return [
        MemoryPoint(seconds=seconds - start, resident_bytes=resident, mark=name)
        for (seconds, resident), name in zip(kept, names, strict=True)
    ]


def _sum(*figures: Figure) -> Figure:
    values = [figure for figure in figures if isinstance(figure, Measured)]
    return Measured(value=sum(one.value for one in values)) if values else figures[0]
