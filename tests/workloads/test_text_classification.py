"""Labelled texts and their classifiers: splits, labels, a head that learns, folders read or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from modelpress.attribution import compare
from modelpress.checkpoint import Checkpoint, from_module, to_module
from modelpress.config import DistillConfig, EvaluateConfig, ExportConfig, TrainConfig, WorkloadConfig
from modelpress.distill import distill
from modelpress.errors import OverlapError, WorkloadError
from modelpress.evaluate import evaluate
from modelpress.export import export
from modelpress.workload import SPLITS, check_disjoint, load_workload
from modelpress.workloads.encoder_folder import tokenized
from modelpress.workloads.labelled_texts import PACKAGES, Labelled, load_labelled, split_labelled
from modelpress.workloads.text_classification import TextClassification
from tests.encoders import WORDS, make_encoder_folder

QUICK = EvaluateConfig(batch_sizes=[1], latency_seconds=0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny encoder, and 240 texts whose label is which third of the vocabulary they come from."""
    path = make_encoder_folder(tmp_path_factory.mktemp("encoder"), pairs=1)
    random = np.random.default_rng(0)
    lines = []
    for number in range(240):
        label = number % 3
        words = random.choice(WORDS[label * 20 : label * 20 + 20], 6).tolist()
        lines.append({"text": " ".join(words), "label": ("first", "second", "third")[label]})
    (path / "texts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture(scope="module")
def classifier(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a random classifier with names for its classes."""
    path = tmp_path_factory.mktemp("classifier")
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=20, id2label={0: "third", 1: "first", 2: "second"},
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(path)
    (path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    return path


def workload_of(folder: Path, data: Path | str | None = None, **changes: object) -> TextClassification:
    values = {
        "kind": "text-classification", "model": str(folder), "data": str(data or folder / "texts.jsonl"),
        "calibration_samples": 24, "train_epochs": 12, **changes,
    }  # fmt: skip
    workload = load_workload(WorkloadConfig.model_validate(values))
    assert isinstance(workload, TextClassification)
    return workload


def test_the_splits_are_disjoint_and_limits_move_nothing(folder: Path) -> None:
    whole, short = workload_of(folder), workload_of(folder, train_samples=5, evaluation_samples=7)
    check_disjoint(whole)
    assert {split: len(whole.texts[split]) for split in SPLITS} == {"evaluation": 96, "calibration": 24, "train": 120}
    assert len(short.texts["evaluation"]) == 7
    for split in SPLITS:
        assert set(short.texts[split]) <= set(whole.texts[split])
    assert whole.identity() == workload_of(folder).identity() != workload_of(folder, seed=1).identity()


def test_a_slice_of_each_class_where_the_config_asks(folder: Path) -> None:
    sliced = workload_of(folder, slice_by_class=True)
    assert workload_of(folder).slices() == {}
    found = sliced.slices()
    assert set(found) == {f"class {label}" for label in sliced.labels}
    for label in sliced.labels:
        assert found[f"class {label}"].tolist() == [one.label == label for one in sliced.texts["evaluation"]]


def test_an_encoder_gets_a_head_and_both_learn(folder: Path) -> None:
    workload = workload_of(folder, train_epochs=40)
    assert workload.trains_source
    module = workload.source()
    report, scores = evaluate(from_module(module), workload, QUICK, "source", None, 1)
    assert report.quality.value > 0.6  # a third by guessing
    by_hand = []
    with torch.no_grad():
        for one in workload.texts["evaluation"]:
            logits = module(**tokenized(workload.tokenizer, [one.text]))
            by_hand.append(float(workload.labels[int(logits.argmax())] == one.label))
    assert scores.scores is not None
    assert scores.scores.tolist() == by_hand
    first, again = (workload_of(folder, train_epochs=1).source().state_dict() for _ in range(2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_a_classifier_is_taken_as_it_is_with_its_own_labels(folder: Path, classifier: Path) -> None:
    workload = workload_of(classifier, folder / "texts.jsonl")
    assert not workload.trains_source
    assert json.loads(workload.files()["labels.json"]) == ["third", "first", "second"]
    batch = next(workload.batches("train", 6))
    names = [workload.labels[number] for number in batch.targets.tolist()]
    assert names == [one.label for one in workload.texts["train"][:6]]
    expected = BertForSequenceClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        assert torch.allclose(workload.source()(**batch.inputs), expected(**batch.inputs).logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_the_checkpoint_and_the_graph_compute_the_same(folder: Path, classifier: Path, kind: str) -> None:
    workload = workload_of(folder if kind == "encoder" else classifier, folder / "texts.jsonl", train_epochs=1)
    module = workload.source()
    again = to_module(Checkpoint.from_bytes(from_module(module).to_bytes()), workload)
    with torch.no_grad():
        assert torch.equal(again(**workload.example(4)), module(**workload.example(4)))
    if kind == "encoder":
        _, report = export(module, workload, ExportConfig())  # checks several batch sizes, and half the length
        assert report.max_difference < 1e-4


def test_its_reasons_are_explained_word_by_word(folder: Path, classifier: Path) -> None:
    workload = workload_of(classifier, folder / "texts.jsonl")
    ids = torch.tensor([[2, 10, 11, 12, 3]])
    mask = workload.tokenizer.token_to_id("[MASK]")
    between = mask if mask is not None else 0
    assert workload.blank({"input_ids": ids})["input_ids"].tolist() == [[2, between, between, between, 3]]
    source = from_module(workload.source())
    found = compare(source, source, workload, EvaluateConfig(attribution_samples=3))
    assert (found.agreement, found.samples) == (pytest.approx(1.0), 3)


def test_a_student_with_fewer_layers_learns_the_teachers_answers(folder: Path) -> None:
    workload = workload_of(folder)
    teacher = workload.source()
    train = TrainConfig(epochs=6, batch_size=32, learning_rate=0.003)
    config = DistillConfig(student="layer-drop", keep_layers=[0, 2], alpha=1.0, hidden_weight=0.1, train=train)
    _, report = distill(teacher, workload, config)
    assert report.train.final_loss < report.train.first_loss


def test_pythons_modules_are_real_texts_with_real_labels() -> None:
    texts = load_labelled("python-modules")
    counts = {name: sum(one.label == name for one in texts) for name in PACKAGES}
    assert min(counts.values()) >= 60
    assert max(counts.values()) <= 300
    assert all("def " in one.text for one in texts)
    splits = split_labelled(texts, "python-modules", 0)
    digests = [{one.digest for one in splits[split]} for split in SPLITS]
    assert sum(len(one) for one in digests) == len(set.union(*digests)) == len(texts)
    assert load_labelled("python-modules") == texts


GOOD = '{"text": "one two", "label": "a"}\n{"text": "three", "label": "b"}\n'


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "labels \\[\\] on 0 distinct texts"),
        ('{"text": "one", "label": "a"}\n{"text": "two", "label": "a"}', "'a'.*at least two classes"),
        (GOOD + '{"text": "x", "label": 1.5}', "line 3"),
        (GOOD + '{"text": "x", "label": true}', "line 3"),
        (GOOD + '{"text": "x", "label": -1}', "line 3"),
        (GOOD + '{"text": "x", "label": ""}', "line 3"),
        (GOOD + '{"text": "x"}', "line 3"),
        (GOOD + '{"text": " ", "label": "a"}', "line 3"),
        (GOOD + '{"text": "x", "label": 1}', "all by name or all by number"),
        (GOOD + '{"text": "three", "label": "a"}', "labelled both 'b' and 'a'"),
        (GOOD, "2 distinct texts"),
    ],
)
def test_labels_that_cannot_be_are_named(tmp_path: Path, folder: Path, content: str, found: str) -> None:
    (tmp_path / "texts.jsonl").write_text(content)
    with pytest.raises(WorkloadError, match=f"(?s){found}"):
        workload_of(folder, tmp_path / "texts.jsonl")


def numbered(path: Path, labels: list[int]) -> Path:
    lines = [{"text": f"word{n} word{n // 9}", "label": labels[n % len(labels)]} for n in range(60)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_numbers_are_classes_and_none_may_be_missing(tmp_path: Path, folder: Path) -> None:
    workload = workload_of(folder, numbered(tmp_path / "good.jsonl", [0, 1, 2]))
    assert workload.labels == ["0", "1", "2"]
    with pytest.raises(WorkloadError, match=r"no sample of \[1\]"):
        workload_of(folder, numbered(tmp_path / "hole.jsonl", [0, 2]))
    with pytest.raises(WorkloadError, match=r"(?s)up to 90000000000000000000, and no sample of \[1\]"):
        workload_of(folder, numbered(tmp_path / "huge.jsonl", [0, 9 * 10**19]))


def test_each_class_is_trained_also_after_the_limits(folder: Path) -> None:
    with pytest.raises(WorkloadError, match=r"(?s)none of class '.*train_samples"):
        workload_of(folder, train_samples=2)


def test_a_class_more_is_another_identity(folder: Path) -> None:
    workload = workload_of(folder)
    first = workload.identity()
    workload.labels = [*workload.labels, "fourth"]
    assert workload.identity() != first


def test_texts_that_a_model_sees_the_same_of_are_taken_once(tmp_path: Path, folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    twice = [{**line, "text": f"{line['text']}  "} for line in lines]
    longer = [{**line, "text": " ".join([line["text"]] * 2 + ["word7"] * 9)} for line in lines]
    longest = [{**line, "text": f"{line['text']} word9"} for line in longer]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(line) for line in lines + twice + longer + longest))
    workload = workload_of(folder, tmp_path / "texts.jsonl", calibration_samples=48)  # reads 12 tokens
    assert sum(len(workload.texts[split]) for split in SPLITS) == 2 * len(lines)
    check_disjoint(workload)
    seen = {
        split: {tuple(batch.inputs["input_ids"][0].tolist()) for batch in workload.batches(split, 1)}
        for split in SPLITS
    }
    assert not seen["evaluation"] & (seen["train"] | seen["calibration"])
    workload.texts["train"][0] = Labelled(workload.texts["evaluation"][0].text + " ", "first")
    with pytest.raises(OverlapError, match="1 shared"):
        check_disjoint(workload)


def test_one_sequence_of_tokens_has_one_label(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(GOOD + '{"text": "one  two", "label": "b"}')
    with pytest.raises(WorkloadError, match=r"(?s)'one  two' labelled 'b'.*the same tokens"):
        workload_of(folder, tmp_path / "texts.jsonl")


def changed(path: Path, source: Path, **config: object) -> Path:
    """A copy of a folder with another config.json."""
    shutil.copytree(source, path)
    document = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"id2label": ["a", "b", "c"]}, "id2label"),
        ({"id2label": {"x": "b"}}, "id2label"),
        ({"id2label": {"0": "a", "7": "b"}}, "id2label"),
        ({"id2label": {}}, "id2label"),
        ({"architectures": "BertForSequenceClassification"}, "architectures"),
        ({"architectures": 5}, "architectures"),
        ({"architectures": [5]}, "architectures"),
    ],
)
def test_a_config_that_names_its_classes_otherwise_is_refused(
    tmp_path: Path, folder: Path, classifier: Path, config: dict[str, object], found: str
) -> None:
    with pytest.raises(WorkloadError, match=rf"reading {found} of .*config\.json"):
        workload_of(changed(tmp_path / "model", classifier, **config), folder / "texts.jsonl")


def test_a_decoder_that_classifies_knows_what_pads(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "gpt2"
    torch.manual_seed(0)
    names = {0: "first", 1: "second", 2: "third"}
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=20, id2label=names)
    GPT2ForSequenceClassification(config).save_pretrained(path)
    shutil.copy(folder / "tokenizer.json", path)
    with pytest.raises(WorkloadError, match="no padding token"):
        workload_of(path, folder / "texts.jsonl").source()
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=63, pad_token="[PAD]")
    tokenizer.save(str(path / "tokenizer.json"))
    workload = workload_of(path, folder / "texts.jsonl")
    texts = ["word1 word2", "word3 word4 word5 word6", "word7"]
    batch = tokenized(workload.tokenizer, texts)
    assert batch["input_ids"][0, 2:].tolist() == [63, 63]
    module = workload.source()
    with torch.no_grad():
        alone = torch.cat([module(**tokenized(workload.tokenizer, [text])) for text in texts])
        torch.testing.assert_close(module(**batch), alone)
        assert workload.skeleton({})(**batch).shape == (3, 3)


def test_a_label_that_the_classifier_has_not_is_refused(tmp_path: Path, folder: Path, classifier: Path) -> None:
    with pytest.raises(WorkloadError, match=r"(?s)found: 3.*below 3"):
        workload_of(classifier, numbered(tmp_path / "texts.jsonl", [0, 1, 3]))
    (tmp_path / "named.jsonl").write_text(
        (folder / "texts.jsonl").read_text().replace('"label": "third"', '"label": "fourth"')
    )
    with pytest.raises(WorkloadError, match=r"(?s)'fourth'.*third, first, second"):
        workload_of(classifier, tmp_path / "named.jsonl")


def test_a_folder_without_its_tokenizer_is_refused(tmp_path: Path, classifier: Path, folder: Path) -> None:
    for path in classifier.iterdir():
        if path.name != "tokenizer.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(WorkloadError, match=r"without tokenizer\.json"):
        workload_of(tmp_path, folder / "texts.jsonl")


def test_fewer_tokens_are_read_if_the_config_says_so(folder: Path) -> None:
    assert next(workload_of(folder, length=4).batches("train", 8)).inputs["input_ids"].shape[1] == 4
    assert workload_of(folder).max_length == 12
