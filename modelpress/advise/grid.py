"""Which recipes are weighed against each other: a grid of techniques with their settings, made for one graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from modelpress.advise.graphs import Traits
from modelpress.config import AdviseRecipe, OptimizeConfig
from modelpress.config.recipes import parse_config

LOOSE = 0.05
"""`quantize.max_quality_drop` of all candidates: what a technique costs is judged by the metric; the stage's own budget
of agreement is a second net, far out."""
MIN_COVERAGE = 0.1
"""A network of convolutions may have few weights in its products."""
CODEBOOK_BITS = (5, 4, 3)
PLAN_BUDGETS = (0.002, 0.01, 0.05)
"""Disagreement that plans for bytes may spend."""
SPARSITIES = (0.25, 0.5)
ZEROS = 0.5

Stages = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One recipe of the grid."""

    technique: str
    """The family that it stands for."""
    label: str
    """In words."""
    stages: Stages = field(default_factory=dict)
    """What differs from a recipe without stages: `distill`, `prune`, `quantize`, `plan`."""

    def config(self, recipe: AdviseRecipe) -> OptimizeConfig:
        """The whole recipe, checked by the model that runs it.

        Raises:
            ConfigError: what the grid made is no legal recipe.
        """
        asked = recipe.advise
        margin = asked.budget.max_quality_drop
        evaluate = recipe.evaluate.model_dump(mode="json", exclude_unset=True)
        document = {
            "name": recipe.name,
            "workload": recipe.workload.model_dump(mode="json", exclude_unset=True),
            "export": recipe.export.model_dump(mode="json", exclude_unset=True),
            **self.stages,
            "compress": recipe.compress.model_dump(mode="json", exclude_unset=True),
            "evaluate": evaluate | {"max_quality_drop": margin, "batch_sizes": [1, asked.batch_size]},
            "gate": {"margin": margin} if margin else {},
        }
        return parse_config({key: value for key, value in document.items() if value != {}}, origin=self.label)


def candidates(recipe: AdviseRecipe, traits: Traits) -> list[Candidate]:
    """The grid for a graph; labels are unique."""
    wanted = set(recipe.advise.techniques) | {"lossless"}
    return [one for one in _all(recipe, traits) if one.technique in wanted]


def _all(recipe: AdviseRecipe, traits: Traits) -> Iterator[Candidate]:
    yield Candidate("lossless", "float, losslessly coded")
    finishes = list(_quantized(traits))
    yield from finishes
    yield from _plans(recipe, traits)
    shortened = [one for one in finishes if one.label in _after_pruning(traits)]
    for base in [*_pruned(recipe, traits), *_students(recipe)]:
        yield base
        for finish in shortened:
            yield Candidate(base.technique, f"{base.label}, then {finish.label}", base.stages | finish.stages)
    zeros = Candidate("unstructured-pruning", f"{ZEROS:.0%} zeros by magnitude", {"prune": _zeros(recipe)})
    yield zeros
    yield from (
        Candidate(zeros.technique, f"{zeros.label}, then {one.label}", zeros.stages | one.stages)
        for one in finishes
        if one.label in (_codebook(4), _static_label(traits, mixed=True))
    )


def _after_pruning(traits: Traits) -> set[str]:
    """Finishes that are also tried behind other techniques: one for time, two for bytes."""
    return {_static_label(traits, mixed=True), _codebook(4), _codebook(5), "dynamic int8"}


def _codebook(bits: int) -> str:
    return f"codebook of {bits} bits"


def _static_label(traits: Traits, *, mixed: bool) -> str:
    return "static int8, convolutions in float" if mixed and traits.convolutions else "static int8"


def _quantized(traits: Traits) -> Iterator[Candidate]:
    tables = {"embeddings": True} if traits.tables else {}
    loose = {"max_quality_drop": LOOSE, "min_coverage": MIN_COVERAGE, **tables}
    if traits.products:
        yield Candidate("dynamic", "dynamic int8", {"quantize": {"method": "dynamic", **loose}})
    static = {"method": "static", "calibration": "minmax", **loose}
    yield Candidate("static", "static int8", {"quantize": static})
    if traits.convolutions and traits.products:
        mixed = static | {"ignore": list(traits.convolutions)}
        yield Candidate("static", _static_label(traits, mixed=True), {"quantize": mixed})
    weights = {"method": "weight-only", **loose}
    yield Candidate("weight-only", "float8 weights", {"quantize": weights | {"algorithm": "fp8"}})
    if traits.products:
        eight = weights | {"algorithm": "rtn", "num_bits": 8}
        yield Candidate("weight-only", "int8 weights", {"quantize": eight})
        four = weights | {"algorithm": "gptq", "num_bits": 4, "group_size": 32}
        yield Candidate("weight-only", "int4 weights by GPTQ", {"quantize": four})
    for bits in CODEBOOK_BITS:
        yield Candidate("codebook", _codebook(bits), {"quantize": {"method": "codebook", "num_bits": bits, **loose}})


def _plans(recipe: AdviseRecipe, traits: Traits) -> Iterator[Candidate]:
    for budget in PLAN_BUDGETS:
        stage = {
            "max_disagreement": budget,
            "num_bits": [8, 6, 5, 4, 3],
            "scales": ["channel"],
            "group_sizes": [],
            "sparsity": [0.0],
            "sensitivity_samples": 8,
            "points": 0,
        }
        yield Candidate("plan", f"plan for bytes, disagreement {budget:g}", {"plan": stage})
    if traits.products:
        batch = recipe.advise.batch_size if recipe.advise.objective in ("throughput", "cost") else 1
        stage = {
            "objective": "seconds",
            "max_disagreement": PLAN_BUDGETS[1],
            "kernels": ["int8", "nbits-8"],
            "group_sizes": [128],
            "batch_size": batch,
            "sensitivity_samples": 8,
            "points": 0,
        }
        yield Candidate("plan", f"plan for seconds at batch {batch}", {"plan": stage})


def _pruned(recipe: AdviseRecipe, traits: Traits) -> Iterator[Candidate]:
    structures = ["channels", "neurons"] if traits.convolutions else ["neurons"]
    for sparsity in SPARSITIES:
        stage = {"method": "structured", "structures": structures, "sparsity": sparsity, **_recovery(recipe)}
        yield Candidate("structured-pruning", f"{sparsity:.0%} of {' and '.join(structures)}", {"prune": stage})


def _zeros(recipe: AdviseRecipe) -> Stages:
    return {"method": "magnitude", "sparsity": ZEROS, **_recovery(recipe)}


def _students(recipe: AdviseRecipe) -> Iterator[Candidate]:
    for number, architecture in enumerate(recipe.advise.students, start=1):
        stage = {"student": "architecture", "architecture": architecture, "temperature": 4.0, "alpha": 0.9}
        stage["train"] = {"epochs": recipe.advise.train_epochs, "learning_rate": 0.004}
        yield Candidate("distill", f"student {number}", {"distill": stage})


def _recovery(recipe: AdviseRecipe) -> Stages:
    epochs = recipe.advise.train_epochs
    return {"recovery": {"epochs": epochs, "learning_rate": 0.003}} if epochs else {}
