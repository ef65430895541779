"""Language modelling: blocks, perplexity by hand, a decoder that learns, a folder that is read or refused by name."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from modelpress.attribution import compare
from modelpress.checkpoint import Checkpoint, from_module, to_module
from modelpress.config import EvaluateConfig, ExportConfig, WorkloadConfig
from modelpress.errors import WorkloadError
from modelpress.evaluate import evaluate
from modelpress.export import export
from modelpress.workload import SPLITS, Batch, check_disjoint, load_workload
from modelpress.workloads import causal_lm
from modelpress.workloads.causal_lm import CausalLM
from tests.decoders import SIZES, make_decoder_folder, make_text_folder

QUICK = EvaluateConfig(batch_sizes=[1], latency_seconds=0.02)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_folder(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    return make_decoder_folder(tmp_path_factory.mktemp("decoder"), texts)


def workload_of(data: Path, model: str = "tiny-decoder", **changes: object) -> CausalLM:
    values = {
        "kind": "causal-lm", "model": model, "data": str(data), "length": 32, "calibration_samples": 8,
        "evaluation_samples": 24, "train_samples": 96, "train_epochs": 10,
        **({"architecture": SIZES} if model == "tiny-decoder" else {}), **changes,
    }  # fmt: skip
    workload = load_workload(WorkloadConfig.model_validate(values))
    assert isinstance(workload, CausalLM)
    return workload


@pytest.fixture(scope="module")
def tiny(texts: Path) -> CausalLM:
    return workload_of(texts)


@pytest.fixture(scope="module")
def trained(tiny: CausalLM) -> torch.nn.Module:
    return tiny.source()


def test_the_splits_are_disjoint_and_targets_are_the_next_tokens(tiny: CausalLM) -> None:
    check_disjoint(tiny)
    assert {split: len(tiny.blocks[split]) for split in SPLITS} == {"train": 96, "calibration": 8, "evaluation": 24}
    for split in SPLITS:
        batch = next(tiny.batches(split, 5))
        assert batch.inputs["input_ids"].shape == (5, 32)
        assert batch.targets is not None
        assert torch.equal(batch.inputs["input_ids"][:, 1:], batch.targets[:, :-1])
    shuffled = torch.cat([batch.inputs["input_ids"] for batch in tiny.batches("train", 7, seed=3)])
    plain = torch.cat([batch.inputs["input_ids"] for batch in tiny.batches("train", 7)])
    assert sorted(shuffled.tolist()) == sorted(plain.tolist())
    assert not torch.equal(shuffled, plain)


def test_the_decoder_learns_and_equal_seeds_give_equal_weights(tiny: CausalLM, trained: torch.nn.Module) -> None:
    untrained = tiny.skeleton({})
    before, _ = evaluate(from_module(untrained), tiny, QUICK, "source", None, 1)
    after, _ = evaluate(from_module(trained), tiny, QUICK, "source", None, 1)
    assert before.quality.value == pytest.approx(-math.log(tiny.vocab_size), abs=0.3)
    assert after.quality.value > before.quality.value + 0.5
    again = workload_of(Path(tiny.config.data)).source()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_perplexity_and_accuracy_are_those_counted_by_hand(tiny: CausalLM, trained: torch.nn.Module) -> None:
    report, scores = evaluate(from_module(trained), tiny, QUICK, "source", None, 1)
    losses, right = [], []
    with torch.no_grad():
        for batch in tiny.batches("evaluation", 1):
            probabilities = trained(**batch.inputs)[0].double().softmax(dim=-1)
            assert batch.targets is not None
            losses.append([-math.log(row[int(t)]) for row, t in zip(probabilities, batch.targets[0], strict=True)])
            right.append((probabilities.argmax(dim=-1) == batch.targets[0]).tolist())
    np.testing.assert_allclose(scores.scores, -np.mean(losses, axis=1), rtol=1e-5)
    assert report.quality.shown["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert report.metrics()["quality.perplexity"] == report.quality.shown["perplexity"]
    assert report.further[0].metric == "next_token_accuracy"
    assert report.metrics()["further.next_token_accuracy.value"] == pytest.approx(np.mean(right))


def test_logits_of_the_split_are_never_held_together(tiny: CausalLM, trained: torch.nn.Module) -> None:
    kept = []

    class Watched(CausalLM):
        def condense(self, outputs: np.ndarray, batch: Batch) -> np.ndarray:
            assert outputs.size <= self.evaluation_batch_size * 32 * self.vocab_size
            kept.append(super().condense(outputs, batch))
            return kept[-1]

    watched = Watched(tiny.config)
    watched.evaluation_batch_size = 5
    _, scores = evaluate(from_module(trained), watched, QUICK, "source", None, 1)
    _, whole = evaluate(from_module(trained), tiny, QUICK, "source", None, 1)
    assert [block.shape for block in kept] == [(5, 2)] * 4 + [(4, 2)]
    np.testing.assert_allclose(scores.scores, whole.scores, rtol=1e-6)


def test_a_large_vocabulary_is_judged_in_small_batches(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert workload_of(texts).evaluation_batch_size == 64
    for limit, expected in ((4 * 32 * 320 * 3, 3), (1, 1)):
        monkeypatch.setattr(causal_lm, "MAX_LOGIT_BYTES", limit)
        assert workload_of(texts).evaluation_batch_size == expected


def test_the_checkpoint_and_the_graph_compute_the_same(tiny: CausalLM, trained: torch.nn.Module) -> None:
    checkpoint = Checkpoint.from_bytes(from_module(trained).to_bytes())
    assert checkpoint.metadata["tied"]
    again = to_module(checkpoint, tiny)
    inputs = tiny.example(3)
    with torch.no_grad():
        assert torch.equal(again(**inputs), trained(**inputs))
    graph, report = export(trained, tiny, ExportConfig())  # checks several batch sizes, and half the length
    assert report.max_difference < 1e-4
    source, scores = evaluate(checkpoint, tiny, QUICK, "source", None, 1)
    served, _ = evaluate(graph, tiny, QUICK, "export", scores, 1)
    assert served.quality.value == pytest.approx(source.quality.value, abs=1e-5)


def test_a_folder_is_read_as_transformers_reads_it(texts: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    workload = workload_of(texts, str(folder))
    check_disjoint(workload)
    assert not workload.trains_source
    inputs = workload.example(2)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(**inputs).logits
        found = workload.source()(**inputs)
    assert torch.allclose(found, expected, atol=1e-5)
    assert workload.licence() == "apache-2.0"
    assert workload.files()["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    half = workload.skeleton({"num_hidden_layers": 1})
    assert len(half.model.model.layers) == 1


def test_identity_changes_with_what_counts(texts: Path, folder: Path, tiny: CausalLM) -> None:
    identities = {
        tiny.identity(),
        workload_of(texts, seed=1).identity(),
        workload_of(texts, length=16).identity(),
        workload_of(texts, str(folder)).identity(),
        workload_of(texts, architecture={**SIZES, "hidden_size": 16}).identity(),
    }
    assert len(identities) == 5
    assert tiny.identity() == workload_of(texts).identity()


def broken_folder(tmp_path: Path, folder: Path, **config: object) -> Path:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    document = json.loads((tmp_path / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(document))
    return tmp_path


def test_a_folder_without_its_tokenizer_is_refused(tmp_path: Path, texts: Path, folder: Path) -> None:
    (broken_folder(tmp_path, folder) / "tokenizer.json").unlink()
    with pytest.raises(WorkloadError, match=r"without tokenizer\.json"):
        workload_of(texts, str(tmp_path))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, texts: Path, folder: Path) -> None:
    with pytest.raises(WorkloadError, match=r"(?s)300 tokens.*vocab_size 200"):
        workload_of(texts, str(broken_folder(tmp_path, folder, vocab_size=200)))


def test_a_tokenizer_of_a_kind_that_nobody_knows_is_named(tmp_path: Path, texts: Path, folder: Path) -> None:
    path = broken_folder(tmp_path, folder) / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"] = {"type": "Sumerian", "vocab": {}}
    path.write_text(json.dumps(document))
    with pytest.raises(WorkloadError, match=r"tokenizer\.json(.|\n)*a fast tokenizer"):
        workload_of(texts, str(tmp_path))


def test_of_several_ends_the_first_is_taken(tmp_path: Path, texts: Path, folder: Path) -> None:
    assert workload_of(texts, str(broken_folder(tmp_path, folder, eos_token_id=[7, 0]))).end == 7
    for wrong in ([], ["</s>"], [-1]):
        with pytest.raises(WorkloadError, match="eos_token_id"):
            workload_of(texts, str(broken_folder(tmp_path, folder, eos_token_id=wrong)))


@pytest.mark.parametrize("sizes", [{"num_attention_heads": 0}, {"intermediate_size": -16}, {"num_key_value_heads": 0}])
def test_sizes_that_the_folders_model_cannot_have_are_named(
    texts: Path, folder: Path, sizes: dict[str, object]
) -> None:
    with pytest.raises(WorkloadError, match="loading the model"):
        workload_of(texts, str(folder)).skeleton(sizes)


@pytest.mark.parametrize("local", [False, True])
def test_a_folders_own_code_is_never_run(
    tmp_path: Path, texts: Path, folder: Path, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {} if local else {"model_type": "a-kind-of-its-own"}
    auto = {"AutoConfig": "own_code.Config", "AutoModelForCausalLM": "own_code.Model"}
    path = broken_folder(tmp_path, folder, auto_map=auto, **kind)
    (path / "own_code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # transformers would ask
    workload = workload_of(texts, str(path))
    for make in (workload.source, lambda: workload.skeleton({})):
        if local:
            assert type(make().model).__module__.startswith("transformers.")
        else:
            with pytest.raises(WorkloadError, match="trust_remote_code"):
                make()
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path, texts: Path, folder: Path) -> None:
    path = broken_folder(tmp_path, folder)
    (path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(WorkloadError, match="loading the model"):
        workload_of(texts, str(path)).source()


def test_blocks_longer_than_the_model_reads_are_refused(texts: Path, folder: Path) -> None:
    with pytest.raises(WorkloadError, match=r"(?s)workload\.length 65.*64"):
        workload_of(texts, str(folder), length=65)


def test_sizes_belong_to_the_tiny_decoder_alone(texts: Path, folder: Path) -> None:
    with pytest.raises(WorkloadError, match="architecture"):
        workload_of(texts, str(folder), architecture={"hidden_size": 16})


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ({"width": 3}, "unknown width"),
        ({"hidden_size": 0}, "hidden_size 0"),
        ({"hidden_size": 16.5}, r"hidden_size 16\.5"),
        ({"hidden_size": True}, "hidden_size True"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "30, 4 heads"),
        ({"vocab_size": 100}, "vocab_size 100"),
    ],
)
def test_sizes_that_cannot_be_are_named(texts: Path, sizes: dict[str, object], found: str) -> None:
    with pytest.raises(WorkloadError, match=found):
        workload_of(texts, architecture=sizes)


def test_a_student_keeps_the_vocabulary(tiny: CausalLM) -> None:
    assert tiny.skeleton({"num_hidden_layers": 1})(**tiny.example(1)).shape == (1, 32, tiny.vocab_size)
    with pytest.raises(WorkloadError, match="vocab_size 64"):
        tiny.skeleton({"vocab_size": 64})


def test_text_too_short_for_a_block_in_each_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("one\n\ntwo\n\nthree\n")
    with pytest.raises(WorkloadError, match=r"(?s)no block for.*workload\.length"):
        workload_of(tmp_path / "short.txt")
    (tmp_path / "short.txt").write_text("")
    with pytest.raises(WorkloadError, match="0 distinct texts"):
        workload_of(tmp_path / "short.txt")


def test_its_reasons_are_explained_token_by_token(tiny: CausalLM, trained: torch.nn.Module) -> None:
    (inputs,) = (batch.inputs for batch in list(tiny.batches("evaluation", 1))[:1])
    blank = tiny.blank(inputs)["input_ids"]
    assert torch.equal(blank[:, -1], inputs["input_ids"][:, -1])
    assert blank[:, :-1].unique().tolist() == [tiny.end]
    found = compare(from_module(trained), from_module(trained), tiny, EvaluateConfig(attribution_samples=2))
    assert (found.agreement, found.samples) == (pytest.approx(1.0), 2)


def test_a_perplexity_beyond_all_numbers_is_shown(tiny: CausalLM) -> None:
    assert tiny.shown(-1e9)["perplexity"] == pytest.approx(math.exp(700))
