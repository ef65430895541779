"""The tree of errors is the one that is drawn, and a message holds all its parts."""

from __future__ import annotations

import re

import pytest

from modelpress import errors

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


def drawn_tree() -> dict[str, str]:
    """Child → parent, read from the picture in the module's docstring."""
    parents: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^(    [│├└─ ]*)(\w+Error)\b", line)
        if not found:
            continue
        depth, name = len(found[1]), found[2]
        while stack and stack[-1][0] >= depth:
            stack.pop()
        if stack:
            parents[name] = stack[-1][1]
        stack.append((depth, name))
    return parents


def test_drawn_tree_is_the_tree() -> None:
    actual = {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES if cls is not errors.ModelpressError}
    assert drawn_tree() == actual


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_exit_code_is_never_success(cls: type[errors.ModelpressError]) -> None:
    assert 0 < cls.exit_code < 128


def test_message_has_all_parts() -> None:
    error = errors.CorruptionError("reading shard ab12", found="3 bytes", expected="8 bytes", fix="publish it again")
    assert str(error).splitlines() == [
        "reading shard ab12",
        "  found: 3 bytes",
        "  expected: 8 bytes",
        "  fix: publish it again",
    ]
