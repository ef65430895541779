"""Pre- and post-processing as data: what the workload does is what the description does; hostile inputs are refused."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pydantic import ValidationError

from modelpress import graph
from modelpress.config import ExportConfig, WorkloadConfig
from modelpress.errors import CorruptionError, InputError, UnsupportedFormatError, WorkloadError
from modelpress.export import export
from modelpress.process import (
    Feature,
    ImageInput,
    MeanPool,
    Normalize,
    Pipeline,
    Processing,
    Softmax,
    TextInput,
    TopK,
    features_of,
    image,
    text,
)
from modelpress.workload import load_workload
from modelpress.workloads.image_classification import ImageClassification
from modelpress.workloads.sentence_embedding import SentenceEmbedding
from modelpress.workloads.text_classification import TextClassification
from tests.encoders import make_encoder_folder

TEXTS = ["word1 word2", "", "word3 " * 40, "no such words", "word5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder_folder(tmp_path_factory.mktemp("encoder"), pairs=40)


@pytest.fixture(scope="module")
def embedding(folder: Path) -> SentenceEmbedding:
    config = {"kind": "sentence-embedding", "model": str(folder), "data": str(folder / "pairs.jsonl")}
    workload = load_workload(WorkloadConfig.model_validate(config))
    assert isinstance(workload, SentenceEmbedding)
    return workload


def test_a_text_becomes_the_embedding_that_the_workload_makes(embedding: SentenceEmbedding) -> None:
    """Through the exported graph, against the torch module and the workload's own tokens."""
    module = embedding.source()
    checkpoint, _ = export(module, embedding, ExportConfig())
    pipeline = Pipeline(embedding.processing(), embedding.files(), *features_of(graph.parse(checkpoint)))
    texts = [one for one in TEXTS if one]
    prepared = pipeline.prepare([one.encode() for one in texts])
    expected = embedding.tokenize(texts)
    assert set(prepared) == set(expected)
    for name, array in prepared.items():
        assert array.dtype == np.int64
        assert (array == expected[name].numpy()).all()
    session = graph.session(checkpoint, threads=1)
    found = dict(zip([one.name for one in session.get_outputs()], session.run(None, prepared), strict=True))
    with torch.no_grad():
        answer = module(**expected).numpy()
    assert np.allclose(pipeline.finish(found, prepared)["output"], answer, atol=1e-5)
    assert pipeline.input == Feature("text", np.dtype(object), ("batch",))
    assert [(one.name, len(one.shape)) for one in pipeline.outputs] == [("output", 2)]


def test_an_empty_text_is_padding(embedding: SentenceEmbedding) -> None:
    """A word-level tokenizer gives it no token at all, and no graph takes a length of 0."""
    reader = text.TextReader(embedding.processing().input, embedding.files()["tokenizer.json"])  # type: ignore[arg-type]
    found = reader.read([b""])
    assert {name: array.tolist() for name, array in found.items()} == {"input_ids": [[0]], "attention_mask": [[0]]}


def test_a_text_becomes_the_classes_that_the_workload_has(folder: Path, tmp_path: Path) -> None:
    lines = [{"text": f"word{n} word{n + 1} word{n % 7}", "label": ["cat", "dog", "hen"][n % 3]} for n in range(50)]
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = {"kind": "text-classification", "model": str(folder), "data": str(tmp_path / "labelled.jsonl")}
    workload = load_workload(WorkloadConfig.model_validate(config | {"train_epochs": 1}))
    assert isinstance(workload, TextClassification)
    module = workload.skeleton({})
    checkpoint, _ = export(module, workload, ExportConfig())
    pipeline = Pipeline(workload.processing(), workload.files(), *features_of(graph.parse(checkpoint)))
    batch = next(workload.batches("evaluation", 4))
    texts = [one.text for one in workload.texts["evaluation"][:4]]
    prepared = pipeline.prepare([one.encode() for one in texts])
    session = graph.session(checkpoint, threads=1)
    found = dict(zip([one.name for one in session.get_outputs()], session.run(None, prepared), strict=True))
    finished = pipeline.finish(found, prepared)
    with torch.no_grad():
        expected = module(**batch.inputs).softmax(dim=1)
    scores, order = expected.sort(dim=1, descending=True, stable=True)
    assert np.allclose(finished["probabilities"], expected.numpy(), atol=1e-5)
    assert np.allclose(finished["scores"], scores.numpy(), atol=1e-5)
    assert finished["labels"].tolist() == [[workload.labels[at].encode() for at in row] for row in order.tolist()]


def png(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("colours", [1, 3])
def test_an_image_becomes_the_pixels_that_the_workload_reads(tmp_path: Path, colours: int) -> None:
    """Files of a folder, one of them turned by its EXIF data, resized: bit for bit what training saw."""
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for number in range(6):
            shape = (20, 30) if colours == 1 else (20, 30, 3)
            picture = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
            exif = Image.Exif()
            exif[0x0112] = 6 if number == 3 else 1
            picture.save(tmp_path / name / f"{number}.jpg", quality=90, exif=exif)
    config = {"kind": "image-classification", "model": "lenet-5", "data": str(tmp_path), "image_size": 28}
    workload = load_workload(WorkloadConfig.model_validate(config | {"calibration_samples": 2}))
    assert isinstance(workload, ImageClassification)
    spec = workload.processing()
    assert spec is not None
    inputs = [Feature("image", np.dtype(np.float32), ("batch", colours, 28, 28))]
    pipeline = Pipeline(spec, workload.files(), inputs, [Feature("output", np.dtype(np.float32), ("batch", 2))])
    files = [path for name in ("cats", "dogs") for path in sorted((tmp_path / name).iterdir())]
    found = pipeline.prepare([path.read_bytes() for path in files])["image"]
    assert found.dtype == np.float32
    assert (found == workload.images.numpy()).all()
    encoded = pipeline.prepare([base64.b64encode(path.read_bytes()) for path in files])["image"]
    assert (encoded == found).all()
    finished = pipeline.finish({"output": np.array([[1.0, 2.0]], np.float32)}, {})
    assert finished["labels"].tolist() == [[b"dogs", b"cats"]]


def test_images_that_no_file_holds_have_no_processing(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 2), dtype=np.uint8)
    np.savez(tmp_path / "two.npz", images=images, labels=np.arange(40) % 2)
    config = {"kind": "image-classification", "model": "lenet-5", "data": str(tmp_path / "two.npz")}
    assert load_workload(WorkloadConfig.model_validate(config | {"calibration_samples": 2})).processing() is None


def reader(**changes: Any) -> image.ImageReader:
    return image.ImageReader(ImageInput.model_validate({"height": 4, "width": 4} | changes))


def read(data: bytes, **changes: Any) -> np.ndarray:
    return reader(**changes).read([data])["pixel_values"]


def test_pixels_are_divided_and_normalised_by_channel() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    expected = (pixels / 255 - mean) / std
    assert np.allclose(read(png(pixels), mean=mean, std=std, layout="HWC")[0], expected, atol=1e-6)
    assert np.allclose(read(png(pixels), mean=mean, std=std)[0], expected.transpose(2, 0, 1), atol=1e-6)


def test_the_middle_is_cut_out() -> None:
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 255
    assert (read(png(pixels), shorter_side=4) == 1.0).all()
    assert (read(png(pixels.transpose(1, 0, 2)), shorter_side=4) == 1.0).all()
    assert read(png(pixels)).mean() == pytest.approx(1 / 3, abs=0.05)  # squeezed, all of it


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * min(height * (width + 1), 10**6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


GREY = png(np.arange(64, dtype=np.uint8).reshape(8, 8))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no image"),
        (b"GIF89a" + b"\0" * 100, "no image"),
        (b"\x89PNG\r\n\x1a\n", "no image"),
        (GREY[:-30], "no image"),
        (GREY[:40], "no image"),
        (bomb(1, 60_000), "1 × 60000"),
        (bomb(60_000, 1), "60000 × 1"),
        (bomb(30_000, 30_000), "DecompressionBombError"),
        (bomb(5000, 5000), "5000 × 5000"),
        (bomb(2**31 - 1, 2**31 - 1), ""),
        (bomb(100, 0), "no image"),
        (b"\xff\xd8\xff" + b"\0" * 1000, "no image"),
        (b"iVBOR!!!!", "base64"),
        (b"/9j/" + b"A" * 4001, "base64"),
        (b"\0" * (image.MAX_IMAGE_BYTES + 1), "bytes"),
        (png(np.arange(16, dtype=np.uint16).reshape(4, 4)), "mode I;16"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_what_is_no_image_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(data)
    assert caught.value.doing == "reading image 0"
    assert said in (caught.value.found or "")
    assert len(str(caught.value)) < 400


@given(st.integers(0, len(GREY) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_read(at: int, bits: int) -> None:
    data = bytearray(GREY)
    data[at] ^= bits
    try:
        assert read(bytes(data)).shape == (1, 3, 4, 4)
    except InputError:
        return


def test_images_that_become_too_large_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "MAX_ARRAY_BYTES", 1000)
    assert reader().read([GREY] * 5)["pixel_values"].shape == (5, 3, 4, 4)
    with pytest.raises(InputError, match="1152 bytes"):
        reader().read([GREY] * 6)


def tokenizer(**changes: Any) -> bytes:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 7, "[UNK]": 1, "a": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    document = json.loads(made.to_str()) | changes
    return json.dumps(document).encode()


def tokens(texts: list[bytes], **changes: Any) -> dict[str, Any]:
    spec = TextInput.model_validate({"max_length": 4, "pad_id": 7} | changes)
    return {name: array.tolist() for name, array in text.TextReader(spec, tokenizer()).read(texts).items()}


def test_texts_are_padded_cut_and_masked() -> None:
    assert tokens([b"a", b"a b a a a a"]) == {
        "input_ids": [[2, 7, 7, 7], [2, 1, 2, 2]],
        "attention_mask": [[1, 0, 0, 0], [1, 1, 1, 1]],
    }
    found = tokens([b"a a"], ids="x", mask=None, types="t")
    assert found == {"x": [[2, 2]], "t": [[0, 0]]}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([b"a", b"\xff"], "byte 0 that is no UTF-8"),
        ([b"a\xed\xa0\x80"], "byte 1 that is no UTF-8"),  # a surrogate
        ([b"a " * 5_000_000], "10000000 bytes"),
        ([b"a" * 100_000] * 30, "bytes up to it"),
    ],
)
def test_what_is_no_text_is_refused(texts: list[bytes], said: str) -> None:
    with pytest.raises(InputError, match=said):
        tokens(texts)


def test_tokens_of_all_texts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_TOKENS", 11)
    with pytest.raises(InputError, match="12 tokens, padded"):
        tokens([b"a a a a", b"a", b"a"])


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_any_text_has_tokens(texts: list[str]) -> None:
    encoded = [one.encode("utf-8", "surrogatepass") for one in texts]
    found = tokens(encoded) if not any("\ud800" <= c <= "\udfff" for one in texts for c in one) else None
    assert found is None or len(found["input_ids"]) == len(texts)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b'{"model": {"type": "Pickle"}}', b"[" * 100_000])
def test_a_file_that_is_no_tokenizer_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptionError, match=r"tokenizer\.json"):
        text.TextReader(TextInput(max_length=4), data)


def test_a_length_that_the_special_tokens_fill_is_refused() -> None:
    """The package cuts nothing where fewer tokens are allowed than it adds."""
    made = tokenizers.Tokenizer.from_str(tokenizer().decode())
    made.post_processor = tokenizers.processors.TemplateProcessing("[UNK] $A [UNK]", special_tokens=[("[UNK]", 1)])
    data = made.to_str().encode()
    reader = text.TextReader(TextInput(max_length=3), data)
    assert reader.read([b"a a a a"])["input_ids"].tolist() == [[1, 2, 1]]
    with pytest.raises(WorkloadError, match="2 or more"):
        text.TextReader(TextInput(max_length=1), data)


FLOAT, INT = np.dtype(np.float32), np.dtype(np.int64)
IDS = [Feature("input_ids", INT, ("batch", "length")), Feature("attention_mask", INT, ("batch", "length"))]
HIDDEN = [Feature("hidden", FLOAT, ("batch", "length", 3))]
FILES = {"tokenizer.json": tokenizer(), "labels.json": b'["cat", "dog", "\xc3\xa4"]'}


def pipeline(*steps: Any, inputs: list[Feature] = IDS, outputs: list[Feature] = HIDDEN, **changes: Any) -> Pipeline:
    given = TextInput.model_validate({"max_length": 8, "pad_id": 7} | changes)
    return Pipeline(Processing(input=given, steps=steps), FILES, inputs, outputs)


@given(hnp.arrays(np.float32, (2, 3, 3), elements=st.floats(-100, 100, width=32)))
def test_steps_do_what_torch_does(hidden: np.ndarray) -> None:
    made = pipeline(MeanPool(of="hidden", to="mean"), Normalize(of="mean"), Softmax(of="mean", to="share"))
    prepared = made.prepare([b"a", b"a a a"])
    found = made.finish({"hidden": hidden}, prepared)
    assert [one.name for one in made.outputs] == ["mean", "share"] == list(found)
    given, mask = torch.from_numpy(hidden), torch.from_numpy(prepared["attention_mask"]).unsqueeze(-1)
    mean = torch.nn.functional.normalize((given * mask).sum(1) / mask.sum(1).clamp(min=1), dim=-1)
    assert np.allclose(found["mean"], mean.numpy(), atol=1e-5)
    assert np.allclose(found["share"], mean.softmax(dim=-1).numpy(), atol=1e-5)


def test_the_greatest_have_names_and_ties_their_order() -> None:
    logits = [Feature("logits", FLOAT, ("batch", 3))]
    made = pipeline(TopK(of="logits", k=2), outputs=logits)
    found = made.finish({"logits": np.array([[1, 3, 3], [5, 1, 2]], np.float32)}, {})
    assert found["labels"].tolist() == [[b"dog", "ä".encode()], [b"cat", "ä".encode()]]
    assert found["scores"].tolist() == [[3, 3], [5, 2]]
    shapes = {one.name: (one.dtype.kind, one.shape) for one in made.outputs}
    assert shapes == {"logits": ("f", ("batch", 3)), "labels": ("O", ("batch", 2)), "scores": ("f", ("batch", 2))}
    numbered = pipeline(TopK(of="logits", k=9, labels=None), outputs=logits)
    assert numbered.finish({"logits": np.array([[1, 3, 2]], np.float32)}, {})["labels"].tolist() == [[b"1", b"2", b"0"]]
    free = pipeline(TopK(of="logits"), outputs=[Feature("logits", FLOAT, ("batch", None))])
    with pytest.raises(WorkloadError, match="4 classes and 3 names"):
        free.finish({"logits": np.zeros((1, 4), np.float32)}, {})


@pytest.mark.parametrize(
    ("steps", "options", "said"),
    [
        ([MeanPool(of="other")], {}, "nothing as 'other'"),
        ([TopK(of="hidden")], {}, "3 axes"),
        ([MeanPool(of="hidden"), Softmax(of="embedding", to="embedding")], {}, "another output named"),
        ([TopK(of="logits", to_labels="x", to_scores="x")], {"outputs": [Feature("logits", FLOAT, (1, 3))]}, "another"),
        ([TopK(of="logits")], {"outputs": [Feature("logits", FLOAT, ("b", 4))]}, "3 names"),
        ([TopK(of="logits", labels="no.json")], {"outputs": [Feature("logits", FLOAT, ("b", 3))]}, "no file 'no.json'"),
        ([], {"tokenizer": "other.json"}, "no file 'other.json'"),
        ([], {"ids": "tokens"}, "makes"),
        ([], {"mask": None}, "makes"),
        ([], {"types": "token_type_ids"}, "makes"),
        ([], {"inputs": [IDS[0], Feature("attention_mask", FLOAT, ("b", "l"))]}, "float32"),
        ([], {"inputs": [IDS[0], Feature("attention_mask", INT, (1, "l"))]}, "attention_mask"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(steps: list[Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        pipeline(*steps, **options)


def test_an_image_that_does_not_fit_the_graph_is_refused() -> None:
    spec = Processing(input=ImageInput(height=8, width=8, mode="L"))
    fits = Feature("pixel_values", FLOAT, ("batch", 1, 8, 8))
    Pipeline(spec, {}, [fits], [])
    Pipeline(spec, {}, [Feature("pixel_values", FLOAT, ("batch", "channels", "height", "width"))], [])
    with pytest.raises(WorkloadError, match="pixel_values"):
        Pipeline(spec, {}, [Feature("pixel_values", FLOAT, ("batch", 3, 8, 8))], [])


@pytest.mark.parametrize("data", [b"{", b"{}", b'["cat", 3]', b'"cat"', b"[" * 100_000])
def test_a_file_that_is_no_list_of_names_is_refused(data: bytes) -> None:
    spec = Processing(input=TextInput(max_length=8), steps=(TopK(of="logits"),))
    with pytest.raises(CorruptionError, match=r"labels\.json"):
        Pipeline(spec, FILES | {"labels.json": data}, IDS, [Feature("logits", FLOAT, ("batch", 3))])


SPEC = Processing(
    input=ImageInput(height=8, width=8, mean=(0.5, 0.5, 0.5), std=(0.1, 0.2, 1 / 3)),
    steps=(Softmax(of="x"), TopK(of="x")),
)


def test_a_description_has_one_spelling() -> None:
    assert Processing.parse(SPEC.to_bytes()) == SPEC
    assert Processing.parse(SPEC.to_bytes()).to_bytes() == SPEC.to_bytes()


def document(**changes: Any) -> bytes:
    return json.dumps(json.loads(SPEC.to_bytes()) | changes).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\x80\x04.",
        document(code="import os"),
        document(input={"kind": "python", "callable": "os:system"}),
        document(steps=[{"kind": "exec", "of": "x"}]),
        document(steps=[{"kind": "softmax", "of": "x", "to": ""}]),
        document(steps=[{"kind": "softmax", "of": "x"}] * 17),
        document(input={"kind": "image", "height": 8, "width": 10**9}),
        document(input={"kind": "image", "height": 8, "width": 8, "mean": [1.0]}),
        document(input={"kind": "image", "height": 8, "width": 8, "divisor": 0}),
        document(input={"kind": "image", "height": 8, "width": 8, "shorter_side": 4}),
        document(input={"kind": "text", "max_length": 0}),
        document(format_version=True),
        b" " * (2**20 + 1),
    ],
)
def test_a_hostile_description_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptionError):
        Processing.parse(data)


def test_a_newer_description_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedFormatError, match="update modelpress"):
        Processing.parse(document(format_version=2))


def test_what_a_description_may_say_is_checked_where_it_is_made() -> None:
    with pytest.raises(ValidationError):
        ImageInput(height=8, width=8, std=(0.0, 1.0, 1.0))
    with pytest.raises(ValidationError):
        TextInput.model_validate({"max_length": 8, "module": "os"})
