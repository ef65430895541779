"""The command line: what each command shows, and how each kind of error ends it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from modelpress import errors, keys, load, pointer
from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import CompressConfig, ShardConfig
from modelpress.publish import publish
from modelpress.shard import draft_manifest, write_shards
from modelpress.store import Store
from tests.cli.conftest import Run
from tests.serving.conftest import CLASSES, WIDTH

RECIPE = """
name: digits
workload: {kind: image-classification, model: digits-cnn, data: digits}
"""


def damage(store: Store, pack: str) -> None:
    key = keys.blob(load.load_manifest(store, "scale", pack).shards[0].sha256)
    data = bytearray(store.get(key))
    data[-1] ^= 1
    store.put(key, bytes(data))


def test_inspect_shows_every_tensor_and_blob(packs: list[str], store: Store, run: Run) -> None:
    code, out, _ = run("inspect", "scale")
    manifest = load.load_manifest(store, "scale", packs[1])
    assert code == 0
    assert packs[1] in out
    (tensor,) = manifest.tensors
    for text in (tensor.name, tensor.codec, f"{WIDTH}×{CLASSES}", f"{tensor.stored_bytes * 8 / 640:.3f}", "model.onnx"):
        assert text in out
    assert all(digest in out for digest in manifest.blobs())
    assert f"{manifest.published_bytes:,} published" in out


def test_the_cache_is_shown_and_pruned(
    packs: list[str], store: Store, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run("cache", "show")
    assert code == errors.ConfigError.exit_code
    assert "MODELPRESS_CACHE" in err
    monkeypatch.setenv("MODELPRESS_CACHE", str(tmp_path / "cache"))
    load.open_session(store, "scale", packs[0])
    code, out, _ = run("cache", "show", "--json")
    blobs = {blob["sha256"]: blob["size_bytes"] for blob in json.loads(out)["blobs"]}
    shards = load.load_manifest(store, "scale", packs[0]).shards
    assert {shard.sha256: shard.size_bytes for shard in shards}.items() <= blobs.items()
    _, out, _ = run("cache", "show")
    assert all(digest in out for digest in blobs)
    code, out, _ = run("cache", "prune")
    assert (code, f"{sum(blobs.values()):,} bytes freed" in out) == (0, True)
    assert json.loads(run("cache", "show", "--json")[1])["blobs"] == []


def test_inspect_gives_json(packs: list[str], run: Run) -> None:
    code, out, _ = run("inspect", f"scale@{packs[0][:12]}", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["pack"] == packs[0]
    assert document["manifest"]["tensors"][0]["name"] == "weight"


@pytest.fixture
def explained(store: Store, tmp_path: Path) -> str:
    """A pack that carries the report of how its codecs were chosen; `deep.0.cut` lies in several shards."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(200, 100, generator=generator) * 0.02
    tensors = {
        "deep.0.dense": weights.bfloat16(),
        "deep.0.sparse": weights * (torch.rand(200, 100, generator=generator) < 0.1),
        "deep.0.cut": torch.randn(90_000, generator=generator).bfloat16(),
        "noise": torch.randint(0, 256, (500,), dtype=torch.uint8, generator=generator),
    }
    config = CompressConfig(chunk_symbols=4096, min_decode_bytes_per_second=0.8e9)
    coded, report = compress(Checkpoint("torch", tensors), config)
    shards, _ = write_shards(coded, ShardConfig(max_shard_size=80_000), tmp_path / "explained")
    manifest, blobs = draft_manifest("explained", coded, shards, reports={"compress": report})
    pack = publish(store, manifest, shards, blobs, source_bytes=report.raw_bytes).pack
    pointer.append(store, "explained", "champion", pack, "promote")
    return pack


def test_inspect_says_what_won_and_what_lost(explained: str, store: Store, run: Run) -> None:
    code, out, _ = run("inspect", "explained")
    manifest = load.load_manifest(store, "explained", explained)
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert code == 0
    assert "rle-huffman" in lines["deep.0.sparse"]
    assert "planes-huffman +" in lines["deep.0.sparse"]
    assert "raw +" in lines["deep.0.dense"]
    stored = sum(tensor.stored_bytes for tensor in manifest.tensors)
    assert f"{stored:,}" in lines["total"]
    assert "1 rle-huffman" in lines["codecs:"]
    assert len(out.splitlines()) == 2 + 1 + 4 + 1 + 1 + 1 + len(manifest.shards) + 1 + 1


def test_inspect_shows_one_tensor_in_full(explained: str, store: Store, run: Run) -> None:
    code, out, _ = run("inspect", "explained", "--tensor", "deep.0.sparse")
    entry = next(t for t in load.load_manifest(store, "explained", explained).tensors if t.name == "deep.0.sparse")
    assert code == 0
    assert re.search(r"stream gaps: huffman, [\d,]+ bytes", out)
    assert re.search(
        rf"80,000 → {entry.stored_bytes:,} bytes, {8 * entry.stored_bytes / 20_000:.3f} bits per weight", out
    )
    costs = {
        codec: int(cost.replace(",", "")) for codec, cost in re.findall(r"^    (\S+) ([\d,]+): ", out, re.MULTILINE)
    }
    assert set(costs) == {"rle-huffman", "planes-huffman", "raw"}
    assert entry.stored_bytes < costs["rle-huffman"] < costs["planes-huffman"] < costs["raw"]
    assert "rle-huffman" in re.search(r".*: chosen", out)[0]  # type: ignore[index]
    assert f"{costs['raw'] - costs['rle-huffman']:,} more" in out
    for slow in ("zstd", "mask-huffman"):
        assert f"{slow}: decodes more slowly than compress.min_decode_bytes_per_second" in out
    assert re.search(r"decoded and checked here by one thread in 0\.\d+ s", out)


def test_inspect_of_a_tensor_in_several_shards_gives_json(explained: str, store: Store, run: Run) -> None:
    entry = next(t for t in load.load_manifest(store, "explained", explained).tensors if t.name == "deep.0.cut")
    document = json.loads(run("inspect", "explained", "--tensor", "deep.0.cut", "--json")[1])
    assert len(document["shards"]) == len(entry.shards) > 1
    assert sum(stream["stored_bytes"] for stream in document["streams"]) == entry.stored_bytes
    assert [stream["coder"] for stream in document["streams"]] == ["huffman", "raw"]
    assert document["decode_seconds"] > 0
    assert document["not_tried"] == ["rle-huffman"]
    choices = json.loads(run("inspect", "explained", "--json")[1])["choices"]
    assert choices["deep.0.cut"]["candidates"] == document["candidates"]


def test_inspect_of_a_damaged_or_unknown_tensor(explained: str, store: Store, run: Run) -> None:
    code, _, err = run("inspect", "explained", "--tensor", "deep.0.dens")
    assert code == errors.ConfigError.exit_code
    assert "such as deep.0.dense" in err
    shard = load.load_manifest(store, "explained", explained).shards[0].sha256
    data = bytearray(store.get(keys.blob(shard)))
    data[-1] ^= 1
    store.put(keys.blob(shard), bytes(data))
    outcomes = {run("inspect", "explained", "--tensor", name)[0] for name in ("deep.0.cut", "noise")}
    assert outcomes == {0, errors.FormatError.exit_code}


def test_inspect_of_a_pack_without_reports_says_so(packs: list[str], run: Run) -> None:
    code, out, _ = run("inspect", "scale", "--tensor", "weight")
    assert code == 0
    assert "the pack's reports do not say" in out


def test_verify_reads_everything(packs: list[str], store: Store, run: Run) -> None:
    code, out, _ = run("verify", "scale@champion")
    assert code == 0
    assert f"{packs[1]}: every digest holds" in out
    assert json.loads(run("verify", "scale", "--json")[1])["pack"] == packs[1]
    damage(store, packs[1])
    code, out, err = run("verify", "scale")
    assert (code, out) == (errors.FormatError.exit_code, "")
    assert "sha256" in err


def test_pull_writes_what_other_tools_read(packs: list[str], tmp_path: Path, run: Run) -> None:
    code, out, _ = run("pull", "scale", "--to", str(tmp_path / "onnx"), "--as", "onnx")
    assert code == 0
    assert packs[1] in out
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": np.ones((1, WIDTH), np.float32)})[0]
    assert (found == 3 * WIDTH).all()
    code, _, err = run("pull", "scale", "--to", str(tmp_path / "onnx"))
    assert code == errors.ConfigError.exit_code
    assert "empty folder" in err
    assert run("pull", "scale", "--to", str(tmp_path / "other"), "--as", "zip")[0] == 2
    assert not (tmp_path / "other").exists()


def test_history_and_rollback(packs: list[str], store: Store, run: Run) -> None:
    code, out, _ = run("rollback", "scale", "--pointer-only")
    assert code == 0
    assert f"scale@champion is pack {packs[0]} again" in out
    code, out, _ = run("history", "scale")
    assert code == 0
    lines = [line.split() for line in out.splitlines()[1:]]
    assert [(line[0], line[-3], line[-1]) for line in lines] == [
        ("1", "promote", packs[0]),
        ("2", "promote", packs[1]),
        ("3", "rollback", packs[0]),
    ]
    assert [entry["pack"] for entry in json.loads(run("history", "scale", "--json")[1])] == [*packs, packs[0]]
    code, _, err = run("rollback", "scale", "--pointer-only")
    assert code == errors.StoreError.exit_code
    assert "rolling back scale@champion" in err
    code, out, _ = run("rollback", "scale", "--pointer-only", "--to", packs[1][:12])
    entry = pointer.current(store, "scale", "champion")
    assert (code, entry and entry.pack) == (0, packs[1])


def test_store_option_wins_over_the_environment(
    packs: list[str], store: Store, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setenv("MODELPRESS_STORE", "/nowhere")
    assert run("inspect", "scale")[0] == errors.StoreError.exit_code
    monkeypatch.setenv("MODELPRESS_STORE", "/nowhere")
    assert run("inspect", "scale", "--store", store.uri)[0] == 0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("distil: {temperature: 2}", ["distil", "unknown field", "distill"]),
        ("distill: {temprature: 2}", ["distill.temprature", "unknown field", "temperature"]),
        ("quantize: {method: int3}", ["quantize.method", "'static'", "int3"]),
        ("prune: {sparsity: 1.5}", ["prune.sparsity", "less than 1"]),
        ("promote: [", ["parsing config", "recipe.yaml"]),
    ],
)
def test_a_recipe_s_typo_is_named(tmp_path: Path, run: Run, changed: str, named: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{RECIPE}{changed}\n")
    code, out, err = run("run", str(path))
    assert (code, out) == (errors.ConfigError.exit_code, "")
    assert all(text in err for text in named), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "missing.yaml"], 2, "missing.yaml"),
        (["inspect", "nobody"], 8, "no alias 'champion'"),
        (["inspect", "scale@champoin"], 8, "there are: champion"),
        (["inspect", "scale@" + "0" * 64], 8, "loading pack scale"),
        (["inspect", "Scale"], 2, "a pack name"),
        (["inspect", "scale@12"], 2, "of its first digits"),
        (["history", "nobody"], 8, "no entry"),
        (["verify", "scale", "--store", "ftp://somewhere"], 2, "s3://bucket/prefix"),
        (["unheard-of"], 2, "No such command"),
        (["inspect", "scale", "--jsn"], 2, "No such option"),
    ],
    ids=str,
)
def test_errors_say_what_and_end_with_their_code(
    packs: list[str], run: Run, arguments: list[str], code: int, said: str
) -> None:
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
)
def test_each_kind_of_error_has_its_exit_code(monkeypatch: pytest.MonkeyPatch, run: Run, kind: Any) -> None:
    def broken(*_: object) -> None:
        raise kind("pressing", found="grapes", expected="models", fix="press models")

    monkeypatch.setattr("modelpress.pointer.history", broken)
    code, out, err = run("history", "scale")
    assert (code, out) == (kind.exit_code, "")
    assert err == "error: pressing\n  found: grapes\n  expected: models\n  fix: press models\n"


def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("modelpress.pointer.history", broken)
    code, _, err = run("history", "scale")
    assert code == 1
    assert "ZeroDivisionError: by nothing" in err
    assert "a fault of modelpress" in err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, modelpress.cli\n"
        "try: modelpress.cli.main(['--help'])\n"
        "except SystemExit: print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].strip("[]").replace("'", "").split(", "))
    assert "typer" in loaded
    assert not loaded & {"torch", "numpy", "onnx", "onnxruntime", "boto3", "mlflow", "prefect", "transformers", "numba"}


def test_the_installed_command(packs: list[str]) -> None:
    command = Path(sys.executable).with_name("modelpress")
    done = subprocess.run([command, "history", "scale"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert packs[1] in done.stdout
    done = subprocess.run([command, "inspect", "nobody"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (8, "")


def test_output_can_be_piped_narrow(packs: list[str]) -> None:
    """Digests are never cut short to fit."""
    command = [sys.executable, "-m", "modelpress.cli", "history", "scale"]
    done = subprocess.run(
        command, env=os.environ | {"COLUMNS": "40"}, capture_output=True, text=True, check=True, timeout=60
    )
    assert packs[0] in done.stdout


def test_inspect_of_a_newer_format(packs: list[str], store: Store, run: Run) -> None:
    document = json.loads(store.get(keys.manifest("scale", packs[0]))) | {"format_version": 99}
    data = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    digest = hashlib.sha256(data).hexdigest()
    store.put(keys.manifest("scale", digest), data)
    code, _, err = run("inspect", f"scale@{digest}")
    assert code == errors.UnsupportedFormatError.exit_code
    assert "version 99" in err
    assert "update modelpress" in err
