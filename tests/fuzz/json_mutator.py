"""Mutations of the JSON before an input's mark: bytes flipped at random seldom leave a document that says anything."""

from __future__ import annotations

import json
import random
from typing import Any

NUMBERS = (0, 1, 2, 3, 6, 255, 256, 4096, 2**16, 2**24, 2**24 + 1, 2**31, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63)


def mutate(data: bytes, mark: bytes, words: list[str], source: random.Random) -> bytes:
    """Change one to three places of the document; `data` as it is where it holds none."""
    text, found, body = data.partition(mark)
    try:
        document = json.loads(text)
        inner = document.get("__metadata__", {}).get("modelpress")
        described = json.loads(inner) if inner else None
    except (ValueError, AttributeError, TypeError, RecursionError):
        return data
    for _ in range(source.randint(1, 3)):
        chosen = described if described is not None and source.random() < 0.7 else document
        _change(chosen, words, source)
    if described is not None and isinstance(document.get("__metadata__"), dict):
        document["__metadata__"]["modelpress"] = json.dumps(described, separators=(",", ":"))
    return json.dumps(document, separators=(",", ":")).encode("utf-8", "surrogatepass") + found + body


def _change(document: Any, words: list[str], source: random.Random) -> None:
    """Walk down to a random place and change it."""
    place = document
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = source.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and source.random() < 0.85:
            place = place[key]
            continue
        _change_at(place, key, words, source)
        return


def _change_at(place: Any, key: Any, words: list[str], source: random.Random) -> None:
    choice = source.random()
    if choice < 0.1:
        del place[key]
    elif choice < 0.2:
        other = source.choice([*words, str(key)])
        if isinstance(place, dict):
            place[other] = place[key]
        else:
            place.insert(source.randint(0, len(place)), place[key])
    elif choice < 0.25:
        place[key] = source.choice([None, True, [], {}, "", -1, 0.5, "\ud800"])
    elif isinstance(place[key], int):
        place[key] = source.choice([*NUMBERS, place[key] + 1, max(place[key] - 1, 0), 2 * place[key], place[key] // 2])
    elif isinstance(place[key], str):
        place[key] = source.choice(words)
    elif isinstance(place[key], list):
        source.shuffle(place[key])
