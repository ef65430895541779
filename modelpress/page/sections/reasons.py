"""Whether the model answers for the same reasons as the source model: agreement by stage, and single samples."""

from __future__ import annotations

from collections.abc import Sequence

from modelpress.page.parts import Figure, Section, Table
from modelpress.page.plots import Dot, dots, grids
from modelpress.page.story import Story
from modelpress.reports import AttributionExample, AttributionReport

METHODS = {
    "integrated-gradients": "Modules are explained by integrated gradients (Sundararajan et al. 2017).",
    "occlusion": "Graphs are explained by occlusion: how much the answer falls when one part is taken away (Zeiler and "
    "Fergus 2014).",
}
PARTS = 12
"""Parts of a flat sample that are drawn, the weightiest."""
MOST_FIELDS = 4096
"""Of a grid that is drawn: each is a box in the page."""


def section(story: Story) -> Section | None:
    """Agreement of attributions after each stage, with the samples that are kept."""
    judged = [
        (stage.stage, stage.evaluation.attribution)
        for stage in story.stages
        if stage.evaluation is not None and stage.evaluation.attribution is not None
    ]
    if not judged:
        return None
    last = judged[-1][1]
    methods = " ".join(METHODS[method] for method in dict.fromkeys(found.method for _, found in judged))
    lead = [
        "Of each sample, Spearman's rank correlation between what the source model looks at and what this one does: 1 "
        f"is the same order, 0 none. {methods}",
    ]
    return Section(
        key="reasons",
        title="Same answers, same reasons?",
        lead=lead,
        figures=[_agreement(judged), *_examples(judged[-1][0], last)],
    )


def _agreement(judged: Sequence[tuple[str, AttributionReport]]) -> Figure:
    found = [Dot(stage, one.agreement, one.low, one.high) for stage, one in judged]
    rows = [
        [stage, f"{one.agreement:.3f}", f"{one.low:.3f} to {one.high:.3f}", f"{one.samples:,}", one.method]
        for stage, one in judged
    ]
    heads = ["stage", "agreement", f"{judged[0][1].confidence:.0%} interval", "samples", "by"]
    alt = "Agreement of attributions: " + ", ".join(f"{row[0]} {row[1]}" for row in rows)
    return Figure(
        key="reasons-agreement",
        caption="Agreement of the reasons after each stage, with its interval",
        svg=dots(
            "reasons-agreement", alt, [stage for stage, _ in judged], {"agreement": found}, unit="rank correlation"
        ),
        table=Table("Agreement of the reasons", heads, rows, numbers=frozenset({1, 2, 3})),
    )


def _examples(stage: str, found: AttributionReport) -> list[Figure]:
    return [
        _image(stage, number, one, *grid) if (grid := _size(one)) is not None else _flat(stage, number, one)
        for number, one in enumerate(found.examples)
        if one.before
    ]


def _size(one: AttributionExample) -> tuple[int, int] | None:
    """Rows and columns of the grid; None where there is none, or a record claims one that nobody measures."""
    rows, columns = one.rows or 0, one.columns or 0
    return (rows, columns) if rows > 0 and 0 < columns <= MOST_FIELDS // rows else None


def _caption(stage: str, one: AttributionExample) -> str:
    return f"Evaluation sample {one.sample}: agreement {one.agreement:.2f} between the source model and {stage}"


def _image(stage: str, number: int, one: AttributionExample, rows: int, columns: int) -> Figure:
    key = f"reasons-example-{number}"
    pair = [("source model", _grid(one.before, one, rows, columns)), (stage, _grid(one.after, one, rows, columns))]
    return Figure(
        key=key,
        caption=f"{_caption(stage, one)}. The stronger a field, the more it counts; crossed: against the answer.",
        svg=grids(key, f"{_caption(stage, one)}, as two grids of {rows} by {columns} fields", pair),
        table=_parts(one),
    )


def _grid(values: Sequence[float], one: AttributionExample, rows: int, columns: int) -> list[list[float]]:
    """Attributions on their places, as shares of the strongest."""
    most = max((abs(value) for value in values), default=0.0) or 1.0
    grid = [[0.0] * columns for _ in range(rows)]
    for place, value in zip(one.places, values, strict=False):
        if 0 <= place < rows * columns:
            grid[place // columns][place % columns] = value / most
    return grid


def _flat(stage: str, number: int, one: AttributionExample) -> Figure:
    key = f"reasons-example-{number}"
    scales = [max((abs(value) for value in values), default=0.0) or 1.0 for values in (one.before, one.after)]
    triples = list(zip(one.places, one.before, one.after, strict=False))
    weightiest = sorted(sorted(triples, key=lambda part: -abs(part[1]))[:PARTS])
    names = [f"part {place}" for place, _, _ in weightiest]
    series = {
        "source model": [Dot(name, part[1] / scales[0]) for name, part in zip(names, weightiest, strict=True)],
        stage: [Dot(name, part[2] / scales[1]) for name, part in zip(names, weightiest, strict=True)],
    }
    caption = f"{_caption(stage, one)}. The {len(names)} parts that count most, as shares of the strongest."
    return Figure(
        key=key,
        caption=caption,
        svg=dots(key, caption, names, series, unit="share of the strongest"),
        table=_parts(one),
    )


def _parts(one: AttributionExample) -> Table:
    rows = [
        [str(place), f"{before:.4g}", f"{after:.4g}"]
        for place, before, after in zip(one.places, one.before, one.after, strict=False)
    ]
    heads = ["part", "source model", "this model"]
    return Table(f"Attributions of sample {one.sample}, by part", heads, rows, numbers=frozenset({1, 2}))
