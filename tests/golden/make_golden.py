"""Makes a golden pack, once: `python -m tests.golden.make_golden v2-stored` makes `tests/golden/v2-stored`.

A pack that is committed is never made again: it proves that old bytes stay readable. A new format version gets a
new pack, and so does what a version has learned before its release.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from modelpress import keys
from modelpress.checkpoint import Checkpoint
from modelpress.cipher import LocalKey, seal_pack, secrets
from modelpress.compress import compress
from modelpress.config import CompressConfig, ShardConfig
from modelpress.delta import compress_against, open_base
from modelpress.manifest import Manifest
from modelpress.reports import Report, ShardReport
from modelpress.shard import ShardFile, draft_manifest, write_shards
from modelpress.store import open_store
from modelpress.store.local import LocalStore

WRAPPING_KEY = b"modelpress golden wrapping key 1"
"""Opens the golden encrypted packs, and nothing else anywhere."""


def noise(count: int, seed: int) -> np.ndarray:
    """(count,) uint64 by splitmix64 (Steele et al. 2014): the same on every machine and in every numpy."""
    with np.errstate(over="ignore"):
        z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def bell(count: int, seed: int) -> np.ndarray:
    """(count,) float64, bell-shaped, exact in binary: the sum of eight small integers."""
    parts = [(noise(count, seed + index) >> np.uint64(48)).astype(np.float64) for index in range(8)]
    return (sum(parts) - 4 * 65536) / 2**21


def tensors(pack: str) -> dict[str, torch.Tensor]:
    """What a golden pack holds: every codec, every dtype, odd shapes and odd values."""
    makers = {
        "v1": tensors_1,
        "v2": lambda: tensors_1() | tensors_2(),
        "v2-stored": tensors_stored,
        "v3-delta": tensors_delta,
        "v3-encrypted": tensors_1,
    }
    return makers[pack]()


def tensors_stored() -> dict[str, torch.Tensor]:
    """Streams in which some chunks are coded and others stored: planes, gaps and values, several and one."""
    fine = (noise(20_000, 75) >> np.uint64(40)).astype(np.float64) / 2**45
    weights = torch.from_numpy(bell(20_000, 70) + fine).float()
    mixed = weights.clone()
    mixed[5000:9000] = mixed[5000:9000].half().float()
    noise_bytes = torch.from_numpy(noise(2500, 80).view(np.uint8).copy())
    codes = torch.cat([(weights[:9000] * 180).round().to(torch.int8).view(torch.uint8), noise_bytes[:9000]])
    sparse = torch.where(torch.from_numpy(noise(20_000, 90) % np.uint64(10) == 0), weights, torch.zeros(()))
    return {
        "mixed.weight": mixed.reshape(200, 100),
        "mixed.double": mixed[:9000].double() / 3,
        "mixed.codes": codes,
        "mixed.sparse": sparse,
        "mixed.short": noise_bytes[:4096].view(torch.int16),
    }


def tensors_delta() -> dict[str, torch.Tensor]:
    """A new version of `tensors_1` with `tensors_2`, of every dtype: most are equal, some moved, one is new, one is
    renamed."""
    made = tensors_1() | tensors_2()
    for number, name in enumerate(sorted(made)):
        tensor = made[name]
        if tensor.numel() < 500 or number % 4 == 0:
            continue
        words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        steps = (noise(tensor.numel(), 100 + number) % np.uint64(20)).astype(np.int64)
        step = torch.from_numpy(np.where(steps == 0, 1, np.where(steps == 1, -1, 0)))
        bits = tensor.reshape(-1).view(words)
        moved = bits ^ (step != 0) if tensor.dtype == torch.bool else (bits.long() + step).to(words)
        made[name] = moved.to(words).view(tensor.dtype).reshape(tensor.shape)
    del made["random.bits"]
    made["renamed.bits"] = tensors_1()["random.bits"]
    made["new.weight"] = torch.from_numpy(bell(2000, 95)).float()
    return made


def tensors_2() -> dict[str, torch.Tensor]:
    """What came with version 2: masks, pairs of nibbles, indices of a codebook, chunks with codes of their own."""
    weights = torch.from_numpy(bell(9000, 50))
    order = torch.from_numpy((noise(2250, 60) % np.uint64(6)).astype(np.int64))
    pattern = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]])
    kept = pattern[order].reshape(-1).bool()
    nibbles = (weights * 40).round().clamp(-8, 7).to(torch.int8) + 8
    shifted = weights.bfloat16()
    shifted[4500:] = shifted[4500:] * 1024
    return {
        "semi.weight": torch.where(kept, weights, torch.zeros((), dtype=weights.dtype)).bfloat16().reshape(90, 100),
        "semi.mask": kept,
        "packed.int4": (nibbles[::2] | nibbles[1::2] << 4).to(torch.uint8),
        "codebook.index": (weights * 60).round().clamp(-16, 15).add(16).to(torch.uint8),
        "shifted.weight": shifted,
        "constant.weight": torch.full((5000,), 0.5, dtype=torch.float16),
    }


def tensors_1() -> dict[str, torch.Tensor]:
    """What the golden pack of version 1 holds."""
    weights = torch.from_numpy(bell(9000, 1))
    sparse = weights.clone()
    sparse[torch.from_numpy(noise(9000, 20) % np.uint64(10) != 0)] = 0
    bits = torch.from_numpy(noise(6000, 30).view(np.int64))
    odd = torch.tensor([0x7FC00001, -0x3FFFFF, 1, -(2**31), 0x7F800000, -0x800000], dtype=torch.int32)
    return {
        "layer.2.weight": weights.float().reshape(90, 100),
        "layer.10.weight": weights.bfloat16().reshape(100, 90),
        "layer.0.half": weights.half(),
        "layer.0.double": weights[:3000].clone(),
        "layer.0.codes": (weights * 100).round().to(torch.int8),
        "sparse.codes": (sparse * 100).round().to(torch.int8),
        "sparse.weight": sparse.float(),
        "repeated.index": torch.arange(50).repeat(100),
        "repeated.short": torch.arange(700, dtype=torch.int16).repeat(8),
        "repeated.int": torch.arange(700, dtype=torch.int32).repeat(8),
        "random.bits": bits.view(torch.uint8)[:40001].clone(),
        "odd.values": odd.view(torch.float32),
        "odd.scalar": torch.tensor(-0.0),
        "odd.empty": torch.zeros(3, 0, 2, dtype=torch.float16),
        "mask": (bits[:5000] & 1).bool(),
        "eight.e4m3": (weights[:4100] * 8).to(torch.float8_e4m3fn),
        "eight.e5m2": (weights[:500] * 8).to(torch.float8_e5m2),
    }


def make(folder: Path, pack: str) -> str:
    """Write the pack as a store's objects; returns its digest."""
    checkpoint = Checkpoint("torch", tensors(pack), {"labels.txt": b"zero\none\n" * 40, "raw.bin": b"\0\1"}, {"a": None})
    config = CompressConfig(chunk_symbols=4096, min_decode_bytes_per_second=0)
    if pack == "v3-delta":
        base = make(folder, "v2")
        config = config.model_copy(update={"base": base, "max_delta_share": 1.0})
        coded, report = compress_against(checkpoint, config, open_base(LocalStore(folder), "golden", base))
    else:
        coded, report = compress(checkpoint, config)
    with tempfile.TemporaryDirectory() as temporary:
        shards, shard_report = write_shards(coded, ShardConfig(max_shard_size=20_000), Path(temporary))
        blobs = {shard.sha256: shard.path.read_bytes() for shard in shards}
        rows = [row.model_copy(update={"decode_seconds": 0.0}) for row in report.tensors]
        reports: dict[str, Report] = {"compress": report.model_copy(update={"tensors": rows}), "shard": shard_report}
        assert isinstance(shard_report, ShardReport)
        manifest, files = draft_manifest("golden", coded, shards, licence="Apache-2.0", reports=reports)
        if pack == "v3-encrypted":
            manifest, blobs, files = encrypt(manifest, shards, files, folder)
        for digest, data in (blobs | files).items():
            _write(folder / keys.blob(digest), data)
        _write(folder / keys.manifest("golden", manifest.digest), manifest.to_bytes())
    return manifest.digest


def encrypt(
    manifest: Manifest, shards: list[ShardFile], files: dict[str, bytes], folder: Path
) -> tuple[Manifest, dict[str, bytes], dict[str, bytes]]:
    """The pack encrypted, in segments of 3000 bytes, and its secret, wrapped by the golden key, in the store."""
    secret = secrets.current(open_store(str(folder)), "golden", [LocalKey(WRAPPING_KEY)])
    with tempfile.TemporaryDirectory() as temporary:
        manifest, sealed, files = seal_pack(manifest, shards, files, secret, Path(temporary), segment_bytes=3000)
        return manifest, {shard.sha256: shard.path.read_bytes() for shard in sealed}, files


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


if __name__ == "__main__":
    target = Path(__file__).parent / sys.argv[1]
    if target.exists():
        sys.exit(f"{target} exists; golden packs are never made again")
    print(make(target, sys.argv[1]))
