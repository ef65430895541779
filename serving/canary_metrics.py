"""What a server counts of its canaries, for Prometheus; looked up when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from modelpress.canary.tally import ArmTally
from serving.canary import Canaries

ARMS = ("champion", "candidate")


class CanaryMetrics(Collector):
    """One canary per model; its counters begin at 0 with it, and go with it."""

    def __init__(self, canaries: Canaries) -> None:
        self._canaries = canaries

    def collect(self) -> Iterator[Metric]:
        """All families, also those without a canary."""
        gauges = {
            "step": GaugeMetricFamily("modelpress_canary_step", "Step, from 1.", labels=["model"]),
            "share": GaugeMetricFamily("modelpress_canary_share", "Share of the requests.", labels=["model", "mode"]),
            "stopped": GaugeMetricFamily(
                "modelpress_canary_stopped", "Whether this server stopped by itself.", labels=["model"]
            ),
        }
        outcomes = CounterMetricFamily(
            "modelpress_canary_requests", "Requests that a coin dealt.", labels=["model", "arm", "outcome"]
        )
        mirrored = {
            "mirrored": CounterMetricFamily("modelpress_canary_mirrored", "Requests run again.", labels=["model"]),
            "disagreement": CounterMetricFamily(
                "modelpress_canary_disagreement", "Sum of their shares of samples that differ.", labels=["model"]
            ),
            "dropped": CounterMetricFamily(
                "modelpress_canary_dropped", "Requests that the queue had no room for.", labels=["model"]
            ),
        }
        for trial in self._canaries.trials():
            name, state, steps = trial.model.name, trial.state, trial.counter.tallies()
            gauges["step"].add_metric([name], state.step + 1)
            gauges["share"].add_metric([name, state.now.mode], state.now.share)
            gauges["stopped"].add_metric([name], float(trial.stopped is not None))
            for arm in ARMS:
                total = sum((getattr(one, arm) for one in steps), ArmTally())
                for outcome, count in (("error", total.errors), ("slow", total.slow), ("other", _rest(total))):
                    outcomes.add_metric([name, arm, outcome], count)
            for what, family in mirrored.items():
                family.add_metric([name], sum(getattr(one, what) for one in steps))
        yield from (*gauges.values(), outcomes, *mirrored.values())


def _rest(arm: ArmTally) -> int:
    """Answers that were not slow, or came before it was known what is."""
    return arm.requests - arm.errors - arm.slow
