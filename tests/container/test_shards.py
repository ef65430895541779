"""From a checkpoint to shards and back: every tensor, no shard too large, plain packs are plain checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress, natural_key
from modelpress.config import CompressConfig, ShardConfig
from modelpress.container import Coded, read_tensors
from modelpress.container.tensors import to_bytes
from modelpress.errors import ConfigError, CorruptionError, StageError
from modelpress.manifest import MAX_EXPANSION, Manifest
from modelpress.pack_files import read_reports
from modelpress.parallel.slices import rank_of, sliced
from modelpress.reports import ShardReport
from modelpress.shard import ShardFile, draft_manifest, layer_of, write_shards

SMALL = CompressConfig(chunk_symbols=4096, zstd_level=1, min_decode_bytes_per_second=0)


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def noise(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


def model() -> dict[str, torch.Tensor]:
    sparse = weights(300, 100, seed=1)
    sparse[sparse.abs() < 0.03] = 0
    return {
        "encoder.layer.0.weight": weights(120, 130),
        "encoder.layer.0.bias": weights(130),
        "encoder.layer.1.weight": weights(120, 130, seed=2).bfloat16(),
        "encoder.layer.10.weight": sparse,
        "encoder.layer.2.weight": (weights(50_000, seed=3) * 300).to(torch.int8),
        "head.index": noise(4096).view(torch.int32).repeat(20),
        "head.noise": noise(70_000),
        "head.scalar": torch.tensor(3.5, dtype=torch.float64),
        "head.empty": torch.zeros(0, 4),
    }


def press(
    tensors: dict[str, torch.Tensor], folder: Path, config: CompressConfig | None = SMALL, **shard: Any
) -> tuple[Manifest, list[ShardFile], ShardReport]:
    coded, _ = compress(Checkpoint("torch", tensors), config)
    shards, report = write_shards(coded, ShardConfig(**shard), folder)
    manifest, _ = draft_manifest("test", coded, shards)
    return Manifest.parse(manifest.to_bytes(), manifest.digest), shards, report


def unpress(manifest: Manifest, shards: list[ShardFile]) -> dict[str, torch.Tensor]:
    blobs = {shard.sha256: shard.path.read_bytes() for shard in shards}
    return dict(read_tensors(manifest, blobs.__getitem__))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert to_bytes(found[name]).tobytes() == to_bytes(tensor).tobytes(), name


@pytest.mark.parametrize("by", ["size", "layer"])
@pytest.mark.parametrize(
    ("config", "limit"),
    [
        *((config, limit) for config in (None, SMALL) for limit in (40_000, 200_000, 2**26)),
        *((CompressConfig(), limit) for limit in (200_000, 2**26)),
    ],
)
def test_everything_comes_back(tmp_path: Path, config: CompressConfig | None, limit: int, by: str) -> None:
    manifest, shards, report = press(model(), tmp_path, config, by=by, max_shard_size=limit)
    assert_same(unpress(manifest, shards), model())
    assert report.largest_bytes == max(shard.path.stat().st_size for shard in shards) <= limit
    assert report.total_bytes == sum(shard.size_bytes for shard in shards)


def test_the_smallest_codec_wins_and_every_one_is_of_use(tmp_path: Path) -> None:
    manifest, _, _ = press(model(), tmp_path)
    codecs = {tensor.name: tensor.codec for tensor in manifest.tensors}
    assert codecs["encoder.layer.1.weight"] == "planes-huffman"
    assert codecs["encoder.layer.10.weight"] == "rle-huffman"
    assert codecs["head.index"] == "zstd"
    assert codecs["head.noise"] == codecs["head.scalar"] == codecs["head.empty"] == "raw"
    assert all(tensor.stored_bytes <= tensor.raw_bytes for tensor in manifest.tensors)


def test_the_floor_leaves_out_codecs_that_decode_more_slowly() -> None:
    repeated = torch.arange(50).repeat(2000)
    chosen = {}
    for floor in (0.0, 0.8e9, 1e15):
        coded, _ = compress(Checkpoint("torch", {"a": repeated}), CompressConfig(min_decode_bytes_per_second=floor))
        chosen[floor] = coded.tensors[0].piece.codec
    assert chosen == {0.0: "zstd", 0.8e9: "planes-huffman", 1e15: "raw"}


def test_the_report_tells_the_contest() -> None:
    sparse = weights(300, 100)
    sparse[sparse.abs() < 0.03] = 0
    tensors = {"dense": weights(100, 100), "sparse": sparse, "empty": torch.zeros(0)}
    _, report = compress(Checkpoint("torch", tensors), CompressConfig(min_decode_bytes_per_second=0.8e9))
    dense, empty, found = report.tensors
    assert found.codec == min(found.candidates, key=found.candidates.__getitem__) == "rle-huffman"
    assert set(found.candidates) == {"rle-huffman", "planes-huffman", "raw"}
    assert found.too_slow == dense.too_slow == ["zstd", "mask-huffman"]
    assert (dense.not_tried, found.not_tried) == (["rle-huffman"], [])
    assert found.candidates[found.codec] > found.stored_bytes
    assert (found.decode_seconds or 0) > 0
    assert (empty.codec, set(empty.candidates), empty.decode_seconds) == ("raw", {"raw"}, None)
    _, plain = compress(Checkpoint("torch", tensors), None)
    assert all(not row.candidates and row.decode_seconds is None for row in plain.tensors)


def test_a_packs_digest_knows_no_time(tmp_path: Path) -> None:
    """The report of compress holds measured seconds; the manifest that carries it is the same all the same."""
    digests = set()
    for run in range(3):
        coded, report = compress(Checkpoint("torch", model()), SMALL)
        assert sum(row.decode_seconds or 0 for row in report.tensors) > 0
        shards, _ = write_shards(coded, ShardConfig(), tmp_path / str(run))
        manifest, blobs = draft_manifest("test", coded, shards, reports={"compress": report})
        rows = read_reports(manifest, blobs.__getitem__)["compress"]["tensors"]
        assert [row["candidates"] for row in rows] == [row.candidates for row in report.tensors]
        assert not any("seconds" in key for row in rows for key in row)
        digests.add(manifest.digest)
    assert len(digests) == 1


def test_nothing_is_chosen_that_a_reader_would_refuse() -> None:
    zeros = torch.zeros(1 << 24)
    config = CompressConfig(codecs=["rle-huffman", "mask-huffman"], chunk_symbols=1 << 24)
    coded, _ = compress(Checkpoint("torch", {"zeros": zeros}), config)
    stored = coded.tensors[0].piece.stored_bytes
    assert zeros.nbytes <= stored * MAX_EXPANSION


def test_a_codec_that_changes_a_bit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelpress import codec

    class Lossy(type(codec.CODECS["zstd"])):  # type: ignore[misc]
        def decode_into(self, streams: Any, dtype: Any, symbols: int, chunk_symbols: int, out: Any) -> None:
            super().decode_into(streams, dtype, symbols, chunk_symbols, out)
            out[-1] ^= 1

    monkeypatch.setitem(codec.CODECS, "zstd", Lossy())
    with pytest.raises(StageError, match=r"proving tensor 'a' coded as zstd"):
        compress(Checkpoint("torch", {"a": torch.zeros(5000)}), CompressConfig(codecs=["zstd"]))


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    first, _, _ = press(model(), tmp_path / "a")
    second, _, _ = press(dict(reversed(model().items())), tmp_path / "b")
    assert first.digest == second.digest


def test_coded_bytes_round_trip_and_are_a_valid_safetensors_file() -> None:
    checkpoint = Checkpoint("onnx", model(), {"model.onnx": b"graph", "empty": b""}, {"a": [1, None]})
    coded, _ = compress(checkpoint, SMALL)
    data = coded.to_bytes()
    again = Coded.from_bytes(data)
    assert again.to_bytes() == data
    assert (again.kind, again.files, again.metadata) == ("onnx", checkpoint.files, checkpoint.metadata)
    assert safetensors.torch.load(data)["file:model.onnx"].numpy().tobytes() == b"graph"
    with pytest.raises(CorruptionError, match="reading coded tensors"):
        Coded.from_bytes(data[:-1])


@pytest.mark.parametrize("limit", [60_000, 2**26])
def test_every_shard_opens_with_the_safetensors_library(tmp_path: Path, limit: int) -> None:
    _, shards, _ = press(model(), tmp_path, max_shard_size=limit)
    for shard in shards:
        with safetensors.safe_open(shard.path, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
            assert all(opened.get_tensor(key) is not None for key in opened.keys())  # noqa: SIM118


@pytest.mark.parametrize("limit", [300_000, 2**26])
def test_without_compression_a_pack_is_a_plain_checkpoint(tmp_path: Path, limit: int) -> None:
    _, shards, _ = press(model(), tmp_path, None, max_shard_size=limit)
    loaded: dict[str, torch.Tensor] = {}
    for shard in shards:
        loaded |= safetensors.torch.load_file(shard.path)
        with safetensors.safe_open(shard.path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert_same(loaded, model())
    assert (len(shards) == 1) == (limit == 2**26)


tensor_sizes = st.lists(
    st.tuples(st.sampled_from(["raw", "dense", "sparse", "same"]), st.integers(0, 40_000)), min_size=1, max_size=6
)


@given(sizes=tensor_sizes, limit=st.integers(9_000, 120_000), by=st.sampled_from(["size", "layer"]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_shard_is_ever_larger_than_asked(tmp_path: Path, sizes: list[Any], limit: int, by: str) -> None:
    tensors = {}
    for number, (kind, size) in enumerate(sizes):
        values = {
            "raw": noise(size),
            "dense": weights(size).bfloat16(),
            "sparse": weights(size) * (weights(size, seed=7) > 0.03),
            "same": torch.ones(size),
        }[kind]
        tensors[f"{'é' * (number % 3)}layer.{number // 2}.{kind}{number}"] = values
    manifest, shards, _ = press(tensors, tmp_path, by=by, max_shard_size=limit)
    assert all(shard.path.stat().st_size == shard.size_bytes <= limit for shard in shards)
    assert_same(unpress(manifest, shards), tensors)


def test_a_chunk_larger_than_a_shard_is_told_with_the_least_possible(tmp_path: Path) -> None:
    tensors = {"a": weights(200_000).bfloat16()}
    with pytest.raises(
        ConfigError, match=r"splitting tensor 'a'.*\n.*max_shard_size = 50000.*\n.*at least \d+"
    ) as told:
        press(tensors, tmp_path, CompressConfig(), max_shard_size=50_000)
    least = int(str(told.value.expected).split()[2])
    _, shards, _ = press(tensors, tmp_path, CompressConfig(), max_shard_size=least)
    assert max(shard.size_bytes for shard in shards) <= least


def test_a_raw_tensor_is_split_between_any_two_elements(tmp_path: Path) -> None:
    tensors = {"a": weights(1000, 7)}
    manifest, shards, _ = press(tensors, tmp_path, None, max_shard_size=3_000)
    assert len(shards) > 9
    assert_same(unpress(manifest, shards), tensors)
    header = shards[1].path.read_bytes()
    description = json.loads(json.loads(header[8 : 8 + header[0] + 256 * header[1]])["__metadata__"]["modelpress"])
    assert description["tensors"]["a"]["start"] % 4096


def test_by_layer_starts_a_shard_at_each_layer(tmp_path: Path) -> None:
    _, shards, _ = press(model(), tmp_path, by="layer")
    assert [sorted({layer_of(name) for name in shard.tensors}) for shard in shards] == [
        ["encoder.layer.0"],
        ["encoder.layer.1"],
        ["encoder.layer.2"],
        ["encoder.layer.10"],
        ["head"],
    ]


def test_by_rank_starts_a_shard_at_each_ranks_shares(tmp_path: Path) -> None:
    whole = Checkpoint("torch", {f"layer.{one}.{name}": weights(8, 6) for one in (0, 2, 10) for name in ("a", "norm")})
    coded, _ = compress(sliced(whole, lambda name: 0 if name.endswith("a") else None, 2), CompressConfig())
    shards, _ = write_shards(coded, ShardConfig(by="rank"), tmp_path / "shards")
    assert [shard.tensors for shard in shards] == [
        tuple(f"layer.{one}.norm" for one in (0, 2, 10)),
        *[tuple(f"rank{rank}of2.layer.{one}.a" for one in (0, 2, 10)) for rank in range(2)],
    ]


def test_by_rank_of_what_no_rank_has_a_share_of_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"by rank\n  found: \d+ tensors, all of them whole(.|\n)*slices\.sliced"):
        press(model(), tmp_path, by="rank")


@pytest.mark.parametrize(
    ("name", "rank"),
    [("rank0of2.a", 0), ("rank12of16.b.c", 12), ("rank0of2", None), ("a.rank0of2.b", None), ("rankof.a", None)],
)
def test_the_rank_of_a_name(name: str, rank: int | None) -> None:
    assert rank_of(name) == rank


@pytest.mark.parametrize(
    ("name", "layer"),
    [("encoder.layer.3.output.0.bias", "encoder.layer.3"), ("fc.weight", "fc"), ("scale", "scale"), ("0.weight", "0")],
)
def test_the_layer_of_a_name(name: str, layer: str) -> None:
    assert layer_of(name) == layer


WRAPPED = {
    "plain": ["embed", "layers.0", "layers.1", "norm", "head"],
    "llama": ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"],
    "wrapped": [
        "model.model.embed",
        "model.model.layers.0",
        "model.model.layers.1",
        "model.model.norm",
        "model.lm_head",
    ],
    "gpt2": ["transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1", "transformer.ln_f"],
    "bert": ["bert.embeddings.words", "bert.encoder.layer.0", "bert.pooler.dense", "classifier"],
    "cut": [
        f"rank{rank}of2.{name}"
        for rank in range(2)
        for name in ("m.embed", "m.layers.0", "m.norm", "lm_head", "m.head")
    ],
    "without numbers": ["model.conv1", "model.conv2", "model.fc"],
    "wrapped twice": ["ddp.module.conv", "ddp.module.fc"],
}


@pytest.mark.parametrize("modules", WRAPPED.values(), ids=WRAPPED)
def test_no_shard_by_layer_holds_two_ends_of_a_model(modules: list[str], tmp_path: Path) -> None:
    """Whatever wraps it: embedding and output layer are read by different ranks."""
    tensors = {f"{name}.{kind}": torch.rand(8) for name in modules for kind in ("weight", "bias")}
    _, shards, _ = press(tensors, tmp_path, by="layer")
    assert sorted(sorted(shard.tensors) for shard in shards) == sorted(
        [f"{name}.bias", f"{name}.weight"] for name in modules
    )


def test_what_stands_together_in_a_module_is_one_layer(tmp_path: Path) -> None:
    names = ["bert.embeddings.words.weight", "bert.embeddings.norm.weight", "bert.encoder.layer.0.weight", "bert.scale"]
    _, shards, _ = press({name: torch.rand(8) for name in names}, tmp_path, by="layer")
    assert sorted(sorted(shard.tensors) for shard in shards) == [sorted(names[:2]), names[2:3], names[3:]]


def test_numbers_sort_by_value() -> None:
    assert sorted(["a.10.w", "a.2.w", "a.x", "a.02.w"], key=natural_key) == ["a.02.w", "a.2.w", "a.10.w", "a.x"]


@pytest.mark.parametrize("name", ["__metadata__", "a#plane0"])
def test_names_that_the_format_uses_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="a name that the format uses"):
        compress(Checkpoint("torch", {"a": torch.zeros(3), name: torch.zeros(3)}), None)


def test_a_dtype_that_no_pack_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"storing tensor 'a'\n  found: torch.complex64"):
        compress(Checkpoint("torch", {"a": torch.zeros(3, dtype=torch.complex64)}), None)


def test_nothing_to_store_is_a_pack_without_shards(tmp_path: Path) -> None:
    manifest, shards, report = press({}, tmp_path)
    assert (shards, report.shards, unpress(manifest, shards)) == ([], 0, {})


def test_a_full_disk_is_told_and_leaves_no_file() -> None:
    from modelpress.errors import StoreFullError
    from modelpress.shard import write_shard

    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    folder = Path("/dev")
    coded, _ = compress(Checkpoint("torch", {"a": weights(100)}), None)

    class Full(type(full)):  # type: ignore[misc]
        def unlink(self, missing_ok: bool = False) -> None:
            removed.append(self)

    removed: list[Path] = []
    with pytest.raises(StoreFullError, match="writing shard"):
        write_shard(Full(folder / "full"), [coded.tensors[0].piece])
    assert removed
