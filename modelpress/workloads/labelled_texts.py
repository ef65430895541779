"""Texts with a label each: functions of Python's standard library by their package, or a .jsonl."""

from __future__ import annotations

import ast
import hashlib
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from modelpress.errors import WorkloadError
from modelpress.workload import Split
from modelpress.workloads.encoder_folder import input_digests
from modelpress.workloads.text_corpus import python_sources, read_jsonl

PACKAGES = ("asyncio", "ctypes", "email", "http", "importlib", "multiprocessing", "tkinter", "unittest", "xml")
"""Large enough, and about different things."""

MOST_PER_LABEL = 300
LEAST_CHARACTERS, MOST_CHARACTERS = 80, 600

SHARES: dict[Split, float] = {"evaluation": 0.4, "calibration": 0.1, "train": 0.5}


@dataclass(frozen=True)
class Labelled:
    """A text and its class: a name, or the number that the file gave."""

    text: str
    label: str | int

    @property
    def digest(self) -> str:
        """sha256 (hex) of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_labelled(data: str) -> list[Labelled]:
    """The distinct texts of a source, in an order that hangs on their content alone.

    Args:
        data: `python-modules`, or the path of a .jsonl with `text` and `label` (a name, or a number from 0 up).

    Raises:
        WorkloadError: the file cannot be read or is empty, a line has no text or no label, one text has two labels,
            labels are both names and numbers, or there is one class alone.
    """
    found = list(_functions() if data == "python-modules" else _read(Path(data)))
    by_digest: dict[str, Labelled] = {}
    for one in found:
        other = by_digest.setdefault(one.digest, one)
        if other.label != one.label and data != "python-modules":
            raise WorkloadError(
                f"reading labelled texts from {data}",
                found=f"{one.text[:80]!r} labelled both {other.label!r} and {one.label!r}",
                expected="one label for each text",
            )
    classes = {one.label for one in by_digest.values()}
    if len(classes) < 2 or len({type(label) for label in classes}) > 1:
        raise WorkloadError(
            f"reading labelled texts from {data}",
            found=f"labels {sorted(map(repr, classes))[:5]} on {len(by_digest)} distinct texts",
            expected="at least two classes, all by name or all by number",
        )
    return _balanced(by_digest) if data == "python-modules" else [by_digest[key] for key in sorted(by_digest)]


def distinct_inputs(texts: list[Labelled], tokenizer: tokenizers.Tokenizer, data: str) -> list[Labelled]:
    """The first of the texts that are the same to a model: which differ in case, spaces or the part that is cut.

    Args:
        texts: what `load_labelled` gave.
        tokenizer: truncates as it will for the model.
        data: the texts' source; of `python-modules` the first label counts.

    Raises:
        WorkloadError: the model sees the same of two texts with different labels.
    """
    first: dict[str, Labelled] = {}
    for one, digest in zip(texts, input_digests(tokenizer, [one.text for one in texts]), strict=True):
        other = first.setdefault(digest, one)
        if other.label != one.label and data != "python-modules":
            raise WorkloadError(
                f"reading labelled texts from {data}",
                found=f"{other.text[:80]!r} labelled {other.label!r} and {one.text[:80]!r} labelled {one.label!r}, "
                "which are the same tokens",
                expected="one label for each sequence of tokens that the model sees",
                fix="remove one of them; or raise workload.length, if the texts differ only in their ends",
            )
    return list(first.values())


def split_labelled(texts: list[Labelled], data: str, seed: int) -> dict[Split, list[Labelled]]:
    """By `SHARES`, in an order that hangs on the seed and the texts alone.

    Raises:
        WorkloadError: too few texts.
    """
    order = sorted(texts, key=lambda one: hashlib.sha256(f"{seed} {one.digest}".encode()).digest())
    splits: dict[Split, list[Labelled]] = {}
    start = 0.0
    for split, share in SHARES.items():
        splits[split] = order[round(start * len(order)) : round((start + share) * len(order))]
        start += share
    if not all(splits.values()):
        raise WorkloadError(
            f"splitting the labelled texts of {data}",
            found=f"{len(texts)} distinct texts",
            expected="some for each split: two fifths for evaluation, a tenth for calibration, half for training",
            fix="bring more texts",
        )
    return splits


def _functions() -> Iterator[Labelled]:
    """Sources of functions and methods, from their first lines; where one stands is told by its package alone."""
    for source in python_sources():
        package = Path(source.name).parts[0]
        if package not in PACKAGES:
            continue
        for node in ast.walk(ast.parse(source.content)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = source.content.splitlines()[node.lineno - 1 : node.end_lineno]
                text = textwrap.dedent("\n".join(lines))[:MOST_CHARACTERS]
                if len(text) >= LEAST_CHARACTERS:
                    yield Labelled(text, package)


def _balanced(by_digest: dict[str, Labelled]) -> list[Labelled]:
    taken: Counter[str | int] = Counter()
    kept = []
    for digest in sorted(by_digest):
        one = by_digest[digest]
        if taken[one.label] < MOST_PER_LABEL:
            taken[one.label] += 1
            kept.append(one)
    return kept


def _read(path: Path) -> Iterator[Labelled]:
    for where, entry in read_jsonl(path):
        text, label = entry.get("text"), entry.get("label")
        named = isinstance(label, str) and label.strip() != ""
        numbered = isinstance(label, int) and not isinstance(label, bool) and label >= 0
        if not isinstance(text, str) or not text.strip() or not (named or numbered):
            raise WorkloadError(
                f"reading {where}",
                found=repr(entry)[:200],
                expected='{"text": "…", "label": …}: a text that is not empty, a name or a whole number from 0 up',
            )
        assert isinstance(label, str | int)
        yield Labelled(text, label)
