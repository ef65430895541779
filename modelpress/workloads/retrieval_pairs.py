"""Retrieval pairs, (query, document): from the docstrings of installed Python sources, or from a .jsonl.

A docstring's first paragraph asks; the name, the parameters and the second paragraph answer. Whoever wrote both meant
the same thing in other words, as a person who searches and the page that answers. The sources are parsed,
never imported.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import logging
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from modelpress.errors import WorkloadError

DOCSTRING_PACKAGES = ("numpy", "sklearn")
"""Besides the standard library: both are dependencies, and well documented."""

SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "_vendor"}
MIN_QUERY_WORDS, MIN_DOCUMENT_WORDS = 4, 8
MAX_QUERY_WORDS, MAX_DOCUMENT_WORDS = 24, 32
MAX_PARAMETERS = 4
NEAR_DUPLICATE_CHARACTERS = 40
"""Docstrings that begin with the same letters and digits, this many, are taken for one."""
MAX_REPEATED = 0.5
"""Share of a file's pairs that may be dropped because they repeat a text."""

log = logging.getLogger("modelpress.workloads")


@dataclass(frozen=True)
class Pair:
    """A query and the one document that answers it."""

    query: str
    document: str

    @property
    def digest(self) -> str:
        """sha256 (hex) of both texts."""
        return hashlib.sha256(f"{self.query}\n{self.document}".encode()).hexdigest()


def load_pairs(data: str) -> tuple[Pair, ...]:
    """Pairs of a source, in an order that depends on their text alone.

    Of docstrings, near duplicates are left out. Of a file, only lines of which a text stands in an earlier line, letter
    for letter, or on both sides: a text in two splits would be known before it is judged. Their number is logged.

    Args:
        data: `docstrings`, or the path of a .jsonl with `query` and `document` on each line.

    Raises:
        WorkloadError: the file cannot be read, a line is not such a pair, or more than `MAX_REPEATED` of the lines
            repeat a text.
    """
    return _docstring_pairs() if data == "docstrings" else _file_pairs(Path(data))


def _file_pairs(path: Path) -> tuple[Pair, ...]:
    found = list(_read_jsonl(path))
    kept = _ordered(found, lambda text: text)
    repeated = len(found) - len(kept)
    if repeated > MAX_REPEATED * len(found):
        raise WorkloadError(
            f"reading retrieval pairs from {path}",
            found=f"{repeated} of {len(found)} pairs with a text that stands in an earlier pair",
            expected=f"at most {MAX_REPEATED:.0%}: each query with the one document that answers it",
            fix="keep one pair per query and per document",
        )
    if repeated:
        log.warning("%s: %d pairs, %d kept; the others repeat a text of an earlier one", path, len(found), len(kept))
    return kept


@functools.cache
def _docstring_pairs() -> tuple[Pair, ...]:
    return _ordered(_harvest(), _key)


def _ordered(pairs: Iterable[Pair], key: Callable[[str], str]) -> tuple[Pair, ...]:
    """Drop pairs with a text of an earlier key, then sort by digest: a shuffle that needs no seed."""
    seen: set[str] = set()
    kept: list[Pair] = []
    for pair in pairs:
        keys = {key(pair.query), key(pair.document)}
        if len(keys) == 2 and not keys & seen:
            kept.append(pair)
            seen |= keys
    return tuple(sorted(kept, key=lambda pair: pair.digest))


def _key(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.lower())[:NEAR_DUPLICATE_CHARACTERS]


def _harvest() -> Iterator[Pair]:
    folders = [Path(sysconfig.get_path("stdlib"))]
    for name in DOCSTRING_PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise WorkloadError(
                "making retrieval pairs from docstrings", found=f"no package {name}", fix=f"install {name}"
            )
        folders.append(Path(spec.origin).parent)
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).parts
            if not any(part in SKIPPED_FOLDERS or part.startswith("test_") for part in parts):
                yield from _pairs_of(path)


def _pairs_of(path: Path) -> Iterator[Pair]:
    """Pairs of one source file; one that this Python cannot parse (a template, another version's) holds none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            pair = pair_of_docstring(ast.get_docstring(node) or "", _heading(node, path))
            if pair is not None:
                yield pair


def _heading(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, path: Path) -> str:
    """Name and parameters, as words."""
    if isinstance(node, ast.Module):
        return path.parent.name if path.stem == "__init__" else path.stem
    if isinstance(node, ast.ClassDef):
        return node.name
    arguments = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
    return f"{node.name}({', '.join(arguments[:MAX_PARAMETERS])})"


def pair_of_docstring(text: str, heading: str) -> Pair | None:
    """First paragraph as query, heading and second as document; None where either is not a sentence or two of prose."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    if len(paragraphs) < 2:
        return None
    query = _first_words(paragraphs[0], MAX_QUERY_WORDS)
    document = _first_words(paragraphs[1], MAX_DOCUMENT_WORDS)
    if not (_is_prose(query, MIN_QUERY_WORDS) and _is_prose(document, MIN_DOCUMENT_WORDS)):
        return None
    return Pair(query, f"{heading}: {document}")


def _first_words(text: str, count: int) -> str:
    return " ".join(text.split()[:count])


def _is_prose(text: str, min_words: int) -> bool:
    """Whether most tokens are words: no doctest, table, section heading, directive or signature."""
    tokens = text.split()
    words = [token for token in tokens if re.fullmatch(r"[(\"'`]*[A-Za-z][A-Za-z'’-]*[.,;:!?)\"'`]*", token)]
    marks = (">>>", "----", "====", ".. ", "::", ":param", "Copyright")
    return len(words) >= max(min_words, 0.75 * len(tokens)) and not any(mark in text for mark in marks)


def _read_jsonl(path: Path) -> Iterator[Pair]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(
            f"reading retrieval pairs from {path}", found=str(error), expected="'docstrings' or a .jsonl file"
        ) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _parse_line(line, f"{path}, line {number}")


def _parse_line(line: str, where: str) -> Pair:
    try:
        entry = json.loads(line)
        query, document = entry["query"], entry["document"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WorkloadError(
            f"reading {where}", found=f"{type(error).__name__}: {error}", expected='{"query": "…", "document": "…"}'
        ) from error
    if not (isinstance(query, str) and isinstance(document, str) and query.strip() and document.strip()):
        raise WorkloadError(f"reading {where}", found=repr(entry)[:200], expected="two texts that are not empty")
    return Pair(query, document)
