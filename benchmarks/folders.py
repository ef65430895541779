"""A Hugging Face folder published and pulled again: bytes, memory and time, beside what copies or packs whole files.

The folder is a Llama of random weights in bfloat16, with the exponents that a normal distribution gives: coded, they
take what trained weights take, within a few percent. Each route runs in a process of its own. Memory is the process's
anonymous memory (RssAnon of /proc/self/status, sampled each 5 ms) at most, less what it was when the libraries were
loaded and the route began. The peers have less to do: they neither check a digest of each tensor nor send anything to
a store. `files equal` is the share of the folder's files that are the same bytes when they come back.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import zstandard
from safetensors.torch import load_file, save_file

from benchmarks._report import Row, main
from benchmarks.methods.larger_than_memory import _Peak
from modelpress import load
from modelpress.config import CompressConfig, ShardConfig
from modelpress.folder import publish_folder
from modelpress.store.local import LocalStore

SHARD_BYTES = 16 * 2**20
WIDTH, INNER = 1024, 2816
ZIPNN = "zipnn, file by file"
CODECS: dict[str, Any] = {"every codec": {}, "split planes alone": {"codecs": ["planes-huffman"]}}


def measure(quick: bool) -> Iterator[Row]:
    """Rows of the way there, and of the way back."""
    with tempfile.TemporaryDirectory(prefix="modelpress-") as place:
        home = Path(place)
        made = _make_folder(home / "model", blocks=6 if quick else 32)
        yield Row("folder", "random Llama, bfloat16", "files", "", len(list((home / "model").iterdir())))
        yield Row("folder", "random Llama, bfloat16", "bytes", "MB", made / 1e6)
        for route in ROUTES:
            if route == ZIPNN and importlib.util.find_spec("zipnn") is None:
                yield Row("there", route, "compression ratio", "", None)
            else:
                yield from _route(route, home, made)


def _route(route: str, home: Path, made: int) -> Iterator[Row]:
    for direction in ("there", "back"):
        found = _child(route, direction, home)
        case = "there" if direction == "there" else "back again"
        yield Row(case, route, "peak", "MB", found["peak"] / 1e6)
        yield Row(case, route, "peak, of the folder", "%", 100 * found["peak"] / made)
        yield Row(case, route, "time", "s", found["seconds"])
        if direction == "there":
            yield Row(case, route, "stored", "MB", _bytes_of(home / "stored") / 1e6)
            yield Row(case, route, "compression ratio", "", made / _bytes_of(home / "stored"))
    yield Row("back again", route, "files equal", "%", 100 * _equal(home / "model", home / "back"))
    for folder in ("stored", "back", "work"):
        shutil.rmtree(home / folder, ignore_errors=True)


def _make_folder(folder: Path, blocks: int) -> int:
    """A file per block, with an index; bytes in all."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {f"self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
    shapes |= {f"mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
    shapes |= {"mlp.down_proj.weight": (WIDTH, INNER)}
    places: dict[str, str] = {}
    for block in range(blocks):
        tensors = {
            f"model.layers.{block}.{name}": (torch.randn(shape, generator=generator) / math.sqrt(shape[1])).bfloat16()
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / f"model-{block + 1:05d}-of-{blocks:05d}.safetensors", {"format": "pt"})
        places |= dict.fromkeys(tensors, f"model-{block + 1:05d}-of-{blocks:05d}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": WIDTH}))
    return _bytes_of(folder)


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _equal(folder: Path, other: Path) -> float:
    files = list(folder.iterdir())
    same = [(other / file.name).is_file() and file.read_bytes() == (other / file.name).read_bytes() for file in files]
    return sum(same) / len(files)


def _child(route: str, direction: str, home: Path) -> dict[str, float]:
    code = f"from benchmarks.folders import child; child({route!r}, {direction!r}, {str(home)!r})"
    # glibc would keep freed blocks of up to 32 MiB; so it gives them back, as it always does larger ones.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(route: str, direction: str, home: str) -> None:
    """One way of one route in this process; prints peak and seconds as JSON."""
    from modelpress.codec.__main__ import compile_all

    compile_all()  # what is compiled once is no part of a route
    with _Peak() as peak:
        started = time.perf_counter()
        ROUTES[route][direction == "back"](Path(home))
        seconds = time.perf_counter() - started
    print(json.dumps({"peak": peak.bytes, "seconds": seconds}))


def _publish(codecs: str) -> Callable[[Path], None]:
    def there(home: Path) -> None:
        store, config = LocalStore(home / "stored"), CompressConfig(**CODECS[codecs])
        shard = ShardConfig(max_shard_size=SHARD_BYTES)
        report = publish_folder(store, home / "model", "model", work=home / "work", compress=config, shard=shard)
        (home / "pack").write_text(report.pack)

    return there


def _pull(home: Path) -> None:
    load.pull(LocalStore(home / "stored"), "model", (home / "pack").read_text(), home / "back", "huggingface")


def _zstd_there(home: Path) -> None:
    _each_file(home / "model", home / "stored", zstandard.ZstdCompressor(level=3).copy_stream)


def _zstd_back(home: Path) -> None:
    _each_file(home / "stored", home / "back", zstandard.ZstdDecompressor().copy_stream)


def _each_file(source: Path, target: Path, copy: Callable[..., object]) -> None:
    target.mkdir()
    for path in source.iterdir():
        with path.open("rb") as read, (target / path.name).open("wb") as written:
            copy(read, written)


def _zipnn(method: str) -> Callable[[Path, Path], None]:
    """zipnn on each file, whole in memory, as its own scripts do; it changes its input in place."""

    def each(source: Path, target: Path) -> None:
        coder = importlib.import_module("zipnn").ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)
        target.mkdir()
        for path in source.iterdir():
            (target / path.name).write_bytes(getattr(coder, method)(bytearray(path.read_bytes())))

    return each


def _save_all(source: Path, target: Path) -> None:
    """What a script of five lines does: everything in memory, and one file."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors |= load_file(path)
    target.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, target / "model.safetensors")


ROUTES: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    **{f"modelpress, {codecs}": (_publish(codecs), _pull) for codecs in CODECS},
    "zstd, level 3, file by file": (_zstd_there, _zstd_back),
    ZIPNN: (
        lambda home: _zipnn("compress")(home / "model", home / "stored"),
        lambda home: _zipnn("decompress")(home / "stored", home / "back"),
    ),
    "safetensors, all in memory": (
        lambda home: _save_all(home / "model", home / "stored"),
        lambda home: _save_all(home / "stored", home / "back"),
    ),
}
"""By name: there, and back."""

if __name__ == "__main__":
    main("folders", measure)
