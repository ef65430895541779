"""What is ranked first follows from what binds; no budget is broken by what is foretold. All of it on paper."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modelpress.advise import rank
from modelpress.config import AdviseConfig
from modelpress.reports import Advised, NotPredicted, Predicted
from modelpress.reports.profile import Resource
from tests.advise.paper import FORMS, Paper, compute_binds, near, ranking

PAPERS = st.builds(
    Paper,
    width=st.integers(64, 2048),
    layers=st.integers(1, 12),
    length=st.integers(1, 64),
    batch=st.sampled_from([8, 32, 128]),
)
DROPS = st.lists(st.floats(-0.01, 0.05), min_size=len(FORMS), max_size=len(FORMS))


def asked(objective: str, **options: Any) -> AdviseConfig:
    return AdviseConfig.model_validate({"objective": objective, "batch_size": 32, **options})


@given(PAPERS)
@settings(deadline=None, max_examples=50)
def test_a_slow_network_ranks_by_bytes(paper: Paper) -> None:
    """Transfer takes nearly all of a cold start: fewest bytes first, whatever computes them."""
    _, order = ranking(paper, asked("cold-start", hardware={"bandwidth_bits_per_second": 1e4}))
    first = next(one for one in order if one.in_recipe)
    assert first.technique in ("weight-only", "codebook")
    sizes = [one.outlook.value("published_bytes") for one in order if one.in_recipe and one.outlook]
    assert sizes == sorted(sizes)


@given(PAPERS)
@settings(deadline=None, max_examples=50)
def test_compute_ranks_integers_and_fewer_products(paper: Paper) -> None:
    """Where arithmetic binds at a large batch, what leaves it as it is stands behind what does not."""
    assume(compute_binds(paper))
    _, order = ranking(paper, asked("throughput"))
    places = {one.technique: place for place, one in enumerate(order)}
    quick = [places[name] for name in ("static", "dynamic", "weight-only", "structured-pruning")]
    slow = [places[name] for name in ("lossless", "codebook", "unstructured-pruning")]
    assert max(quick) < min(slow)


@given(st.integers(256, 2048), st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_memory_bandwidth_at_batch_one_ranks_few_bits(width: int, layers: int) -> None:
    """One row at a time: each weight is read for two operations."""
    _, order = ranking(Paper(width=width, layers=layers, length=1), asked("latency"))
    tried = [one.technique for one in order if one.in_recipe]
    assert tried[0] == "weight-only"
    assert tried.index("static") < tried.index("structured-pruning") < tried.index("lossless")


@given(PAPERS, st.integers(2, 8))
@settings(deadline=None, max_examples=30)
def test_what_fits_no_device_is_split(paper: Paper, devices: int) -> None:
    """Too large in every form that is on one device, and small enough on all of them together."""
    memory = round(0.45 * paper.parameters)  # 4 bits take half a byte
    whole = Paper.found(paper, "float", 32, 0.0).weights_bytes
    hardware = {"memory_bytes": memory, "devices": max(devices, round(whole / memory) + 1)}
    _, order = ranking(paper, asked("latency", hardware=hardware))
    assert order[0].technique == "model-parallel"
    assert order[0].fits
    assert not any(one.fits for one in order[1:])
    assert rank.chosen(order, "latency") is None  # no recipe can say it
    small = hardware | {"memory_bytes": round(0.55 * paper.parameters)}
    _, order = ranking(paper, asked("latency", hardware=small))
    assert order[0].technique == "weight-only"


def test_no_risk_is_taken_for_what_is_as_good() -> None:
    """One per cent of time is no reason to change a model, and ten are."""
    paper = Paper()
    for share, expected in ((0.99, "lossless"), (0.9, "static")):
        now, order = ranking(paper, asked("latency"))
        time = now.value("latency_seconds") or 0
        rows = []
        for one in order:
            if one.outlook is None or one.technique not in ("lossless", "static"):
                continue
            changed = {"latency_seconds": near(share * time)} if one.technique == "static" else {}
            stages = {"quantize": {}} if one.technique == "static" else {}
            rows.append(one.model_copy(update={"outlook": one.outlook.model_copy(update=changed), "stages": stages}))
        found = rank.chosen(rows, "latency")
        assert found is not None
        assert found.technique == expected


def test_replicas_are_for_throughput() -> None:
    paper = Paper()
    now, order = ranking(paper, asked("throughput", hardware={"devices": 64}))
    assert order[0].technique == "data-parallel"
    assert order[0].outlook is not None
    assert order[0].outlook.value("throughput_per_second") == pytest.approx(
        64 * (now.value("throughput_per_second") or 0)
    )
    assert rank.chosen(order, "throughput") is not None
    _, order = ranking(paper, asked("latency", hardware={"devices": 64}))
    assert order[0].technique != "data-parallel"


@given(PAPERS, st.lists(st.floats(1e4, 1e10), min_size=2, max_size=2))
@settings(deadline=None, max_examples=30)
def test_a_slower_network_never_advises_more_bytes(paper: Paper, speeds: list[float]) -> None:
    sizes = []
    for speed in sorted(speeds):
        _, order = ranking(paper, asked("cold-start", hardware={"bandwidth_bits_per_second": speed}))
        first = rank.chosen(order, "cold-start")
        assert first is not None
        assert first.outlook is not None
        sizes.append(first.outlook.value("published_bytes"))
    assert sizes[0] <= sizes[1] * (1 + 1e-9)  # type: ignore[operator]


@given(
    PAPERS,
    st.sampled_from(["bytes", "latency", "throughput", "cold-start"]),
    DROPS,
    st.floats(0, 0.05),
    st.floats(0, 1),
    st.floats(0.05, 2),
)
@settings(deadline=None, max_examples=150)
def test_no_budget_is_broken(
    paper: Paper, objective: str, drops: list[float], budget: float, caution: float, share: float
) -> None:
    """By its own predictions: what is chosen keeps every limit, and nothing that does is better."""
    now, _ = ranking(paper, asked(objective))
    size, time = now.value("published_bytes"), now.value("latency_seconds")
    assert size is not None
    assert time is not None
    limits = {
        "max_quality_drop": budget,
        "max_bytes": max(1, round(share * size)),
        "max_latency_seconds": share * time,
        "min_throughput_per_second": (now.value("throughput_per_second") or 0) / share / 3,
    }
    _, order = ranking(paper, asked(objective, budget=limits, caution=caution), drops)
    first = rank.chosen(order, objective)  # type: ignore[arg-type]
    tried = [one for one in order if one.in_recipe]
    for one in tried:  # but for what rounding decides
        assert keeps(one, limits, caution, 1e-9) if one.fits else not keeps(one, limits, caution, -1e-9)
        assert one.fits == (not one.obstacles)
    kept = [one for one in tried if one.fits]
    assert (first is None) == (not kept)
    if first is None:
        return
    assert first in kept
    measure, sign = rank.MEASURES[objective], -1 if objective == "throughput" else 1  # type: ignore[index]
    worst = value(first, measure) / rank.TIE**sign  # of those that are as good, the one that loses least is taken
    assert all(sign * worst <= sign * value(one, measure) * (1 + sign * 1e-9) for one in kept)


def keeps(one: Advised, limits: dict[str, float], caution: float, slack: float) -> bool:
    """The budget again, written another way."""
    assert one.outlook is not None
    drop, size, time, rate = (
        getattr(one.outlook, name)
        for name in ("quality_drop", "published_bytes", "latency_seconds", "throughput_per_second")
    )
    high = [(1 - caution) * found.value + caution * found.high for found in (drop, size, time)]
    low = (1 - caution) * rate.value + caution * rate.low
    close = 1 + slack
    return bool(
        high[0] <= limits["max_quality_drop"] + slack
        and high[1] <= limits["max_bytes"] * close
        and high[2] <= limits["max_latency_seconds"] * close
        and low * close >= limits["min_throughput_per_second"]
    )


def value(one: Advised, measure: Any) -> float:
    assert one.outlook is not None
    found = one.outlook.value(measure)
    assert found is not None
    return found


def test_every_row_has_numbers_or_says_why_not() -> None:
    for devices in (1, 4):
        _, order = ranking(Paper(), asked("latency", hardware={"devices": devices, "cores": 64}))
        for one in order:
            assert one.outlook is not None or one.obstacles
            if isinstance(one.gain, NotPredicted):
                assert one.gain.not_predicted
    # Nothing measured on two cores says anything of 64.
    assert all("64" in one.gain.not_predicted for one in order if one.in_recipe and isinstance(one.gain, NotPredicted))
    assert not any(isinstance(one.gain, Predicted) for one in order if one.in_recipe)


def test_the_gain_is_that_of_what_was_asked() -> None:
    now, order = ranking(Paper(), asked("bytes"))
    four = next(one for one in order if one.technique == "weight-only")
    assert isinstance(four.gain, Predicted)
    assert four.gain.value == pytest.approx(32 / 4.5)
    assert four.gain.low < four.gain.value < four.gain.high
    quarter = now.model_copy(update={"throughput_per_second": near(4 * (now.value("throughput_per_second") or 0))})
    gain = rank.gain(now, quarter, "throughput")
    assert isinstance(gain, Predicted)
    assert gain.value == pytest.approx(4)
    assert isinstance(rank.gain(now, None, "latency"), NotPredicted)


def test_every_resource_that_can_bind_has_an_objective() -> None:
    assert set(rank.BINDING) == set(get_args(Resource))
    assert set(rank.BINDING.values()) <= set(rank.MEASURES)
