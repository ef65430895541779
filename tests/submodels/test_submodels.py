"""A model in pieces is the model: published, pulled and joined bit by bit, and with no piece of another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from modelpress import load
from modelpress.blockwise.tensors import open_folder
from modelpress.cli import app
from modelpress.errors import ConfigError, CorruptionError, ModelpressError, WorkloadError
from modelpress.folder import publish_folder
from modelpress.store.base import open_store
from modelpress.submodels import SHEET, join, split

PARTS = {"head": ["classifier"], "experts": ["layer.*.experts.1", "layer.0.experts.0"]}


def tensors(seed: int = 0, head: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    trunk = {"table.weight": torch.randn(20, 8), "layer.0.norm.weight": torch.randn(8).bfloat16()}
    experts = {f"layer.{one}.experts.{two}.weight": torch.randn(8, 8).half() for one in range(2) for two in range(2)}
    torch.manual_seed(head)
    return trunk | experts | {"classifier.weight": torch.randn(3, 8), "classifier.bias": torch.zeros(3)}


def write(folder: Path, given: dict[str, Tensor], shards: int = 1) -> Path:
    """A Hugging Face folder, with its weights in so many files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "toy"}')
    (folder / "vocab.txt").write_text("a\nb\n")
    names = [f"model-{one + 1:05}-of-{shards:05}.safetensors" for one in range(shards)]
    names = ["model.safetensors"] if shards == 1 else names
    for number, name in enumerate(names):
        part = dict(list(given.items())[number::shards])
        safetensors.torch.save_file(part, folder / name, {"format": "pt"})
    if shards > 1:
        places = {key: names[place % shards] for place, key in enumerate(given)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def bits(folder: Path) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    found = {name: stored.read() for name, stored in open_folder(folder).items()}
    return {
        name: (one.dtype, list(one.shape), one.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, one in found.items()
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model", tensors())


@pytest.fixture
def pieces(model: Path, tmp_path: Path) -> dict[str, Path]:
    split(model, PARTS, tmp_path / "pieces")
    return {name: tmp_path / "pieces" / name for name in ("trunk", "head", "experts")}


@pytest.mark.parametrize("shards", [1, 3])
def test_pieces_join_to_the_same_bits(tmp_path: Path, shards: int) -> None:
    model = write(tmp_path / "model", tensors(), shards)
    report = split(model, PARTS, tmp_path / "pieces")
    assert {row.piece: row.tensors for row in report.pieces} == {"trunk": 3, "head": 2, "experts": 3}
    folders = [Path(row.folder) for row in report.pieces]
    assert sorted(bits(folders[1])) == ["classifier.bias", "classifier.weight"]
    joined = join(folders[::-1], tmp_path / "joined")
    assert bits(tmp_path / "joined") == bits(model)
    assert (joined.trunk, joined.parts, joined.tensors, joined.changed) == (report.trunk, ["experts", "head"], 8, [])
    assert joined.size_bytes == sum(row.size_bytes for row in report.pieces)
    for name in ("config.json", "vocab.txt"):
        assert (tmp_path / "joined" / name).read_bytes() == (model / name).read_bytes()
    assert not (tmp_path / "joined" / SHEET).exists()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["head", "experts", None]), min_size=8, max_size=8), st.integers(0, 99))
def test_any_split_joins_again(tmp_path_factory: pytest.TempPathFactory, owners: list[str | None], seed: int) -> None:
    folder = tmp_path_factory.mktemp("any")
    given_tensors = tensors(seed)
    parts = {
        part: [name for name, owner in zip(given_tensors, owners, strict=True) if owner == part]
        for part in ("head", "experts")
    }
    parts = {part: members for part, members in parts.items() if members}
    model = write(folder / "model", given_tensors)
    if not parts or None not in owners:
        with pytest.raises(ConfigError):
            split(model, parts, folder / "pieces")
        return
    report = split(model, parts, folder / "pieces")
    join([Path(row.folder) for row in report.pieces], folder / "joined")
    assert bits(folder / "joined") == bits(model)


def test_packs_of_pieces_are_published_pulled_and_joined_by_the_commands(tmp_path: Path, model: Path) -> None:
    store, runner = str(tmp_path / "store"), CliRunner()

    def run(*arguments: str) -> str:
        done = runner.invoke(app, [*arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    where, pieces = ["--store", store], tmp_path / "pieces"
    run("split", str(model), "--part", "head=classifier", "--to", str(pieces))
    opened = open_store(store)
    for piece in ("trunk", "head"):
        publish_folder(opened, pieces / piece, f"toy-{piece}", work=tmp_path / "work")
    digests = {piece: load_digest(opened, f"toy-{piece}") for piece in ("trunk", "head")}
    found = load.load_manifest(opened, "toy-head", digests["head"]).lineage["submodel"]
    assert found == {"piece": "head", "trunk": json.loads((pieces / "trunk" / SHEET).read_text())["trunk"]}
    _, head = load.load_checkpoint(opened, "toy-head", digests["head"])
    assert torch.equal(head.tensors["classifier.weight"], tensors()["classifier.weight"])
    names = [f"toy-{piece}@{digest}" for piece, digest in digests.items()]
    assert "bit for bit" in run("join", *names, "--to", str(tmp_path / "joined"), *where)
    assert bits(tmp_path / "joined") == bits(model)


def load_digest(store: object, name: str) -> str:
    (key,) = [info.key for info in store.list(f"packs/{name}/") if info.key.endswith(".json")]  # type: ignore[attr-defined]
    return str(key.rpartition("/")[2].removesuffix(".json"))


def test_a_head_of_another_model_with_the_same_trunk_takes_the_place(tmp_path: Path, pieces: dict[str, Path]) -> None:
    other = write(tmp_path / "other", tensors(head=5))
    split(other, PARTS, tmp_path / "others")
    report = join([pieces["trunk"], pieces["experts"], tmp_path / "others" / "head"], tmp_path / "joined")
    assert bits(tmp_path / "joined") == bits(other)
    assert report.changed == ["classifier.weight"]


def test_a_changed_piece_is_joined_and_told(tmp_path: Path, pieces: dict[str, Path]) -> None:
    pruned = tensors()["classifier.weight"].clone()
    pruned[0] = 0
    write_weights(pieces["head"], {"classifier.weight": pruned, "classifier.bias": tensors()["classifier.bias"]})
    report = join(list(pieces.values()), tmp_path / "joined")
    assert report.changed == ["classifier.weight"]
    assert bits(tmp_path / "joined")["classifier.weight"][2] == pruned.numpy().tobytes()


def write_weights(folder: Path, given_tensors: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(given_tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_part_of_another_trunk_is_refused(tmp_path: Path, pieces: dict[str, Path]) -> None:
    split(write(tmp_path / "other", tensors(seed=1)), PARTS, tmp_path / "others")
    with pytest.raises(WorkloadError, match=r"part 'head' of trunk [0-9a-f]{64}") as caught:
        join([pieces["trunk"], pieces["experts"], tmp_path / "others" / "head"], tmp_path / "joined")
    assert caught.value.fix is not None
    assert not (tmp_path / "joined").exists()


def test_what_does_not_make_one_model_is_refused(tmp_path: Path, model: Path, pieces: dict[str, Path]) -> None:
    trunk, head, experts = pieces["trunk"], pieces["head"], pieces["experts"]

    def refused(folders: list[Path], message: str, kind: type[ModelpressError] = WorkloadError) -> None:
        with pytest.raises(kind, match=message):
            join(folders, tmp_path / "joined")
        assert not (tmp_path / "joined").exists()

    refused([head, experts], "0 trunks")
    refused([trunk, trunk], "1 trunks|no experts|2 trunks")
    refused([trunk, head], "no experts")
    refused([trunk, head, model], "none")
    split(model, {"other": ["table"]}, tmp_path / "more")
    write_weights(head, {"classifier.weight": torch.zeros(4, 8), "classifier.bias": torch.zeros(3)})
    refused([trunk, head, experts], r"\[4, 8\]")
    write_weights(head, {"classifier.weight": torch.zeros(3, 8).half(), "classifier.bias": torch.zeros(3)})
    refused([trunk, head, experts], "F16")
    write_weights(head, {"classifier.weight": torch.zeros(3, 8)})
    refused([trunk, head, experts], "no classifier.bias")
    write_weights(head, {"classifier.weight": torch.zeros(3, 8), "table.weight": torch.zeros(3)})
    refused([trunk, head, experts], "classifier.bias|table.weight")


DAMAGE: dict[str, Callable[[dict[str, object]], object]] = {
    "another digest": lambda sheet: sheet.update(trunk="0" * 64),
    "a tensor less": lambda sheet: sheet.update(tensors={}),
    "an unknown key": lambda sheet: sheet.update(extra=1),
    "a path for a name": lambda sheet: sheet.update(parts={"../../x": {}}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_sheet_is_refused(pieces: dict[str, Path], tmp_path: Path, case: str) -> None:
    path = pieces["trunk"] / SHEET
    sheet = json.loads(path.read_text())
    DAMAGE[case](sheet)
    path.write_text(json.dumps(sheet))
    with pytest.raises(CorruptionError):
        join(list(pieces.values()), tmp_path / "joined")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"head": ["classifer"]}, "classifer"),
        ({"head": ["classifier"], "other": ["*.bias"]}, "'head' and 'other'"),
        ({"all": ["*"]}, "every tensor in a part"),
        ({"trunk": ["classifier"]}, "named trunk"),
        ({"../head": ["classifier"]}, "lower-case"),
        ({}, "no parts"),
    ],
)
def test_a_split_that_cannot_be_is_refused(
    model: Path, tmp_path: Path, parts: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        split(model, parts, tmp_path / "pieces")
    assert not (tmp_path / "pieces").exists()


def test_a_piece_is_not_split_and_nothing_is_written_over(model: Path, tmp_path: Path, pieces: dict[str, Path]) -> None:
    with pytest.raises(WorkloadError, match="join its pieces first"):
        split(pieces["trunk"], {"table": ["table"]}, tmp_path / "again")
    with pytest.raises(ConfigError):
        split(model, PARTS, tmp_path / "pieces")
    safetensors.torch.save_file({"x": torch.zeros(1)}, model / "adapter.safetensors")
    with pytest.raises(WorkloadError, match="adapter"):
        split(model, PARTS, tmp_path / "beside")


def test_a_part_needs_a_name_and_a_module(model: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["split", str(model), "--part", "classifier", "--to", str(tmp_path / "pieces")])
    assert isinstance(done.exception, ConfigError)
