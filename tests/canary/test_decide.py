"""What follows from counts: a table of situations, and what holds in all of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress.canary import decide, tally
from modelpress.canary.decide import advance, findings, levels
from modelpress.canary.tally import ArmTally, StepTally, Tallies
from modelpress.config import CanaryConfig, CanaryStep
from tests.canary.states import CANARY, SHADOW, by, config, seen, shadowed, split, state

GOOD = (shadowed(400, 2.0), split(1000, slow=50))


@pytest.mark.parametrize(
    ("step", "found", "elapsed", "kind", "said"),
    [
        (0, seen(), 0, "wait", "0 of 10 requests in step 1"),
        (0, seen(), 86_401, "rollback", "inconclusive"),
        (0, seen(shadowed(10)), 9.9, "wait", "10 of 10 seconds in step 1"),
        (0, seen(shadowed(9)), 11, "wait", "9 of 10 requests"),
        (0, seen(shadowed(10)), 10, "step", "disagreement: open"),
        (0, seen(shadowed(10)), -500, "wait", "0 of 10 seconds"),
        (0, seen(shadowed(20, 20)), 1, "rollback", "disagreement: alarm"),
        (0, seen(shadowed(1000, 12)), 11, "step", "disagreement: clear"),
        (0, seen(shadowed(1000, 200)), 11, "rollback", "disagreement: alarm, 0.2000"),
        (1, seen(*GOOD), 11, "promote", "errors: clear"),
        (1, seen(GOOD[0], split(20)), 11, "wait", "not shown yet: errors: open"),
        (1, seen(GOOD[0], split(20)), 90_000, "rollback", "inconclusive"),
        (1, seen(split(1000, slow=50)), 11, "wait", "not shown yet: disagreement: open, nothing seen"),
        (1, seen(GOOD[0], split(1000, errors=100, slow=50)), 1, "rollback", "errors: alarm, 0.1000"),
        (1, seen(GOOD[0], split(1000, slow=900)), 1, "rollback", "latency: alarm"),
        (1, seen(GOOD[0], split(40, errors=40)), 0, "rollback", "errors: alarm, 1.0000"),
        (1, seen(*GOOD, condition="stopped", reason="its graph broke"), 11, "rollback", "its graph broke"),
        (1, seen(*GOOD, condition="loading"), 11, "promote", "errors: clear"),
    ],
)
def test_the_table(step: int, found: Tallies, elapsed: float, kind: str, said: str) -> None:
    done = advance(state(step), found, elapsed)
    assert (done.kind, [line for line in done.reasons if said in line][:1] != []) == (kind, True), done.reasons


def test_what_hits_both_alike_is_no_alarm() -> None:
    """Half of all requests fail, whoever answers: an overload, not the candidate."""
    both = ArmTally(requests=1000, errors=500, timed=500, slow=450)
    overload = StepTally(step=1, champion=both, candidate=both)
    assert advance(state(1), seen(GOOD[0], overload), 1).kind == "wait"


def test_two_servers_are_looked_at_together() -> None:
    """Neither has seen enough by itself."""
    one = tally.add_up([by(GOOD[0], split(300, errors=8, slow=15))])
    both = tally.add_up([by(GOOD[0], split(300, errors=8, slow=15)) for _ in range(4)])
    assert advance(state(1), one, 1).kind == "wait"
    assert advance(state(1), both, 1).kind == "rollback"
    assert both.servers == 4


def test_damaged_tallies_keep_a_canary_from_going_on_and_not_from_being_stopped() -> None:
    damaged = replace(seen(*GOOD), damaged=["tally 0123: no JSON"])
    assert advance(state(1), damaged, 11).reasons == ["tally 0123: no JSON"]
    assert advance(state(1), damaged, 90_000).kind == "rollback"
    bad = replace(seen(split(40, errors=40)), damaged=["tally 0123: no JSON"])
    assert advance(state(1), bad, 0).kind == "rollback"


def test_more_servers_than_share_alpha_are_told() -> None:
    many = tally.add_up([by(*GOOD) for _ in range(3)])
    made = config(servers=2)
    assert "3 servers take part" in advance(state(1, made), many, 11).reasons[0]


def test_no_alarm_is_enough_where_nothing_else_is_asked() -> None:
    made = config(require_clear=False)
    assert advance(state(1, made), seen(GOOD[0], split(20)), 11).kind == "promote"


def test_steps_without_a_shadow_have_no_test_of_disagreement_and_alpha_is_shared_by_two() -> None:
    made = config(CANARY)
    assert decide.tests(made) == ["errors", "latency"]
    assert levels(made) == (0.05 / 2 / 2, 0.05 / 2 / 2 / 64)
    assert decide.tests(config(SHADOW)) == ["disagreement"]
    assert levels(config(SHADOW))[0] == 0.025


def test_a_server_alone_takes_more_to_be_sure() -> None:
    central, local = levels(config())
    found = seen(GOOD[0], split(1000, errors=27, slow=50))
    (errors,) = [one for one in findings(config(), found, central) if one.test == "errors"]
    (alone,) = [one for one in findings(config(), found, local) if one.test == "errors"]
    assert (errors.verdict, alone.verdict) == ("alarm", "open")
    assert errors.evidence == alone.evidence
    assert alone.alarm_at == pytest.approx(errors.alarm_at + math.log(64))


arms = st.integers(0, 3000).flatmap(
    lambda n: st.tuples(st.integers(0, n), st.integers(0, n)).flatmap(
        lambda ends: st.integers(0, min(ends)).map(
            lambda slow: ArmTally(requests=n, errors=n - ends[1], timed=ends[1], slow=min(slow, ends[1]))
        )
    )
)
steps = st.builds(
    lambda index, one, two, mirrored: StepTally(
        step=index, champion=one, candidate=two, mirrored=mirrored[0], disagreement=mirrored[1]
    ),
    st.integers(0, 1),
    arms,
    arms,
    st.integers(0, 3000).flatmap(lambda n: st.tuples(st.just(n), st.floats(0, n))),
)


@settings(max_examples=60)
@given(st.lists(steps, max_size=6))
def test_the_order_and_the_number_of_servers_change_nothing(found: list[StepTally]) -> None:
    apart = tally.add_up([by(one) for one in found])
    turned = tally.add_up([by(one) for one in reversed(found)])
    assert set(apart.steps) == set(turned.steps)
    for index, one in apart.steps.items():
        other = turned.steps[index]
        assert one.model_copy(update={"disagreement": 0.0}) == other.model_copy(update={"disagreement": 0.0})
        assert one.disagreement == pytest.approx(other.disagreement)


@settings(max_examples=60)
@given(steps, st.integers(0, 1), st.floats(-1e6, 1e6))
def test_whatever_was_seen_there_is_an_action_with_its_reasons(found: StepTally, step: int, elapsed: float) -> None:
    done = advance(state(step), seen(found), elapsed)
    assert done.reasons
    assert all(math.isfinite(one.evidence) and math.isfinite(one.evidence_kept) for one in done.findings)
    if done.kind in ("step", "promote"):
        assert found.step == step
        assert found.ran >= 10
        assert not [one for one in done.findings if one.verdict == "alarm"]
        assert done.kind == "step" or all(one.verdict == "clear" for one in done.findings)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"steps": []}, "at least 1"),
        ({"steps": [{"share": 0.95}]}, "at most 0.9"),
        ({"steps": [{"share": 0}]}, "greater than 0"),
        ({"alpha": 0}, "greater than 0"),
        ({"steps": [{"hold_seconds": 10}], "max_step_seconds": 10}, "max_step_seconds"),
        ({"shares": [0.5]}, "shares"),
    ],
)
def test_a_config_that_can_not_work_is_refused(document: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CanaryConfig.model_validate(document)


def says_first(
    number: int, share: float, counted: Callable[[int], StepTally], test: str, verdict: str, alpha: float
) -> bool:
    """Whether a test says so at so many requests of the candidate, and not at one less; one step's share is chosen."""
    made = CanaryConfig().model_copy(update={"steps": [*CanaryConfig().steps[:1], CanaryStep(share=share)]})

    def says(number: int) -> bool:
        found = findings(made, seen(counted(number)), alpha)
        return {one.test: one.verdict for one in found}[test] == verdict

    return says(number) and not says(number - 1)


def arms_of(number: int, share: float, errors: int = 0, slow: float = 0.0) -> StepTally:
    others = round(number * (1 - share) / share)
    one = ArmTally(requests=number, errors=errors, timed=number - errors, slow=int((number - errors) * slow))
    return StepTally(step=1, champion=ArmTally(requests=others, timed=others, slow=int(others * slow)), candidate=one)


def test_what_the_documentation_says_that_it_takes() -> None:
    """The table of `docs/canary.md`."""
    text = (Path(__file__).parents[2] / "docs" / "canary.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\d*) ?\|$", text, re.MULTILINE)
    central, local = levels(CanaryConfig())
    cases: list[tuple[float, Callable[[int], StepTally], str, str]] = [
        (0.05, lambda n: arms_of(n, 0.05, errors=n), "errors", "alarm"),
        (0.5, lambda n: arms_of(n, 0.5, errors=n), "errors", "alarm"),
        (0.05, lambda n: arms_of(n, 0.05), "errors", "clear"),
        (0.5, lambda n: arms_of(n, 0.5, slow=0.05), "latency", "clear"),
        (0.05, lambda n: shadowed(n, n), "disagreement", "alarm"),
        (0.05, lambda n: shadowed(n, n / 5), "disagreement", "alarm"),
        (0.05, lambda n: shadowed(n, n / 100), "disagreement", "clear"),
    ]
    assert len(rows) == len(cases)
    for (what, together, alone), case in zip(rows, cases, strict=True):
        assert says_first(int(together), *case, central), what
        assert not alone or says_first(int(alone), *case, local), what
