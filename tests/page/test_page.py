"""Pages of real packs: what stands in them, what does not, and that hostile words are words."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from modelpress import keys, pointer
from modelpress.advise import past
from modelpress.errors import ConfigError
from modelpress.manifest import Manifest, TensorEntry
from modelpress.page import Story, read_beside, read_story, render, report_page, with_report
from modelpress.page.compare import comparison_page, read_comparison
from modelpress.page.fleet import fleet_page, read_fleet
from modelpress.page.sections import reasons, slices
from modelpress.page.sections.profile import energy_and_cost
from modelpress.page.sections.sizes import grouped
from modelpress.reports import (
    DistillReport,
    PruneReport,
    PruneStep,
    QuantizeReport,
    RunReport,
    RunStage,
    SensitivityRow,
)
from modelpress.scores import Scored
from modelpress.store import Store, open_store
from tests.page.beside import advice, checks, profile, training
from tests.page.registers import registry, version
from tests.page.stories import HOSTILE, NAME, publish_story, run_report, told

ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section", "footer", "p", "ul", "li"),
    *("h1", "h2", "a", "strong", "dl", "dt", "dd", "div", "span", "figure", "figcaption", "details", "summary", "pre"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("svg", "g", "path", "defs", "use", "text", "clippath", "rect"),
}
MOST_BYTES = 3_000_000


class Seen(HTMLParser):
    """Elements, attributes, ids and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("pages") / "store"))


@pytest.fixture(scope="module")
def story(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Story:
    return told(store, tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def page(story: Story) -> str:
    return render(report_page(story))


def sound(page: str) -> Seen:
    """A page that fetches nothing, runs nothing, and whose ids are its own."""
    seen = Seen(page)
    assert set(seen.tags) <= ALLOWED
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name in ("src", "srcset", "action")]
    ids = seen.values("id")
    assert len(ids) == len(set(ids))
    within = [value.removeprefix("#") for value in seen.values("href") if value.startswith("#")]
    assert set(within) <= set(ids)
    assert set(seen.values("aria-labelledby")) <= set(ids)
    for address in seen.values("href"):
        assert address.startswith(("#", "https://", "http://")), address
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert not re.search(r"@import|url\((?!#)", style)
    return seen


def test_it_has_everything_that_was_measured(page: str, story: Story) -> None:
    seen = sound(page)
    text = " ".join(seen.text)
    for title in ("The way, stage by stage", "Where the bytes went", "What could have been chosen", "Layer by layer"):
        assert title in text
    for title in ("Same answers, same reasons?", "The gate", "Where it comes from"):
        assert title in text
    assert story.pack is not None
    assert story.pack in text
    assert "0.9720 [0.9620, 0.9820]" in text, "quality with its interval"
    assert "not measured" in text, "energy, cost and the source's memory"
    assert "1 of 2 conditions passed, 0 failed, 1 could not be decided." in text
    assert "overridden by Anna: it is Friday" in text
    assert "4,000/s" in text
    assert "layer.2.weight" in text
    assert '"method": "static"' in text
    assert "2.00× the source's" in text
    assert "memory-bandwidth binds: most operators wait for memory" in text
    assert "0.2 EUR (c7i)" in text
    assert "0.02 J" in text
    assert "no counter here" in text, "why it was not measured"
    assert "Advised is int8, static." in text
    assert "92.7 kB to 113 kB" in text, "what was foretold, beside what was measured"
    assert "check 2, int8, static: published bytes" in text
    assert "1.250" in text, "measured over foretold, of an advice that was checked"
    assert "How it was trained" in text
    assert "1,234,567" in text, "bytes of parameters"
    assert "1.050" in text, "of an update, over the least"
    assert "Group by group" in text
    assert "class 2" in text
    assert seen.values("lang") == ["en"]
    assert seen.tags.count("h1") == 1
    assert seen.tags.count("svg") >= 10
    assert len(page.encode()) < 600_000


def test_the_same_story_is_the_same_page(page: str, story: Story) -> None:
    assert render(report_page(story)) == page


def test_hostile_words_are_words(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    hostile = render(report_page(told(store, tmp_path / "shards", word=HOSTILE)))
    seen = sound(hostile)
    assert "\u202e" not in hostile
    assert "{{7*7}}" in hostile, "no template was made of it"
    text = "".join(seen.text)
    shown = HOSTILE.replace("\u202e", "\ufffd")
    for place in (f"magnitude{shown}", f"layer.2.weight{shown}", f"reasons{shown}", f"Anna{shown}"[:90]):
        assert place in text or place.startswith("magnitude"), place
    assert "javascript:alert(1)" in text, "an address that leads to no page is text"
    versions = [publish_story(store, tmp_path / f"s{seed}", word=HOSTILE, seed=seed) for seed in (1, 2)]
    sound(render(comparison_page(*read_comparison(store, (NAME, versions[0]), (NAME, versions[1])))))
    sound(render(fleet_page(read_fleet(store))))


def test_without_its_run_a_pack_tells_what_it_knows(store: Store, story: Story) -> None:
    found = read_story(store, NAME, "champion")
    assert found.run is None
    text = " ".join(sound(render(report_page(found))).text)
    assert "0.9720 [0.9620, 0.9820]" in text
    assert "accuracy" in text
    assert "times and speeds are not known" in text
    assert "No gate" not in text


def test_a_run_that_was_stopped_has_a_page() -> None:
    stopped = run_report(None, stopped="BudgetExceededError: the loss is 0.2 of at most 0.01")
    text = " ".join(sound(render(report_page(Story(NAME, run=stopped)))).text)
    assert "This run was stopped, and published nothing: BudgetExceededError: the loss is 0.2" in text
    assert "The way, stage by stage" in text
    empty = Story("empty", run=RunReport(name="empty", stages=[], stopped="Cancelled"))
    assert "Cancelled" in " ".join(sound(render(report_page(empty))).text)


def test_a_report_of_another_release_hides_no_other() -> None:
    odd = RunStage(stage="quantize", size_bytes=3, report={"method": 3, "sensitivity": "none"})
    later = RunStage(stage="plan", size_bytes=3, report={"of a later release": 1})
    assert sound(render(report_page(Story("odd", run=RunReport(name="odd", stages=[odd, later])))))


def test_what_is_nested_without_end_is_no_end_of_the_page() -> None:
    deep: dict[str, object] = {}
    for _ in range(5000):
        deep = {"a": deep}
    run = RunReport(name="deep", stages=[RunStage(stage="source", report=deep)], config=deep)
    text = " ".join(sound(render(report_page(Story("deep", run=run)))).text)
    assert "nested too deep to be shown" in text
    assert "1 fields" in text


def test_energy_stands_with_the_model_that_was_profiled(story: Story) -> None:
    assert story.profile is not None
    stages = [stage.stage for stage in story.stages]
    for subject, stage in (
        (f"{NAME}@{str(story.pack)[:12]}", "quantize"),
        (f"{NAME}@{'0' * 12}", None),
        (NAME, "source (onnx)"),
    ):
        told = replace(story, profile=story.profile.model_copy(update={"subject": subject}))
        known = [one for one in stages if energy_and_cost(told, one)[0] == "0.02 J"]
        assert known == ([stage] if stage else [])


def test_reports_of_other_commands_are_shown_beside(tmp_path: Path) -> None:
    for number, one in enumerate((profile(), advice())):
        path = tmp_path / f"{number}.json"
        path.write_text(one.model_dump_json())
        assert read_beside(path) == one
    kept = tmp_path / "checks.jsonl"
    for check in (*checks(), *checks(name="cells")):
        past.keep(check, kept)  # as `advise --check` does
    assert with_report(Story(NAME), kept).checks == checks(), "of this model alone"
    path.write_text(checks()[0].model_dump_json())
    assert with_report(Story(NAME), path).checks == checks()[:1]
    assert "What was advised" in render(report_page(with_report(Story(NAME), path))), "without the advice, too"
    with pytest.raises(ConfigError, match=r"(?s)checks of cells, digits.*of other"):
        with_report(Story("other"), kept)
    kept.write_text("{}\n")
    with pytest.raises(ConfigError, match="line 1 is no check"):
        read_beside(kept)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="the report of `profile`"):
        read_beside(path)
    with pytest.raises(ConfigError, match="a file"):
        read_beside(tmp_path / "none.json")


def test_groups_are_ordered_by_what_they_may_have_lost(story: Story) -> None:
    right, half = np.ones(40), np.where(np.arange(40) % 2, 1.0, 0.0)
    groups = {"even": half == 0, "odd": half == 1, "nobody": np.zeros(40, bool)}
    candidate, source = (
        Scored(half, "same", "accuracy", slices=groups),
        Scored(right, "same", "accuracy", slices=groups),
    )
    page = render(report_page(replace(story, scored={"candidate": candidate, "source": source})))
    (table,) = re.findall(r"<caption>Quality by group</caption>.*?</table>", page, re.DOTALL)
    assert re.findall(r'<th scope="row">(\w+)</th>', table) == ["even", "odd"], "a group without samples has no quality"
    assert "-1.0000 [" in table
    other = replace(source, samples="others")
    assert slices.section(replace(story, scored={"candidate": candidate, "source": other})) is None
    assert slices.section(replace(story, scored={})) is None


def test_many_trainings_are_told_and_some_of_them_drawn() -> None:
    steps = [
        PruneStep(sparsity=0.1 * number, zeros=number, recovery=training(processes=number)) for number in range(1, 10)
    ]
    report = PruneReport(
        method="magnitude",
        eligible_parameters=1,
        touched_parameters=1,
        parameters_before=1,
        parameters_after=1,
        zeros_after=0,
        tensors=[],
        steps=steps,
    )
    long = training().model_copy(update={"losses": [1 / epoch for epoch in range(1, 20_001)]})
    distilled = DistillReport(teacher_parameters=2, student_parameters=1, train=long)
    told = {"prune": report, "distill": distilled}
    stages = [RunStage(stage=stage, report=one.model_dump(mode="json")) for stage, one in told.items()]
    page = render(report_page(Story("steps", run=RunReport(name="steps", stages=stages))))
    text = " ".join(sound(page).text)
    assert len(page.encode()) < MOST_BYTES / 10
    assert "distill from 1 to 5e-05" in text
    assert "20,000" in text, "the last epoch"
    assert "prune 9" in text
    assert "9 × ddp" in text
    curves = text.partition("Loss by epoch: ")[2].partition("How it")[0]
    assert "prune 5 from" in curves
    assert "prune 6 from" not in curves


@pytest.mark.parametrize("grid", [(1, 10**12), (10**12, 8), (0, 8), (-1, 8), (8, -1), (65, 64)])
def test_a_grid_that_nobody_measures_is_a_list_of_parts(grid: tuple[int, int]) -> None:
    run = run_report(None)
    (served,) = [stage for stage in run.stages if stage.evaluation and stage.evaluation.attribution]
    assert served.evaluation is not None
    assert served.evaluation.attribution is not None
    claimed = [
        one.model_copy(update={"rows": grid[0], "columns": grid[1]}) for one in served.evaluation.attribution.examples
    ]
    attribution = served.evaluation.attribution.model_copy(update={"examples": claimed})
    told = served.model_copy(update={"evaluation": served.evaluation.model_copy(update={"attribution": attribution})})
    section = reasons.section(Story(NAME, run=RunReport(name=NAME, stages=[told])))
    assert section is not None
    assert len(section.figures) == 1 + len(claimed)
    assert "The 12 parts that count most" in section.figures[1].caption


def test_thousands_of_tensors_are_summed_up() -> None:
    tensors = tuple(
        TensorEntry(
            name=f"model.layers.{number // 8}.part{number % 8}.weight",
            dtype="F32",
            shape=(64, 64 + number % 7),
            codec="raw",
            raw_sha256="a" * 64,
            stored_sha256="b" * 64,
            stored_bytes=4 * 64 * (64 + number % 7),
            entropy_bound_bytes=60 * (64 + number % 7),
            shards=(0,),
        )
        for number in range(3000)
    )
    total = sum(tensor.stored_bytes for tensor in tensors)
    shards = ({"sha256": "c" * 64, "size_bytes": total + 400_000},)
    manifest = Manifest.model_validate(
        {
            "name": "large",
            "kind": "torch",
            "shards": shards,
            "tensors": [one.model_dump() for one in tensors],
            "files": [],
        }
    )
    groups = grouped(manifest)
    assert len(groups) == 21
    assert groups[-1].name == "355 smaller ones"
    assert sum(group.stored for group in groups) == total
    assert sum(group.tensors for group in groups) == 3000
    assert [group.stored for group in groups[:-1]] == sorted((group.stored for group in groups[:-1]), reverse=True)
    rows = [
        SensitivityRow(node=f"n{number}", disagreement=1 / (number + 1), kept_float=False) for number in range(3000)
    ]
    report = QuantizeReport(
        method="static", eligible_weights=1, quantized_weights=1, coverage=1.0, agreement=1.0, sensitivity=rows
    )
    run = RunReport(name="large", stages=[RunStage(stage="quantize", report=report.model_dump(mode="json"))])
    page = render(report_page(Story("large", manifest=manifest, run=run)))
    text = " ".join(sound(page).text)
    assert "2,850 more" in text
    assert "2,850 smaller ones" in text
    assert len(page.encode()) < MOST_BYTES / 10


def test_a_comparison_says_which_is_better(store: Store, story: Story, tmp_path: Path) -> None:
    other = publish_story(store, tmp_path / "other", seed=5)
    found, before, after = read_comparison(store, (NAME, str(story.pack)), (NAME, other))
    text = " ".join(sound(render(comparison_page(found, before, after))).text)
    assert "accuracy is worse, by the whole interval." in text
    assert "the run of at least one of them is not kept" in text
    assert f"{len(found.tensors)} tensors differ" in text
    same = read_comparison(store, (NAME, other), (NAME, other))
    assert "Both are the same pack." in " ".join(sound(render(comparison_page(*same))).text)
    timed = comparison_page(found, story, Story(**{**vars(after), "run": run_report(other)}))
    assert "measured on machines of class c7i" in " ".join(sound(render(timed)).text)


def test_a_fleet_of_hundreds_is_one_page(store: Store, story: Story) -> None:
    fleet = read_fleet(store)
    many = [version(f"model-{place}", number, "e" * 64) for place in range(400) for number in (1, 2, 3)]
    page = render(fleet_page(fleet, registry(fleet, others=many)))
    text = " ".join(sound(page).text)
    assert "registered models" in text
    assert f"{1200 + sum(fleet.versions.values()) + 2:,} versions" in text
    assert "more are left out." in text
    assert len(page.encode()) < MOST_BYTES / 3
    assert render(fleet_page(fleet, registry(fleet, others=many))) == page
    hostile = render(fleet_page(fleet, registry(fleet, HOSTILE)))
    sound(hostile)
    assert "{{7*7}}" in hostile
    assert "version 7, which it does not have" not in hostile, "no server follows it"
    assert "no such version" in hostile


def test_a_fleet_shows_what_is_broken_too(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    first, second = (publish_story(store, tmp_path / name, name=name, seed=3) for name in ("first", "second"))
    pointer.append(store, "first", "challenger", first, "promote")
    publish_story(store, tmp_path / "idle", name="idle")
    store.delete(keys.pointer("idle", "champion", 1))
    store.delete(keys.manifest("second", second))
    fleet = read_fleet(store)
    assert [(one.name, one.alias, one.story is None) for one in fleet.served] == [
        ("first", "challenger", False),
        ("first", "champion", False),
        ("second", "champion", True),
    ]
    assert fleet.versions == {"first": 1, "idle": 1, "second": 0}
    text = " ".join(sound(render(fleet_page(fleet))).text)
    assert "1 aliases point at what can't be read." in text
    assert "second@champion" in text
    assert "inconclusive, overridden by Anna" in text
    assert "Published, and not served" in text
    assert [one.alias for one in read_fleet(store, "champion").served] == ["champion", "champion"]
    nothing = read_fleet(open_store(str(tmp_path / "nothing")))
    assert "No alias points at a pack" in " ".join(sound(render(fleet_page(nothing))).text)
