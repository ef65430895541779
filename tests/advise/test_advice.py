"""An advice on a real, small model: every technique has numbers or says why not, and the advised recipe runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelpress.advise import Advisor, check, grid, objective_of, past, show
from modelpress.advise.trial import Trials
from modelpress.compress import compress
from modelpress.config import AdviseRecipe, load_advise_recipe, load_config
from modelpress.errors import ConfigError, WorkloadError
from modelpress.quantize import quantize
from modelpress.quantize.from_module import quantize_module
from modelpress.reports import (
    AdviceCheck,
    AdviceReport,
    CheckRow,
    LatencyReport,
    NotPredicted,
    Outlook,
    Predicted,
    QualityReport,
)
from modelpress.workload import Workload, load_workload
from tests.toys import TextToy

DIGITS: dict[str, Any] = {
    "name": "small-digits",
    "workload": {
        "kind": "image-classification",
        "model": "digits-cnn",
        "data": "digits",
        "train_epochs": 8,
        "calibration_samples": 160,
        "evaluation_samples": 200,
        "architecture": {"channels": [8, 16], "hidden": 32},
    },
    "evaluate": {"latency_seconds": 0.02},
    "advise": {"objective": "bytes", "batch_size": 8, "kernel_seconds": 0.01, "budget": {"max_quality_drop": 0.03}},
}
CONFIGS = Path(__file__).parents[2] / "configs" / "advise"


def recipe(**options: Any) -> AdviseRecipe:
    return AdviseRecipe.model_validate(DIGITS | {"advise": DIGITS["advise"] | options})


@pytest.fixture(scope="module")
def workload() -> Workload:
    return load_workload(recipe().workload)


@pytest.fixture(scope="module")
def advisor(workload: Workload, tmp_path_factory: pytest.TempPathFactory) -> Advisor:
    """The whole grid, tried once."""
    return Advisor(recipe(), workload, home=tmp_path_factory.mktemp("home"))


def test_every_technique_has_numbers_or_says_why_not(advisor: Advisor) -> None:
    report = advisor.report()
    assert {one.technique for one in report.ranked} >= {
        "lossless", "dynamic", "static", "weight-only", "codebook", "plan", "structured-pruning",
        "unstructured-pruning", "batching", "data-parallel", "model-parallel", "sharding", "delta",
    }  # fmt: skip
    labels = [one.label for one in report.ranked]
    assert len(set(labels)) == len(labels)
    for one in report.ranked:
        if one.outlook is None:
            assert one.obstacles, one.label
            continue
        for name in Outlook.model_fields:
            found = getattr(one.outlook, name)
            assert isinstance(found, NotPredicted) or (found.low <= found.value <= found.high and found.by), one.label
        if one.in_recipe:
            assert one.evidence, one.label
            assert one.counter_evidence or one.technique == "lossless", one.label
    dynamic = next(one for one in report.ranked if one.technique == "dynamic")
    assert any("convolutions it leaves in float" in line for line in dynamic.counter_evidence)
    zeros = next(one for one in report.ranked if one.technique == "unstructured-pruning")
    assert any("zeros are no speed-up" in line for line in zeros.counter_evidence)
    assert zeros.outlook is not None
    now = report.now.value("latency_seconds")
    assert zeros.outlook.value("latency_seconds") == now
    assert AdviceReport.model_validate_json(report.model_dump_json()) == report


def test_the_advised_recipe_is_read_by_what_runs_it(advisor: Advisor, tmp_path: Path) -> None:
    """And makes about the bytes that were foretold."""
    report = advisor.report()
    advised = report.advised()
    assert advised is not None
    assert advised.fits
    written = show.write(report, tmp_path)
    assert [path.name for path in written] == ["small-digits.json", "small-digits.yaml"]
    config = load_config(tmp_path / "small-digits.yaml")
    assert config.name == "small-digits"
    assert config.evaluate.max_quality_drop == 0.03
    assert config.evaluate.batch_sizes == [1, 8]
    assert check.read(tmp_path / "small-digits.json") == report
    with pytest.raises(ConfigError, match="another folder"):
        show.check_folder(tmp_path, "small-digits")


@pytest.mark.parametrize("label", ["dynamic int8", "static int8", "codebook of 4 bits"])
def test_a_trial_foretells_the_bytes_of_the_stage(advisor: Advisor, workload: Workload, label: str) -> None:
    """The real stage, with its search and all of the calibration data, against the trial."""
    tried = next(one for one in advisor.tried if one.candidate.label == label)
    assert not isinstance(tried.outcome, str), tried.outcome
    foretold = tried.outcome.published_bytes
    assert isinstance(foretold, Predicted)
    config = tried.candidate.config(advisor.recipe)
    assert config.quantize is not None
    source, exported = advisor.trials.source, advisor.trials.exported
    if config.quantize.needs_module:
        made, _ = quantize_module(source, exported, workload, config.quantize, config.export)
    else:
        made, _ = quantize(exported, workload, config.quantize)
    coded = compress(made, config.compress)[1].stored_bytes
    assert tried.outcome.coded_bytes == pytest.approx(coded, rel=0.05)
    assert foretold.value > tried.outcome.coded_bytes


def test_other_objectives_and_budgets_cost_nothing_more(advisor: Advisor) -> None:
    measured = advisor.speeds.measured
    small = advisor.report(recipe(objective="bytes"))
    quick = advisor.report(recipe(objective="latency"))
    assert {one.label for one in small.ranked} == {one.label for one in quick.ranked}
    none = advisor.report(recipe(budget={"max_quality_drop": 0.03, "max_bytes": 10}))
    assert none.chosen is None
    assert none.config is None
    assert all(any("published_bytes" in line for line in one.obstacles) for one in none.ranked if one.outlook)
    assert "keeps the budget" in show.summary(none)
    with pytest.raises(ConfigError, match="nothing was advised"):
        show.recipe(none)
    costly = advisor.report(recipe(objective="cost", hardware={"price_per_hour": 3.6}))
    cost = costly.now.value("cost_per_million")
    assert cost == pytest.approx(1e-3 * 1e6 / (costly.now.value("throughput_per_second") or 0))
    assert advisor.speeds.measured == measured


def test_what_is_tried_never_saw_the_evaluation_split(workload: Workload) -> None:
    """A workload whose evaluation split cannot be read advises the same."""
    given = recipe(techniques=["plan"])
    module = workload.source()

    class Blind(type(workload)):  # type: ignore[misc]
        def batches(self, split: Any, batch_size: int, seed: int | None = None) -> Any:
            assert split != "evaluation"
            return super().batches(split, batch_size, seed)

    report = Advisor(given, Blind(given.workload), source=module).report()
    assert any(one.technique == "plan" and one.outlook for one in report.ranked)


def test_a_student_is_tried_where_training_is_allowed(workload: Workload) -> None:
    student = {"channels": [4, 8], "hidden": 16}
    given = recipe(techniques=["distill"], train_epochs=3, students=[student], budget={"max_quality_drop": 1.0})
    report = Advisor(given, workload).report()
    advised = report.advised()
    assert advised is not None
    assert advised.technique == "distill"
    assert report.config is not None
    assert report.config["distill"]["architecture"] == student
    assert any("once it is trained" in line for line in advised.counter_evidence)
    with pytest.raises(ValueError, match=r"advise\.train_epochs"):
        recipe(students=[student])


def test_a_model_without_targets_counts_changed_answers() -> None:
    toy = TextToy(samples=80)
    given = AdviseRecipe.model_validate(
        {
            "name": "toy",
            "workload": {"kind": "custom", "factory": "tests.toys:TextToy"},
            "evaluate": {"latency_seconds": 0.02},
            "advise": {"objective": "latency", "batch_size": 4, "kernel_seconds": 0.01, "techniques": ["dynamic"]},
        }
    )
    report = Advisor(given, toy).report()
    drop = report.ranked[0].outlook
    assert drop is not None
    told = next(one.outlook.quality_drop for one in report.ranked if one.technique == "dynamic" and one.outlook)
    assert isinstance(told, Predicted)
    assert "answers changed" in told.by
    assert 0 <= told.value <= 1


def test_too_few_samples_are_refused() -> None:
    given = AdviseRecipe.model_validate(DIGITS | {"workload": DIGITS["workload"] | {"calibration_samples": 16}})
    workload = load_workload(given.workload)
    with pytest.raises(WorkloadError, match=r"(?s)cutting the calibration split.*raise workload\.calibration_samples"):
        Trials(given, workload, workload.skeleton({}), None)  # type: ignore[arg-type]


def test_without_an_objective_a_profile_must_say_what_binds() -> None:
    assert objective_of(recipe(objective="latency"), None)[0] == "latency"
    with pytest.raises(ConfigError, match=r"(?s)no advise\.objective and no profile.*set advise\.objective"):
        objective_of(recipe(objective=None), None)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_legal(path: Path) -> None:
    assert load_advise_recipe(path).name == path.stem


def run_of(report: AdviceReport, factor: float) -> dict[str, Any]:
    """What a run would print that took so many times what was foretold."""
    advised = report.advised()
    assert advised is not None
    assert advised.outlook is not None
    value = advised.outlook.value
    latency = [
        LatencyReport(
            batch_size=size, calls=5, p50_seconds=factor * (value(name) or 0), p99_seconds=1.0,
            throughput_per_second=8 / factor,
        )
        for size, name in ((1, "latency_seconds"), (8, "batch_seconds"))
    ]  # fmt: skip
    quality = QualityReport(
        metric="accuracy", samples=200, value=0.9, low=0.8, high=1.0, difference=-0.02, difference_low=-0.1,
        difference_high=0.1,
    )  # fmt: skip
    stage = {"stage": "quantize", "seconds": 1.0, "quality": quality.model_dump(mode="json")}
    stage["latency"] = [one.model_dump(mode="json") for one in latency]
    size = round(factor * (value("published_bytes") or 0))
    return {"name": report.name, "published_bytes": size, "stages": [stage, {"stage": "compress", "seconds": 1.0}]}


def test_what_was_measured_is_kept_for_the_next_advice(advisor: Advisor, workload: Workload, tmp_path: Path) -> None:
    report = advisor.report()
    (tmp_path / "run.json").write_text(json.dumps(run_of(report, 1.5)))
    found = check.compare(report, check.measured(tmp_path / "run.json", report.batch_size))
    rows = {row.metric: row for row in found.rows}
    assert rows["published_bytes"].ratio == pytest.approx(1.5, rel=1e-3)
    assert rows["latency_seconds"].ratio == pytest.approx(1.5)
    assert rows["latency_seconds"].inside is False
    assert rows["quality_drop"].measured == pytest.approx(0.02)
    assert rows["quality_drop"].ratio is None
    assert rows["memory_bytes"].measured is None
    assert "1.500" in show.check_table(found)[0]["measured ÷ foretold"]
    kept = tmp_path / "advise" / "checks.jsonl"
    past.keep(found, kept)
    past.keep(found, kept)
    known = past.Past.read(kept)
    assert known.error("latency_seconds", found.technique, found.machine) == pytest.approx(0.5)
    assert known.error("latency_seconds", "another", found.machine) == pytest.approx(0.5)
    assert known.error("latency_seconds", found.technique, "another machine") == past.UNCHECKED["latency_seconds"]
    assert any(
        line.startswith("latency_seconds: measured ÷ foretold 1.50 in the mean of 2")
        for line in known.said(found.machine)
    )
    kept.write_text(kept.read_text() + "{}\n")
    with pytest.raises(ConfigError, match="line 3 of earlier checks"):
        past.Past.read(kept)


@pytest.mark.parametrize("ratios", [[1.01], [1.01, 0.99], [1.01, 0.99, 1.02], [1.8, 1.0, 1.0]])
def test_few_checks_do_not_make_an_error_small(ratios: list[float]) -> None:
    nothing = Predicted(value=1, low=1, high=1)
    checks = []
    for one in ratios:
        row = CheckRow(metric="latency_seconds", predicted=nothing, measured=one, ratio=one, inside=False)
        checks.append(AdviceCheck(name="a", machine="here", technique="static", label="static", rows=[row]))
    found = past.Past(checks).error("latency_seconds", "static", "here")
    worst = max(abs(one - 1) for one in ratios)
    assert found == pytest.approx(worst if len(ratios) >= past.LEAST_CHECKS else max(worst, 0.2))


@pytest.mark.parametrize("text", ["[]", "{}", '{"name": "a", "published_bytes": "many", "stages": []}', "{"])
def test_a_run_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(Exception, match=r"reading what was measured"):
        check.measured(path, 8)
    with pytest.raises(ConfigError, match="reading advice"):
        check.read(path)


def test_the_grid_is_made_of_legal_recipes(advisor: Advisor) -> None:
    for one in advisor.grid:
        config = one.config(advisor.recipe)
        text = yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True))
        assert grid.parse_config(yaml.safe_load(text)) == config
