"""Texts: where they come from, that no split shares one, and that what cannot be read is named."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress.errors import WorkloadError
from modelpress.workloads.retrieval_pairs import load_pairs
from modelpress.workloads.text_corpus import (
    END_OF_TEXT,
    SHARES,
    Blocks,
    Text,
    load_texts,
    python_sources,
    split_texts,
    train_tokenizer,
)
from tests.decoders import make_text_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_folder(tmp_path_factory.mktemp("texts"))


def test_pythons_own_sources_are_a_real_corpus() -> None:
    texts = load_texts("python-sources")
    assert len(texts) > 300
    assert sum(len(text.content) for text in texts) > 5_000_000
    assert "argparse.py" in {text.name for text in texts}
    assert not any("test" in Path(text.name).parts for text in texts)
    assert len(list(python_sources())) > len(texts)  # empty __init__ files


def test_only_line_feeds_end_a_line_of_json(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\u2029four"
    line = json.dumps({"text": text, "query": "q\u2028", "document": "d\x85"}, ensure_ascii=False)
    (tmp_path / "one.jsonl").write_bytes(f"{line}\r\n\n{line}".encode())
    assert [one.content for one in load_texts(str(tmp_path / "one.jsonl"))] == [text]
    assert {(one.query, one.document) for one in load_pairs(str(tmp_path / "one.jsonl"))} == {("q\u2028", "d\x85")}


def test_each_kind_of_source_gives_its_texts(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "first", "id": 1}\n\n{"text": "second"}\n{"text": "first"}\n')
    (tmp_path / "two.txt").write_text("a line\nand its next\n\n\nanother paragraph\n")
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / ".hidden").write_bytes(b"\xff")
    (folder / "a.md").write_text("a")
    (folder / "below" / "b.txt").write_text("b")
    (folder / "empty.txt").write_text(" \n")
    assert [text.content for text in load_texts(str(tmp_path / "one.jsonl"))] == ["first", "second"]
    assert [text.content for text in load_texts(str(tmp_path / "two.txt"))] == [
        "a line\nand its next",
        "another paragraph\n",
    ]
    assert [text.name for text in load_texts(str(folder))] == ["a.md", "below/b.txt"]


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": 3}', r"bad\.jsonl, line 2"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": " "}', r"line 2"),
        ("bad.jsonl", b'{"text": "a"}\n[1]', r"(?s)line 2.*list"),
        ("bad.jsonl", b'{"text": "a"', r"line 1"),
        ("bad.txt", b"\xff\xfe\x00", r"(?s)bad\.txt.*utf-8"),
        ("folder/bad.txt", b"\xff\xfe\x00", r"(?s)bad\.txt.*utf-8"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WorkloadError, match=found):
        load_texts(str(tmp_path / name.partition("/")[0]))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(WorkloadError, match="nowhere"):
        load_texts("/nowhere/texts.txt")


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(1, 500), min_size=3, max_size=40), seed=st.integers(0, 5))
def test_a_text_stands_in_one_split_and_each_split_has_one(sizes: list[int], seed: int) -> None:
    texts = [Text(str(index), f"{index}:" + "x" * size) for index, size in enumerate(sizes)]
    splits = split_texts(texts, "data", seed)
    assert sorted(text.name for part in splits.values() for text in part) == sorted(text.name for text in texts)
    assert all(splits.values())
    assert splits == split_texts(list(reversed(texts)), "data", seed)


def test_shares_are_of_the_characters(folder: Path) -> None:
    texts = load_texts("python-sources")
    splits = split_texts(texts, "data", 0)
    total = sum(len(text.content) for text in texts)
    for split, share in SHARES.items():
        assert sum(len(text.content) for text in splits[split]) / total == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_texts_are_refused(count: int) -> None:
    with pytest.raises(WorkloadError, match=f"{count} distinct texts"):
        split_texts([Text("", str(index)) for index in range(count)], "data", 0)


def test_the_tokenizer_is_lossless_on_any_text(folder: Path) -> None:
    tokenizer = train_tokenizer(load_texts(str(folder)), 400)
    assert tokenizer.get_vocab_size() == 400
    assert tokenizer.id_to_token(0) == END_OF_TEXT
    for text in ("def f(x):\n\treturn x  # naïve ☃\x00", "日本語 \r\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_tokenizer_is_the_same_in_another_process(folder: Path) -> None:
    code = (
        "import sys, hashlib; from modelpress.workloads.text_corpus import load_texts, train_tokenizer\n"
        "print(hashlib.sha256(train_tokenizer(load_texts(sys.argv[1]), 600).to_str().encode()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT, env=os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1"},
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert other == hashlib.sha256(train_tokenizer(load_texts(str(folder)), 600).to_str().encode()).hexdigest()


def test_a_vocabulary_smaller_than_the_bytes_is_refused(folder: Path) -> None:
    with pytest.raises(WorkloadError, match="more than 256"):
        train_tokenizer([], 256)


def test_blocks_are_the_tokens_in_their_order_with_one_token_shared(folder: Path) -> None:
    texts = load_texts(str(folder))
    tokenizer = train_tokenizer(texts, 400)
    blocks = Blocks(tokenizer, 16, 0).cut(texts, 0)
    stream = [token for text in texts for token in [*tokenizer.encode(text.content).ids, 0]]
    assert blocks.shape[1] == 17
    assert blocks[0].tolist() == stream[:17]
    assert blocks[1].tolist() == stream[16:33]
    limited = Blocks(tokenizer, 16, 0).cut(texts, 5)
    np.testing.assert_array_equal(limited, blocks[:5])


def test_a_block_is_given_once(folder: Path) -> None:
    tokenizer = train_tokenizer(load_texts(str(folder)), 300)
    same = [Text("a", "x = 1\n" * 200), Text("b", "x = 1\n" * 200)]
    cutter = Blocks(tokenizer, 12, None)
    first, second = cutter.cut(same[:1], 0), cutter.cut(same[1:], 0)
    contents = [row[:12].tobytes() for row in np.concatenate([first, second])]
    assert len(first) > 0
    assert len(set(contents)) == len(contents)


def test_a_file_of_lines_keeps_every_line(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {index}"}) for index in range(50)))
    assert len(load_texts(str(path))) == 50
