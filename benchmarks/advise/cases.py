"""The cases: what is asked of which model. What a model's search found is kept, and a run that was cut off goes on."""

from __future__ import annotations

import hashlib
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import benchmarks.advise.search as searching
import modelpress.advise as advising
from benchmarks.advise.search import Ran
from modelpress.advise import Advisor
from modelpress.advise.rank import MEASURES
from modelpress.config import AdviseRecipe, load_advise_recipe
from modelpress.reports import AdviceReport
from modelpress.settings import read_settings
from modelpress.workload import load_workload

CONFIGS = Path(__file__).parents[2] / "configs" / "advise"
SLOWER_LINE = {"bandwidth_bits_per_second": 1e6}
SLOW_LINE = {"bandwidth_bits_per_second": 100e6}
CASES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "digits": [
        ("fewest bytes, 1 point", {"objective": "bytes"}),
        ("lowest latency at batch 1, 1 point", {"objective": "latency"}),
        ("highest throughput at batch 32, 1 point", {"objective": "throughput"}),
        ("cold start at 1 Mbit/s, 1 point", {"objective": "cold-start", "hardware": SLOWER_LINE}),
    ],
    "lenet": [
        ("fewest bytes, 1 point", {"objective": "bytes"}),
        ("lowest latency at batch 1, 1 point", {"objective": "latency"}),
        ("highest throughput at batch 32, 1 point", {"objective": "throughput"}),
    ],
    "decoder": [
        ("fewest bytes, 0.02 nats", {"objective": "bytes"}),
        ("highest throughput at batch 8, 0.02 nats", {"objective": "throughput"}),
    ],
    "minilm": [
        ("cold start at 100 Mbit/s, 2 points", {"objective": "cold-start", "hardware": SLOW_LINE}),
        ("highest throughput at batch 32, 2 points", {"objective": "throughput"}),
        ("lowest latency at batch 1, 2 points", {"objective": "latency"}),
    ],
}
QUICK: dict[str, dict[str, Any]] = {
    "lenet": {"workload": {"train_epochs": 5}, "advise": {"kernel_seconds": 0.05}},
    "digits": {
        "workload": {"train_epochs": 5, "architecture": {"channels": [16, 32], "hidden": 64}},
        "advise": {"kernel_seconds": 0.05, "train_epochs": 0, "students": []},
    },
}
"""What is less in a hurry."""


class Kept(BaseModel):
    """What was found of a model."""

    reports: list[AdviceReport]
    """One per case."""
    advice_seconds: float
    """Of trying the grid in small, once for all cases."""
    search_seconds: float
    """Of running all of it."""
    now: Ran
    rows: list[Ran]


def recipe_of(model: str, quick: bool) -> AdviseRecipe:
    """The shipped recipe, or less of it."""
    shipped = load_advise_recipe(CONFIGS / f"{model}.yaml")
    if not quick:
        return shipped
    document = shipped.model_dump(mode="json", exclude_unset=True)
    for part, changes in QUICK[model].items():
        document[part] = document[part] | changes
    return AdviseRecipe.model_validate(document | {"evaluate": {"latency_seconds": 0.2}})


def of_case(recipe: AdviseRecipe, changes: dict[str, Any]) -> AdviseRecipe:
    """The recipe with another objective, budget or line."""
    document = recipe.model_dump(mode="json", exclude_unset=True)
    return AdviseRecipe.model_validate(document | {"advise": document["advise"] | changes})


def found(model: str, quick: bool) -> Kept:
    """An advice for each case of a model, and the search of its grid; kept from an earlier run where nothing of the
    code or the recipe has changed since."""
    recipe = recipe_of(model, quick)
    path = read_settings().home / "benchmarks" / "advise" / f"{model}-{_digest(recipe)}.json"
    if path.exists():
        return Kept.model_validate_json(path.read_bytes())
    kept = _find(model, recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(kept.model_dump_json())
    unfinished.rename(path)
    return kept


def _find(model: str, recipe: AdviseRecipe) -> Kept:
    workload = load_workload(recipe.workload)
    source = workload.source()
    say(f"{model}: advising")
    started = time.perf_counter()
    # Without a home nothing is known beforehand: what an advice costs on a machine that it has never seen.
    advisor = Advisor(recipe, workload, source=source, progress=partial(_note, model))
    reports = [advisor.report(of_case(recipe, changes)) for _, changes in CASES[model]]
    advised = time.perf_counter() - started
    started = time.perf_counter()
    now, rows = searching.search(recipe, workload, source, advisor.grid, say)
    return Kept(
        reports=reports, advice_seconds=advised, search_seconds=time.perf_counter() - started, now=now, rows=rows
    )


def _note(model: str, done: int, total: int, note: str = "") -> None:
    say(f"{model}: {done} of {total}: {note}")


def measure_of(row: Ran, report: AdviceReport) -> float:
    """What a case asks to be least, as it was measured; of throughput, the time of a call."""
    measure = MEASURES[report.objective]
    if measure == "cold_start_seconds":
        wire = 8 * row.published_bytes / report.hardware["bandwidth_bits_per_second"]
        return wire + row.load_seconds + row.latency_seconds
    return row.batch_seconds if report.objective == "throughput" else float(getattr(row, measure))


def _digest(recipe: AdviseRecipe) -> str:
    """Of the recipe and of the code that decides."""
    digest = hashlib.sha256(recipe.model_dump_json().encode())
    folders = [Path(str(advising.__file__)).parent, Path(__file__).parent]
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def say(text: str) -> None:
    """Where a run that takes minutes stands."""
    print(text, file=sys.stderr, flush=True)
