"""An advice as tables, sentences and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from modelpress.errors import ConfigError
from modelpress.reports import AdviceCheck, AdviceReport, Advised, Predicted, Prediction
from modelpress.store.local import check_free, local_errors

Table = list[dict[str, str]]
SHOWN = 4
"""Lines of evidence, and of counter-evidence, of each technique in the terminal; the file has all."""


def table(report: AdviceReport) -> Table:
    """A row per technique and setting, in the order of the ranking."""
    return [
        {
            "": "→" if one.label == report.chosen else "",
            "technique": one.technique,
            "how": one.label,
            "gain": number(one.gain, "{:.2f}×"),
            "bytes": number(one.outlook.published_bytes, "{:,.0f}") if one.outlook else "–",
            "ms b1": milliseconds(one.outlook.latency_seconds) if one.outlook else "–",
            f"/s b{report.batch_size}": number(one.outlook.throughput_per_second, "{:,.0f}") if one.outlook else "–",
            "drop": number(one.outlook.quality_drop, "{:+.4f}") if one.outlook else "–",
            "budget": "kept" if one.fits else "not kept" if one.outlook else "–",
        }
        for one in report.ranked
    ]


def number(found: Prediction, form: str) -> str:
    """`2.10× [1.90×, 2.30×]`; a dash where nothing is foretold."""
    if not isinstance(found, Predicted):
        return "–"
    return f"{form.format(found.value)} [{form.format(found.low)}, {form.format(found.high)}]"


def milliseconds(seconds: Prediction) -> str:
    """The same of a time."""
    return number(seconds.scaled(1000), "{:.3f}") if isinstance(seconds, Predicted) else "–"


def reasons(report: AdviceReport, first: int = 3) -> str:
    """Why the first ones stand where they do, what speaks against them, and why others have no number."""
    lines: list[str] = []
    for one in report.ranked[:first]:
        lines += ["", f"{one.technique}: {one.label}", *_listed("+", one.evidence), *_listed("−", one.counter_evidence)]
        lines += _listed("!", one.obstacles)
    left = [one for one in report.ranked[first:] if one.outlook is None]
    lines += ["", "without a number:"] if left else []
    lines += [f"  {one.label}: {'; '.join(one.obstacles)}" for one in left]
    return "\n".join(lines).strip("\n")


def _listed(mark: str, said: Sequence[str]) -> list[str]:
    more = len(said) - SHOWN
    return [f"  {mark} {line}" for line in said[:SHOWN]] + ([f"  {mark} … {more} more in the file"] if more > 0 else [])


def summary(report: AdviceReport) -> str:
    """What was asked, what is advised, and how sure it is."""
    asked = ", ".join(f"{name} {value:g}" for name, value in report.budget.items() if value)
    lines = [f"objective: {report.objective} ({report.binding}); budget: {asked or 'no drop in quality at all'}"]
    advised = report.advised()
    if advised is None:
        lines.append("nothing that a recipe can say keeps the budget; the nearest and what they break:")
        lines += [f"  {one.label}: {'; '.join(one.obstacles)}" for one in _nearest(report)]
    else:
        lines.append(f"advised: {advised.label}, {number(advised.gain, '{:.2f}×')} better")
    return "\n".join([*lines, *(f"earlier advice here: {line}" for line in report.checks)])


def _nearest(report: AdviceReport) -> list[Advised]:
    tried = [one for one in report.ranked if one.in_recipe and one.outlook is not None]
    return sorted(tried, key=lambda one: len(one.obstacles))[:3]


def check_table(check: AdviceCheck) -> Table:
    """A row per number: foretold, measured, and how far apart."""
    return [
        {
            "number": row.metric,
            "foretold": number(row.predicted, "{:.6g}"),
            "measured": "not measured" if row.measured is None else f"{row.measured:.6g}",
            "measured ÷ foretold": "–" if row.ratio is None else f"{row.ratio:.3f}",
            "in the interval": {True: "yes", False: "no", None: "–"}[row.inside],
        }
        for row in check.rows
    ]


def paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Where the advice and the advised recipe go."""
    return folder / f"{name}.json", folder / f"{name}.yaml"


def check_folder(folder: Path, name: str) -> None:
    """Refuse to write over another advice, before minutes are spent.

    Raises:
        ConfigError: a file of this name is there, or the folder is no folder.
    """
    check_free(folder, paths(folder, name), f"writing advice {name!r}")


def recipe(report: AdviceReport) -> str:
    """The advised recipe as YAML, with a line that says where it comes from.

    Raises:
        ConfigError: nothing was advised.
    """
    if report.config is None:
        raise ConfigError(f"writing the recipe of advice {report.name!r}", found="nothing was advised")
    head = f"# Advised for {report.objective}: {report.chosen}.\n"
    return head + yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True, width=120)


def write(report: AdviceReport, folder: Path) -> list[Path]:
    """The advice, and the recipe where there is one; a recipe never stands without the advice that it comes from."""
    document, advised = paths(folder, report.name)
    with local_errors(f"writing advice {report.name!r} to {folder}", writing=True):
        folder.mkdir(parents=True, exist_ok=True)
        with document.open("x", encoding="utf-8") as file:
            file.write(report.model_dump_json(indent=2) + "\n")
        if report.config is None:
            return [document]
        with advised.open("x", encoding="utf-8") as file:
            file.write(recipe(report))
    return [document, advised]
