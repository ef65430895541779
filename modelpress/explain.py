"""Why each tensor of a pack is stored as it is: sizes against the bound, and what the other codecs would have taken."""

from __future__ import annotations

import difflib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from pydantic import ValidationError

from modelpress.container.read import Original, decode_tensor, pieces_of
from modelpress.errors import ConfigError, CorruptionError
from modelpress.manifest import Manifest, TensorEntry
from modelpress.pack_files import read_reports
from modelpress.reports import CodedTensor

Fetch = Callable[[str], bytes]
RUNS = 3
"""Times that a tensor is decoded; the fastest counts, for the first may compile."""


def read_choices(manifest: Manifest, fetch: Fetch) -> dict[str, CodedTensor]:
    """How each tensor's codec was chosen, by name, as the run that made the pack reported it; empty if it did not.

    Raises:
        CorruptionError: reports that are not those of a compress stage.
    """
    rows = read_reports(manifest, fetch).get("compress", {}).get("tensors", [])
    known = CodedTensor.model_fields
    try:
        # What a later release may add to a row is left out: reports are for people.
        found = [CodedTensor.model_validate({key: row[key] for key in row if key in known}) for row in rows]
    except (ValidationError, TypeError) as error:
        raise CorruptionError("reading how codecs were chosen", found=str(error)[:200]) from error
    return {row.name: row for row in found}


def find_tensor(manifest: Manifest, name: str) -> TensorEntry:
    """The entry of a tensor.

    Raises:
        ConfigError: the pack has none of this name; the nearest are named.
    """
    names = [tensor.name for tensor in manifest.tensors]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
        raise ConfigError(
            f"looking for tensor {name!r} in pack {manifest.name}",
            found=f"{len(names)} tensors, none of this name",
            expected=f"one of them, such as {', '.join(near) or 'none'}",
        )
    return manifest.tensors[names.index(name)]


def table(manifest: Manifest, choices: dict[str, CodedTensor]) -> list[dict[str, str]]:
    """One row per tensor, and the totals."""
    rows = [
        {
            "tensor": tensor.name,
            "dtype": tensor.dtype,
            "shape": _shape(tensor.shape),
            "codec": ("equal" if tensor.is_base else f"{tensor.codec}, difference") if tensor.base else tensor.codec,
            **_sizes([tensor]),
            "next best": _next_best(choices.get(tensor.name)),
        }
        for tensor in manifest.tensors
    ]
    total = {"tensor": f"total of {len(rows)}", "dtype": "", "shape": "", "codec": ""}
    return [*rows, total | {**_sizes(manifest.tensors), "next best": ""}]


def codec_counts(manifest: Manifest) -> str:
    """How many tensors each codec won."""
    counted = Counter(
        "equal to the base's" if tensor.is_base else tensor.codec for tensor in manifest.tensors
    ).most_common()
    return "codecs: " + (", ".join(f"{count} {codec}" for codec, count in counted) or "none")


def describe(
    manifest: Manifest, entry: TensorEntry, choice: CodedTensor | None, fetch: Fetch, original: Original | None = None
) -> dict[str, Any]:
    """One tensor in full, decoded and verified here, by one thread; `original` reads the pack's base.

    Raises:
        CorruptionError: a shard or the tensor is not what the manifest says.
    """
    pieces = pieces_of(manifest, entry.name, fetch)
    taken = []
    for _ in range(RUNS):
        started = time.perf_counter()
        decode_tensor(entry, pieces, original=original)
        taken.append(time.perf_counter() - started)
    streams = [
        {
            "stream": parts[0].name,
            "coder": " and ".join(sorted({part.coder for part in parts})),
            "stored_bytes": sum(part.size_bytes for part in parts),
        }
        for parts in zip(*(piece.streams for piece in pieces), strict=True)
    ]
    return {
        "tensor": entry.name,
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "codec": entry.codec,
        "base": f"{entry.base} of {manifest.base}" if entry.base is not None else None,
        "chunk_symbols": pieces[0].chunk_symbols if pieces else None,
        "shards": [manifest.shards[position].sha256 for position in entry.shards],
        "raw_bytes": entry.raw_bytes,
        "stored_bytes": entry.stored_bytes,
        "entropy_bound_bytes": entry.entropy_bound_bytes,
        "streams": streams,
        "decode_seconds": min(taken),
        "candidates": _costs(choice, entry),
        "too_slow": choice.too_slow if choice else [],
        "not_tried": choice.not_tried if choice else [],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """What `describe` gives, for people."""
    weights, seconds = prod(found["shape"]), found["decode_seconds"]
    speed = f", {found['raw_bytes'] / seconds / 1e6:,.0f} MB/s" if seconds else ""
    bound = f"entropy bound {found['entropy_bound_bytes']:,} bytes, {_bits(found['entropy_bound_bytes'], weights)}"
    return [
        f"{found['tensor']}: {found['dtype']} {_shape(found['shape'])}, codec {found['codec']}",
        f"  {found['raw_bytes']:,} → {found['stored_bytes']:,} bytes, {_bits(found['stored_bytes'], weights)} bits per "
        f"weight ({bound})",
        *([f"  difference to {found['base']}" if found["streams"] else f"  {found['base']}"] if found["base"] else []),
        *(
            [f"  chunks of {found['chunk_symbols']:,} symbols in {len(found['shards'])} shard(s)"]
            if found["shards"]
            else []
        ),
        *(f"  stream {row['stream']}: {row['coder']}, {row['stored_bytes']:,} bytes" for row in found["streams"]),
        f"  every digest holds; decoded and checked here by one thread in {seconds:.6f} s{speed}",
        *why(found),
    ]


def why(found: dict[str, Any]) -> list[str]:
    """The contest in words: every candidate with its bytes in the shard, and who was not let in."""
    costs: dict[str, int] = found["candidates"]
    if found["base"] and not found["streams"]:
        return ["  why: it is the base's tensor bit by bit, so that nothing is stored"]
    if not costs:
        return ["  why: the pack's reports do not say; it was stored without compression or by an earlier release"]
    won = costs.get(found["codec"], found["stored_bytes"])
    said = ["  why: bytes in the shard, description included"]
    for codec, cost in costs.items():
        if codec == found["codec"]:
            said.append(f"    {codec} {cost:,}: chosen")
        elif cost < won:
            said.append(f"    {codec} {cost:,}: smaller than readers believe of {found['raw_bytes']:,} raw bytes")
        else:
            said.append(f"    {codec} {cost:,}: {cost - won:,} more")
    said += [
        f"    {codec}: decodes more slowly than compress.min_decode_bytes_per_second" for codec in found["too_slow"]
    ]
    said += [f"    {codec}: not tried, a look at the values promised nothing" for codec in found["not_tried"]]
    return said


def _costs(choice: CodedTensor | None, entry: TensorEntry) -> dict[str, int]:
    """Bytes by codec, rising: of the tensor, or of its difference with the tensor's own best beside."""
    if choice is None or entry.is_base:
        return {}
    costs = dict(choice.candidates)
    if entry.base is not None:
        best = min(costs, key=costs.__getitem__)
        costs = {**choice.differences, f"{best}, whole": costs[best]}
    return dict(sorted(costs.items(), key=lambda item: item[1]))


def _next_best(choice: CodedTensor | None) -> str:
    """The nearest loser, by what it would have cost more."""
    if choice is None or choice.codec not in choice.candidates or choice.base is not None:
        return "–"
    won = choice.candidates[choice.codec]
    others = sorted((cost, codec) for codec, cost in choice.candidates.items() if codec != choice.codec and cost >= won)
    if not others:
        return "–"
    cost, codec = others[0]
    return f"{codec} +{(cost - won) / max(won, 1):.1%}"


def _sizes(tensors: Sequence[TensorEntry]) -> dict[str, str]:
    raw, stored = sum(tensor.raw_bytes for tensor in tensors), sum(tensor.stored_bytes for tensor in tensors)
    weights = sum(prod(tensor.shape) for tensor in tensors)
    return {
        "raw bytes": f"{raw:,}",
        "stored bytes": f"{stored:,}",
        "bits/weight": _bits(stored, weights),
        "entropy bound": _bits(sum(tensor.entropy_bound_bytes for tensor in tensors), weights),
    }


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _bits(size_bytes: int, weights: int) -> str:
    return f"{8 * size_bytes / weights:.3f}" if weights else "–"
