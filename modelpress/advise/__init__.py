"""Which technique for which budget: ranked by what is foretold on this machine, with the recipe to run.

An advice measures the model as it is, tries each technique in small (`trial`), foretells bytes, times and cost from
what the trial has made and from measured speeds of single products (`bench`), and ranks what keeps the budget (`rank`).
It chooses on calibration data; the evaluation split stays unseen. After the run, `check` puts foretold beside measured,
and the next advice states how far off the last ones were (`past`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from modelpress import graph
from modelpress.advise import argue, graphs, others, rank
from modelpress.advise.bench import Bench, machine
from modelpress.advise.grid import Candidate, candidates
from modelpress.advise.outlook import Errors, Found, Known, outlook
from modelpress.advise.past import Past
from modelpress.advise.trial import Trial, Trials
from modelpress.config import AdviseRecipe, ProfileConfig
from modelpress.config.advise import Objective
from modelpress.cores import usable_cores
from modelpress.errors import ConfigError, ModelpressError
from modelpress.evaluate import measure_latency
from modelpress.plan.latency import in_turns
from modelpress.profile.run import Subject
from modelpress.profile.run import profile as measure_profile
from modelpress.progress import Progress, silent
from modelpress.reports import AdviceReport, Advised, NotPredicted, Outlook, ProfileReport
from modelpress.reports.measured import value_of
from modelpress.workload import Workload, check_disjoint

__all__ = ["Advisor", "advise"]

SPEEDS_FILE, CHECKS_FILE = "advise/speeds.json", "advise/checks.jsonl"


def advise(
    recipe: AdviseRecipe,
    workload: Workload,
    *,
    profile: ProfileReport | None = None,
    home: Path | None = None,
    source: nn.Module | None = None,
    progress: Progress = silent,
) -> AdviceReport:
    """Advise on a model.

    Args:
        recipe: what is asked, and what it may cost.
        workload: the recipe's.
        profile: of the model on this machine: says what binds, and what it measured is not measured again. None: one
            is made where the recipe does not say what is to be best.
        home: folder that keeps measured speeds and earlier checks; None keeps nothing.
        source: the trained module, where it is at hand; None: the workload's.
        progress: told of each candidate.

    Raises:
        WorkloadError: too few calibration samples, or splits that share some.
        ExportError: the model has no ONNX graph.
    """
    check_disjoint(workload)
    return Advisor(recipe, workload, profile=profile, home=home, source=source, progress=progress).report()


@dataclass(frozen=True)
class _Tried:
    """A candidate, and what came of it."""

    candidate: Candidate
    outcome: Trial | str
    """Or why it could not be tried."""


class Advisor:
    """Tries the grid once; rankings for other objectives and budgets follow from what was tried.

    It takes and raises what `advise` does, but for the look at the splits.
    """

    def __init__(
        self,
        recipe: AdviseRecipe,
        workload: Workload,
        *,
        profile: ProfileReport | None = None,
        home: Path | None = None,
        source: nn.Module | None = None,
        progress: Progress = silent,
    ) -> None:
        self.began = time.perf_counter()
        self.recipe, self.profile = recipe, profile
        self.past = Past.read(home / CHECKS_FILE if home else None)
        module = source if source is not None else workload.source(progress)
        self.speeds = Bench(home / SPEEDS_FILE if home else None, recipe.advise.kernel_seconds, chained=False)
        self.trials = Trials(recipe, workload, module, self.speeds)
        self.traits = graphs.traits(graphs.named(self.trials.exported))
        self.speeds.chained = bool(self.traits.convolutions)
        self.grid = candidates(recipe, self.traits)
        if profile is None and recipe.advise.objective is None:
            self.profile = self._profiled(workload, progress)
        self.now = self.trials.now()
        self.known = self._measure()
        self.tried = self._try_all(progress)

    def report(self, recipe: AdviseRecipe | None = None) -> AdviceReport:
        """The ranking for a recipe: this advisor's, or one that differs in objective, budget and hardware alone."""
        recipe = recipe or self.recipe
        asked = recipe.advise
        objective, binding = objective_of(recipe, self.profile)
        now = self._outlook(self.now, recipe, "now")
        every = [self._advised(one, now, recipe, objective) for one in self.tried]
        every += others.others(now, self.known, asked, objective)
        order = rank.ranked(every, objective)
        chosen = rank.chosen(order, objective)
        config = None
        if chosen is not None:
            candidate = next(one.candidate for one in self.tried if one.candidate.label == chosen.label)
            config = candidate.config(recipe).model_dump(mode="json", exclude_unset=True)
        return AdviceReport(
            name=recipe.name,
            machine=machine(),
            objective=objective,
            binding=binding,
            batch_size=asked.batch_size,
            budget={name: float(value) for name, value in asked.budget.model_dump().items()},
            hardware={name: float(value) for name, value in asked.hardware.model_dump().items()},
            now=now,
            ranked=order,
            chosen=chosen.label if chosen else None,
            config=config,
            kernels=list(self.speeds.used.values()),
            checks=self.past.said(machine()),
            seconds=time.perf_counter() - self.began,
        )

    def _profiled(self, workload: Workload, progress: Progress) -> ProfileReport:
        """Measure what binds, on the line that was asked about."""
        asked = self.recipe.advise
        config = ProfileConfig(
            threads=self.recipe.evaluate.threads,
            batch_sizes=[1, asked.batch_size],
            seconds=self.recipe.evaluate.latency_seconds,
            loads=[0.6],
            bandwidths={"asked": asked.hardware.bandwidth_bits_per_second / 8},
        )
        subject = Subject(self.recipe.name, self.trials.exported, workload.example)
        return measure_profile(subject, config, self.recipe.compress, progress=progress)

    def _measure(self) -> Known:
        """The model as it is: from the profile where it has measured that, else now."""
        seconds, fastest = dict[int, float](), dict[int, float]()
        known = {row.batch_size: row.p50_seconds for row in self.profile.latency} if self.profile else {}
        for size, inputs in self.trials.batches.items():
            if size not in known:
                session = graph.session(self.trials.exported, threads=self.recipe.evaluate.threads)
                spent = self.recipe.evaluate.latency_seconds
                known[size] = measure_latency(partial(graph.run, session), inputs, size, spent).p50_seconds
            seconds[size] = known[size]
            fastest[size] = in_turns([self.trials.exported], inputs, self.recipe.advise.kernel_seconds)[0]
        started = time.perf_counter()
        graph.session(self.trials.exported)
        return Known(
            seconds=seconds,
            fastest=fastest,
            plans=self.now.plans,
            session_seconds=time.perf_counter() - started,
            activations_bytes=value_of(self.profile.memory.activations_bytes) if self.profile else None,
            cores=usable_cores(),
        )

    def _try_all(self, progress: Progress) -> list[_Tried]:
        found: list[_Tried] = []
        for done, candidate in enumerate(self.grid):
            progress(done, len(self.grid), candidate.label)
            outcome: Trial | str
            try:
                outcome = self.trials.run(candidate, self.past.error("published_bytes", candidate.technique, machine()))
            except ModelpressError as error:  # this technique is not for this model; the others may be
                outcome = "; ".join(filter(None, (error.doing, error.found, error.expected)))
            found.append(_Tried(candidate, outcome))
        progress(len(self.grid), len(self.grid), "ranked")
        return found

    def _advised(self, tried: _Tried, now: Outlook, recipe: AdviseRecipe, objective: Objective) -> Advised:
        candidate, asked = tried.candidate, recipe.advise
        if isinstance(tried.outcome, str):
            return Advised(
                technique=candidate.technique,
                label=candidate.label,
                stages=candidate.stages,
                in_recipe=True,
                outlook=None,
                gain=NotPredicted(not_predicted=tried.outcome),
                fits=False,
                obstacles=[tried.outcome],
            )
        found = tried.outcome
        then = self._outlook(found, recipe, candidate.technique)
        broken = rank.obstacles(then, asked.budget, asked.hardware, asked.caution)
        said = argue.evidence(found, self.known, now, then, self.speeds)
        return Advised(
            technique=candidate.technique,
            label=candidate.label,
            stages=candidate.stages,
            in_recipe=True,
            outlook=then,
            gain=rank.gain(now, then, objective),
            fits=not broken,
            obstacles=broken,
            evidence=[*said, *found.evidence],
            counter_evidence=argue.counter_evidence(candidate.technique, found, self.known, then, self.speeds),
        )

    def _outlook(self, found: Found, recipe: AdviseRecipe, technique: str) -> Outlook:
        errors = Errors(
            latency_seconds=self.past.error("latency_seconds", technique, machine()),
            batch_seconds=self.past.error("batch_seconds", technique, machine()),
            cold_start_seconds=self.past.error("cold_start_seconds", technique, machine()),
        )
        return outlook(found, self.known, recipe.advise.hardware, self.speeds, errors)


def objective_of(recipe: AdviseRecipe, profile: ProfileReport | None) -> tuple[Objective, str]:
    """What is to be best, and why.

    Raises:
        ConfigError: neither the recipe nor a profile says.
    """
    if recipe.advise.objective is not None:
        return recipe.advise.objective, "asked for by advise.objective"
    if profile is None:
        raise ConfigError(
            f"advising on {recipe.name!r}",
            found="no advise.objective and no profile",
            expected="one of them: what is to be best, or what binds",
            fix="set advise.objective to bytes, latency, throughput, cold-start or cost, or give a profile",
        )
    verdict = profile.verdict
    return rank.BINDING[verdict.binds], f"{verdict.binds} binds: {verdict.reason}"
