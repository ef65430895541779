"""Quality group by group, where the workload names groups of its samples: a mean may hide who lost."""

from __future__ import annotations

from dataclasses import dataclass

from modelpress import intervals
from modelpress.intervals import Interval
from modelpress.page.parts import Figure, Section, listed
from modelpress.page.plots import Dot, dots
from modelpress.page.story import Story

MOST = 60
"""Groups that are looked at, the largest: an interval of scores other than 0 and 1 takes thousands of means."""
SHOWN = 20
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Slice:
    """One group of the evaluation samples."""

    name: str
    samples: int
    quality: Interval
    source: float
    difference: Interval


def section(story: Story) -> Section | None:
    """Each group's quality beside the source model's on the same samples, from the scores in the pack."""
    found = _slices(story)
    if not found:
        return None
    figure = _figure(story.metric, found[:SHOWN])
    return Section(
        key="slices",
        title="Group by group",
        lead=[
            f"The workload names groups of its samples. Intervals ({CONFIDENCE:.0%}) are of each group alone; "
            "differences are paired, sample by sample, with the source model. What may have lost most stands first.",
        ],
        figures=[figure],
    )


def _slices(story: Story) -> list[Slice]:
    """The groups that have samples, by how much they may have lost."""
    candidate, source = story.scored.get("candidate"), story.scored.get("source")
    if candidate is None or source is None or candidate.scores is None or source.scores is None:
        return []
    if candidate.samples != source.samples:
        return []
    groups = sorted(candidate.slices.items(), key=lambda one: (-int(one[1].sum()), one[0]))[:MOST]
    found = [
        Slice(
            name,
            int(mask.sum()),
            intervals.mean(candidate.scores[mask], CONFIDENCE),
            float(source.scores[mask].mean()),
            intervals.paired_difference(candidate.scores[mask], source.scores[mask], CONFIDENCE),
        )
        for name, mask in groups
        if mask.any()
    ]
    return sorted(found, key=lambda one: (one.difference.low, one.name))


def _figure(metric: str, found: list[Slice]) -> Figure:
    rows = [
        [
            one.name,
            f"{one.samples:,}",
            f"{one.quality.value:.4f} [{one.quality.low:.4f}, {one.quality.high:.4f}]",
            f"{one.source:.4f}",
            f"{one.difference.value:+.4f} [{one.difference.low:+.4f}, {one.difference.high:+.4f}]",
        ]
        for one in found
    ]
    heads = ["group", "samples", metric, "source model", "against the source"]
    key = "slices-quality"
    return Figure(
        key=key,
        caption=f"{metric} of each group, with intervals, beside the source model's",
        svg=dots(
            key,
            f"{metric} by group: " + "; ".join(f"{row[0]} {row[2]}" for row in rows[:8]),
            [one.name for one in found],
            {
                "this model": [Dot(one.name, one.quality.value, one.quality.low, one.quality.high) for one in found],
                "source model": [Dot(one.name, one.source) for one in found],
            },
            unit=metric,
        ),
        table=listed("Quality by group", heads, rows, MOST, frozenset({1, 2, 3, 4})),
    )
