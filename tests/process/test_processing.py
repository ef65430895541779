"""Pre- and post-processing as data: what the workload does is what the description does; hostile inputs are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from modelpress import graph
from modelpress.config import ExportConfig, WorkloadConfig
from modelpress.errors import CorruptionError, UnsupportedFormatError, WorkloadError
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
    text,
)
from modelpress.workload import load_workload
from modelpress.workloads.sentence_embedding import SentenceEmbedding
from modelpress.workloads.text_classification import TextClassification
from tests.encoders import make_encoder_folder
from tests.process.test_texts import tokenizer

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
