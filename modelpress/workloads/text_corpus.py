"""Texts for language models: Python's own standard library, a folder, a .jsonl or a .txt, cut into blocks of tokens.

A text stands whole in one split. Blocks that occur twice (headers, tables, copied functions) are taken once, so that
the splits are disjoint by content as well.
"""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

from modelpress.errors import WorkloadError
from modelpress.workload import Split

SHARES: dict[Split, float] = {"evaluation": 0.1, "calibration": 0.05, "train": 0.85}
"""Of the characters; each split has one text at least."""

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings"}
"""Of the standard library: tests repeat themselves, and tables are no language."""

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_CHARACTERS = 4_000_000
"""At most so many of the training texts' characters make the tokenizer."""
ENCODED_AT_ONCE = 32


@dataclass(frozen=True)
class Text:
    """A text and where it comes from."""

    name: str
    content: str

    @property
    def digest(self) -> str:
        """sha256 (hex) of the content."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def load_texts(data: str) -> list[Text]:
    """The distinct texts of a source, empty ones left out.

    Args:
        data: `python-sources`, a folder (each file below it, hidden ones apart, is a text), a .jsonl with `text` on
            each line, or a .txt whose paragraphs are texts.

    Raises:
        WorkloadError: nothing there, a file that is no UTF-8 text, or a line without a text; it is named.
    """
    path = Path(data)
    if data == "python-sources":
        found = list(python_sources())
    elif path.is_dir():
        files = sorted(one for one in path.rglob("*") if one.is_file())
        hidden = {one for one in files if any(part.startswith(".") for part in one.relative_to(path).parts)}
        found = [Text(str(one.relative_to(path)), read_text(one)) for one in files if one not in hidden]
    elif path.suffix == ".jsonl":
        found = [Text(where, text) for where, text in _jsonl_texts(path)]
    else:
        paragraphs = re.split(r"\n\s*\n", read_text(path))
        found = [Text(f"{path}, paragraph {number}", text) for number, text in enumerate(paragraphs, start=1)]
    distinct = {text.digest: text for text in reversed(found) if text.content.strip()}
    return [text for text in found if distinct.get(text.digest) is text]


def python_sources() -> Iterator[Text]:
    """The standard library's .py files, by path; without its tests, its editor and its tables of characters."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            yield Text(str(path.relative_to(root)), read_text(path))


def read_text(path: Path) -> str:
    """A file's content.

    Raises:
        WorkloadError: there is none, or it is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(
            f"reading texts from {path}",
            found=str(error),
            expected="'python-sources', a folder of UTF-8 files, a .jsonl with `text`, or a .txt",
        ) from error


def _jsonl_texts(path: Path) -> Iterator[tuple[str, str]]:
    for where, entry in read_jsonl(path):
        text = entry.get("text")
        if not isinstance(text, str) or not text.strip():
            raise WorkloadError(f"reading {where}", found=repr(entry)[:200], expected='{"text": "…"}, not empty')
        yield where, text


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Each line's place, for errors, and its object; empty lines are left out.

    Raises:
        WorkloadError: the file cannot be read, or a line is no JSON object.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise WorkloadError(f"reading {where}", found=str(error)[:200], expected="a JSON object") from error
        if not isinstance(entry, dict):
            raise WorkloadError(f"reading {where}", found=type(entry).__name__, expected="a JSON object")
        yield where, entry


def split_texts(texts: list[Text], data: str, seed: int) -> dict[Split, list[Text]]:
    """Whole texts by `SHARES` of the characters, in an order that hangs on the seed and their content alone.

    Raises:
        WorkloadError: fewer than three texts.
    """
    if len(texts) < len(SHARES):
        raise WorkloadError(
            f"splitting the texts of {data}",
            found=f"{len(texts)} distinct texts",
            expected=f"at least {len(SHARES)}: no text may stand in two of {', '.join(SHARES)}",
            fix="cut the text into several, such as chapters or files",
        )
    order = sorted(texts, key=lambda text: hashlib.sha256(f"{seed} {text.digest}".encode()).digest())
    total = sum(len(text.content) for text in texts)
    splits: dict[Split, list[Text]] = {split: [] for split in SHARES}
    wanted = list(SHARES.items())
    filled = 0
    for position, text in enumerate(order):
        left = len(order) - position
        full = splits[wanted[0][0]] and (filled >= wanted[0][1] * total or left < len(wanted))
        if len(wanted) > 1 and full:
            wanted.pop(0)
            filled = 0
        splits[wanted[0][0]].append(text)
        filled += len(text.content)
    return splits


def train_tokenizer(texts: Iterable[Text], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) of at most `vocab_size` tokens; each text has a code.

    The same texts give the same tokenizer. Token 0 ends a text.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise WorkloadError(
            "training the tokenizer",
            found=f"vocab_size {vocab_size}",
            expected=f"more than {len(alphabet)}: each byte is a token, and one ends a text",
        )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_first_characters(texts), trainer)
    return tokenizer


def _first_characters(texts: Iterable[Text]) -> Iterator[str]:
    left = TOKENIZER_CHARACTERS
    for text in texts:
        if left <= 0:
            return
        yield text.content[:left]
        left -= len(text.content)


class Blocks:
    """Cuts splits into blocks of `length` + 1 tokens, of which the last is the next block's first.

    Args:
        tokenizer: neither pads nor truncates.
        length: tokens that a model sees at once.
        end: token that stands after each text; None for a tokenizer without one.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, length: int, end: int | None) -> None:
        self.tokenizer, self.length, self.end = tokenizer, length, end
        self._seen: set[bytes] = set()

    def cut(self, texts: list[Text], limit: int) -> np.ndarray:
        """Blocks, (count, length + 1) int32, at most `limit` (0: all), none of which this object gave before."""
        blocks: list[np.ndarray] = []
        rest = np.empty(0, dtype=np.int32)
        for start in range(0, len(texts), ENCODED_AT_ONCE):
            rest = np.concatenate([rest, *self._encode(texts[start : start + ENCODED_AT_ONCE])])
            while len(rest) > self.length and not (limit and len(blocks) >= limit):
                block, rest = rest[: self.length + 1], rest[self.length :]
                content = block[: self.length].tobytes()
                if content not in self._seen:
                    self._seen.add(content)
                    blocks.append(block)
            if limit and len(blocks) >= limit:
                break
        return np.stack(blocks) if blocks else np.empty((0, self.length + 1), dtype=np.int32)

    def _encode(self, texts: list[Text]) -> list[np.ndarray]:
        encodings = self.tokenizer.encode_batch([text.content for text in texts], add_special_tokens=False)
        after = [] if self.end is None else [self.end]
        return [np.array([*encoding.ids, *after], dtype=np.int32) for encoding in encodings]
