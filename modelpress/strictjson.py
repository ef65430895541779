"""JSON from untrusted bytes: objects only, no duplicate keys, no NaN, no unbounded nesting or numbers."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from modelpress.errors import CorruptionError

MAX_NUMBER_DIGITS = 40


def loads(data: bytes, doing: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CorruptionError: no such thing; the message begins with `doing`.
    """
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_int=_integer,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise CorruptionError(doing, found=str(error)[:200], expected="strict JSON") from error
    if not isinstance(document, dict):
        raise CorruptionError(doing, found=type(document).__name__, expected="a JSON object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"key {twice[:80]!r} stands {counts[twice]} times")
    return document


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_NUMBER_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is beyond the largest number")
    return value
