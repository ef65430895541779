"""How a recipe is cut into jobs."""

from __future__ import annotations

import pytest

from flows.jobs import Job, check_jobs
from flows.stages import check_part
from modelpress.config import OptimizeConfig
from modelpress.errors import ConfigError

RECIPE = {"name": "cut", "workload": {"kind": "image-classification", "model": "digits-cnn", "data": "digits"}}
PLAIN = OptimizeConfig.model_validate(RECIPE)
FULL = OptimizeConfig.model_validate(
    {**RECIPE, "distill": {"architecture": {}}, "prune": {}, "quantize": {"method": "dynamic"}}
)


def test_the_parts_are_what_the_recipe_switches_on_in_order() -> None:
    assert PLAIN.parts == ["source", "export"]
    assert FULL.parts == ["source", "distill", "prune", "export", "quantize"]


def test_a_stage_that_the_recipe_leaves_out_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"(?s)stage 'prune' in recipe 'cut'.*source, export"):
        check_part(PLAIN, "prune")
    check_part(FULL, "prune")


@pytest.mark.parametrize("last", [["prune", "distill"], ["distill", "distill"], ["quantize", "source"]])
def test_jobs_out_of_order_are_refused(last: list[str]) -> None:
    with pytest.raises(ConfigError, match="the order source, distill, prune, export, quantize"):
        check_jobs(FULL, [Job.model_validate({"last": stage}) for stage in last])


def test_jobs_in_order_pass() -> None:
    check_jobs(FULL, [])
    check_jobs(FULL, [Job(last="distill"), Job(last="quantize", deployment="optimize-part/optimize-part")])
