"""Bytes: what each stage takes away, which codec stores what, and bits per weight against the entropy bound."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from modelpress.manifest import Manifest, TensorEntry
from modelpress.page import words
from modelpress.page.parts import Figure, Section, Table
from modelpress.page.plots import Dot, dots, waterfall
from modelpress.page.story import Story

SHOWN = 20
"""Rows of a plot; the rest is one more."""
LISTED = 150
"""Rows of a table; the rest is one more."""
COMPARED = "source (onnx)"


def section(story: Story) -> Section | None:
    """The waterfall, the codecs, and the tensors, the largest first."""
    steps = _steps(story)
    figures = [_waterfall(steps)] if len(steps) > 1 else []
    tables, lead = [], []
    if story.manifest is not None:
        groups = grouped(story.manifest)
        figures += [figure for figure in [_bits(groups)] if figure is not None]
        tables = [_codecs(story.manifest), _tensors(story.manifest)]
        lead = [_summary(story)]
    if not figures and not tables:
        return None
    return Section(key="bytes", title="Where the bytes went", lead=lead, figures=figures, tables=tables)


def _steps(story: Story) -> list[tuple[str, float]]:
    """Bytes after each stage that has an output of its own, the published pack last."""
    found: list[tuple[str, float]] = []
    if story.run is not None:
        found = [
            (stage.stage, float(stage.size_bytes))
            for stage in story.stages
            if stage.size_bytes and stage.stage not in (COMPARED, "shard", "upload")
        ]
    elif story.source_bytes:
        found = [("source", story.source_bytes)]
    if story.manifest is not None:
        if story.run is None:
            found.append(("tensors and files", float(story.manifest.raw_bytes)))
        found.append(("published", float(story.manifest.published_bytes)))
    return found


def _waterfall(steps: Sequence[tuple[str, float]]) -> Figure:
    first = steps[0][1]
    rows = []
    before = first
    for name, value in steps:
        rows.append([name, words.exact_bytes(value), f"{value - before:+,.0f}", f"{value / first:.1%}"])
        before = value
    alt = f"From {words.size(first)} to {words.size(steps[-1][1])}: " + ", ".join(
        f"{name} {words.size(value)}" for name, value in steps
    )
    return Figure(
        key="bytes-waterfall",
        caption="What each stage takes away (or adds), from the source model's checkpoint to what is published",
        svg=waterfall("bytes-waterfall", alt, steps, words.size),
        table=Table(
            "Bytes after each stage", ["stage", "bytes", "change", "of the source"], rows, numbers=frozenset({1, 2, 3})
        ),
    )


@dataclass(frozen=True)
class Group:
    """Tensors that are shown together."""

    name: str
    tensors: int
    weights: int
    raw: int
    stored: int
    bound: int

    @classmethod
    def of(cls, name: str, tensors: Sequence[TensorEntry]) -> Group:
        """Their sums."""
        return cls(
            name,
            len(tensors),
            sum(prod(tensor.shape) for tensor in tensors),
            sum(tensor.raw_bytes for tensor in tensors),
            sum(tensor.stored_bytes for tensor in tensors),
            sum(tensor.entropy_bound_bytes for tensor in tensors),
        )


def grouped(manifest: Manifest, most: int = SHOWN) -> list[Group]:
    """At most so many tensors, or layers where there are more tensors, and one more for the rest; the largest first."""
    by_name: dict[str, list[TensorEntry]] = defaultdict(list)
    alone = len(manifest.tensors) <= most
    for tensor in manifest.tensors:
        by_name[tensor.name if alone else words.layer_of(tensor.name)].append(tensor)
    found = [Group.of(name, tensors) for name, tensors in by_name.items()]
    found.sort(key=lambda group: (-group.stored, group.name))
    rest = found[most:]
    return found[:most] + ([_folded(rest)] if rest else [])


def _folded(rest: Sequence[Group]) -> Group:
    sums = [sum(getattr(group, name) for group in rest) for name in ("tensors", "weights", "raw", "stored", "bound")]
    return Group(f"{len(rest):,} smaller ones", *sums)


def _bits(groups: Sequence[Group]) -> Figure | None:
    shown = [group for group in groups if group.weights]
    if not shown:
        return None
    names = _unique(group.name for group in shown)
    series = {
        "stored": [Dot(name, 8 * group.stored / group.weights) for name, group in zip(names, shown, strict=True)],
        "entropy bound": [Dot(name, 8 * group.bound / group.weights) for name, group in zip(names, shown, strict=True)],
    }
    rows = [
        [group.name, f"{group.tensors:,}", f"{group.raw:,}", f"{group.stored:,}", *_per_weight(group)]
        for group in shown
    ]
    heads = ["tensor or layer", "tensors", "raw bytes", "stored bytes", "bits per weight", "entropy bound"]
    return Figure(
        key="bytes-bits",
        caption="Bits per weight as stored, beside the order-0 entropy bound of the byte planes; what takes most first",
        svg=dots("bytes-bits", "Bits per weight and entropy bound by layer", names, series, unit="bits per weight"),
        table=Table("Bits per weight", heads, rows, numbers=frozenset(range(1, 6))),
    )


def _per_weight(group: Group) -> tuple[str, str]:
    return words.bits(group.stored, group.weights), words.bits(group.bound, group.weights)


def _unique(names: Iterable[str]) -> list[str]:
    """The names, with a number where one stands twice."""
    seen: dict[str, int] = defaultdict(int)
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def _summary(story: Story) -> str:
    manifest = story.manifest
    assert manifest is not None
    stored = sum(tensor.stored_bytes for tensor in manifest.tensors)
    bound = sum(tensor.entropy_bound_bytes for tensor in manifest.tensors)
    weights = sum(prod(tensor.shape) for tensor in manifest.tensors)
    text = f"{len(manifest.tensors):,} tensors with {weights:,} weights are stored in {stored:,} bytes"
    if weights:
        text += f": {words.bits(stored, weights)} bits per weight, where the bound is {words.bits(bound, weights)}"
    files = sum(file.stored_bytes for file in manifest.files)
    text += (
        f". {len(manifest.files):,} files take {files:,} bytes more, and the pack {manifest.published_bytes:,} in all."
    )
    if manifest.base is not None:
        text += f" It is stored as the difference to pack {manifest.base}, which a reader needs as well."
    return text


def _codecs(manifest: Manifest) -> Table:
    by_codec: dict[str, list[TensorEntry]] = defaultdict(list)
    for tensor in manifest.tensors:
        by_codec["equal to the base's" if tensor.is_base else tensor.codec].append(tensor)
    groups = sorted((Group.of(codec, found) for codec, found in by_codec.items()), key=lambda one: -one.stored)
    rows = [
        [one.name, f"{one.tensors:,}", f"{one.raw:,}", f"{one.stored:,}", words.ratio(one.raw, one.stored)]
        for one in groups
    ]
    heads = ["codec", "tensors", "raw bytes", "stored bytes", "ratio"]
    return Table("Codecs that won, each for its tensors", heads, rows, numbers=frozenset(range(1, 5)))


def _tensors(manifest: Manifest) -> Table:
    largest = sorted(manifest.tensors, key=lambda tensor: (-tensor.stored_bytes, tensor.name))
    rows = [
        [
            words.cut(tensor.name, 160),
            f"{tensor.dtype} {words.shape(tensor.shape)}",
            "the base's" if tensor.is_base else tensor.codec,
            *_numbers(Group.of(tensor.name, [tensor])),
        ]
        for tensor in largest[:LISTED]
    ]
    if rest := largest[LISTED:]:
        folded = Group.of("rest", rest)
        rows.append([f"{len(rest):,} smaller ones", "", "", *_numbers(folded)])
    heads = ["tensor", "form", "codec", "raw bytes", "stored bytes", "bits per weight", "entropy bound"]
    caption = f"Tensors, the largest {LISTED} of {len(largest):,}" if rest else f"All {len(largest):,} tensors"
    return Table(caption, heads, rows, numbers=frozenset(range(3, 7)), folded=True)


def _numbers(group: Group) -> list[str]:
    return [f"{group.raw:,}", f"{group.stored:,}", *_per_weight(group)]
