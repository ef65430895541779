"""What variants share runs once, before them."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from modelpress.config import OptimizeConfig, VariantsConfig
from modelpress.variants.expand import expand
from modelpress.variants.schedule import Step, schedule

BASE: dict[str, Any] = {"name": "small", "workload": {"kind": "custom", "factory": "a:B"}}


def steps(base: dict[str, Any], **variants: Any) -> list[Step]:
    found = expand(OptimizeConfig.model_validate({**BASE, **base}), VariantsConfig.model_validate(variants))
    return schedule([one.recipe for one in found])


def test_a_trunk_and_a_branch_for_each_sparsity() -> None:
    """Distillation is shared by all six, each pruning and its graph by two."""
    found = steps(
        {"distill": {}},
        grid={"prune.sparsity": [0.3, 0.5, 0.7], "quantize.method": ["static", "dynamic"]},
    )
    assert found == [
        Step((0, 1, 2, 3, 4, 5), "distill", None),
        Step((0, 1), "export", 0),
        Step((0,), None, 1),
        Step((1,), None, 1),
        Step((2, 3), "export", 0),
        Step((2,), None, 4),
        Step((3,), None, 4),
        Step((4, 5), "export", 0),
        Step((4,), None, 7),
        Step((5,), None, 7),
    ]


def test_variants_of_coding_share_all_but_that_and_a_plan_weighs_it() -> None:
    coding = {"grid": {"compress.min_decode_bytes_per_second": [0, 1]}}
    assert steps({"quantize": {}}, **coding)[0] == Step((0, 1), "quantize", None)
    assert steps({"plan": {}}, **coding)[0] == Step((0, 1), "export", None)


def test_one_that_leaves_a_stage_out_shares_what_comes_before() -> None:
    found = steps({"distill": {}, "prune": {}}, also=[{}, {"prune": None}, {"distill": None, "prune": None}])
    assert found == [
        Step((0, 1, 2), "source", None),
        Step((0, 1), "distill", 0),
        Step((0,), None, 1),
        Step((1,), None, 1),
        Step((2,), None, 0),
    ]


def test_one_variant_shares_nothing() -> None:
    assert steps({}, also=[{}]) == [Step((0,), None, None)]


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "distill.temperature": st.sampled_from([2.0, 4.0]),
                "prune.sparsity": st.sampled_from([0.3, 0.6]),
                "export.opset": st.sampled_from([19, 20]),
                "quantize.smooth": st.sampled_from([0.0, 0.5]),
            },
        ),
        min_size=1,
        max_size=12,
        unique_by=lambda one: str(sorted(one.items())),
    )
)
def test_nothing_that_two_want_is_run_by_both(also: list[dict[str, Any]]) -> None:
    found = expand(OptimizeConfig.model_validate(BASE), VariantsConfig.model_validate({"also": also}))
    recipes = [one.recipe for one in found]
    made = schedule(recipes)
    assert sorted(step.variants[0] for step in made if step.last is None) == list(range(len(recipes)))
    recorded: list[set[str]] = []  # what is there when a step has ended
    ran: list[str] = []
    for place, step in enumerate(made):
        assert step.after is None or step.after < place
        recipe = recipes[step.variants[0]]
        stages = recipe.parts if step.last is None else recipe.parts[: recipe.parts.index(step.last) + 1]  # type: ignore[arg-type]
        # What decides a stage, written down as the record's key has it: everything before it, and its own config.
        keys, chain = [], ""
        for stage in stages:
            config = getattr(recipe, stage, None)
            chain += f"/{stage}:{config.fingerprint() if config is not None else ''}"
            keys.append(chain)
        there = recorded[step.after] if step.after is not None else set()
        ran += [key for key in keys if key not in there]
        recorded.append(there | set(keys))
    assert len(ran) == len(set(ran))
