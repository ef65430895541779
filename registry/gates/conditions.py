"""What else must hold: bytes, speed, coverage, origin, and that what was judged is what is published."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase

from modelpress.config import GateConfig
from modelpress.reports import Check, Verdict
from registry.gates.evidence import Evidence, Figures, Origin, Published

PUBLISHED, SIGNATURE = "published bytes", "signature"
UNKNOWN = "unknown"
"""What the manifest says of a licence that nobody named."""


def conditions(evidence: Evidence, config: GateConfig) -> Iterator[Check]:
    """A check for each condition that the config asks for, and for those that are always asked."""
    yield _at_least("compression ratio", evidence.compression_ratio, config.min_compression_ratio)
    if config.max_published_bytes:
        yield _small_enough(evidence.published, config.max_published_bytes)
    if config.min_speedup > 0:
        yield _at_least("speed-up", evidence.speedup, config.min_speedup)
    if config.hardware is not None:
        yield from _fast_enough(evidence, config, config.hardware)
    if evidence.quantized:
        yield _covered("quantization coverage", evidence.coverage, config.min_quantization_coverage, "quantized")
    if evidence.pruned:
        yield _covered("pruning coverage", evidence.pruning_coverage, config.min_pruning_coverage, "pruned")
    yield _read_again(evidence.published)
    if config.require_signature:
        yield _signed(evidence.published)
    if config.require_lineage:
        yield _known(evidence.origin)
    if config.licences:
        yield _licensed(evidence.origin, config.licences)


def _at_least(name: str, value: float | None, least: float) -> Check:
    if value is None or not math.isfinite(value):
        return Check(name=name, verdict="fail", reason=f"not measured, at least {least:g}× is asked")
    verdict: Verdict = "pass" if value >= least else "fail"
    return Check(name=name, verdict=verdict, reason=f"{value:.2f}×, at least {least:g}× is asked")


def _small_enough(published: Published | None, most: int) -> Check:
    name = "size"
    if published is None:
        return Check(name=name, verdict="fail", reason=f"not measured, at most {most:,} bytes are asked")
    verdict: Verdict = "pass" if published.size_bytes <= most else "fail"
    return Check(name=name, verdict=verdict, reason=f"{published.size_bytes:,} bytes, at most {most:,} are asked")


def _fast_enough(evidence: Evidence, config: GateConfig, hardware: str) -> Iterator[Check]:
    """Figures of the serving hardware; those of another class say nothing."""
    found = evidence.figures.get(hardware)
    if found is None:
        known = ", ".join(sorted(evidence.figures)) or "no class that has a name"
        reason = (
            f"measured on {known}; set MODELPRESS_HARDWARE={hardware} on a machine of that class and run the flow "
            "evaluate-published, or the recipe, there"
        )
        yield Check(name=f"figures on {hardware}", verdict="inconclusive", reason=reason)
        return
    if config.provider is not None:
        verdict: Verdict = "pass" if found.provider == config.provider else "fail"
        reason = f"{found.provider or 'none known'} on {hardware}, {config.provider} is asked"
        yield Check(name="execution provider", verdict=verdict, reason=reason)
    if config.max_p99_seconds:
        yield _p99(found, config.max_p99_seconds, hardware)
    if config.min_throughput_per_second:
        yield _throughput(found, config.min_throughput_per_second, hardware)


def _p99(found: Figures, most: float, hardware: str) -> Check:
    value, asked = found.p99_seconds, f"at most {most * 1000:g} ms is asked"
    if value is None or not math.isfinite(value):
        return Check(name="p99", verdict="fail", reason=f"not measured on {hardware}, {asked}")
    verdict: Verdict = "pass" if value <= most else "fail"
    return Check(name="p99", verdict=verdict, reason=f"{value * 1000:.3f} ms on {hardware}, {asked}")


def _throughput(found: Figures, least: float, hardware: str) -> Check:
    value, asked = found.throughput_per_second, f"at least {least:g} is asked"
    if value is None or not math.isfinite(value):
        return Check(name="throughput", verdict="fail", reason=f"not measured on {hardware}, {asked}")
    verdict: Verdict = "pass" if value >= least else "fail"
    return Check(name="throughput", verdict=verdict, reason=f"{value:,.1f} samples/s on {hardware}, {asked}")


def _covered(name: str, coverage: float | None, least: float, done: str) -> Check:
    """A stage that touched nothing has failed, whatever is asked."""
    if coverage is None or not math.isfinite(coverage):
        return Check(name=name, verdict="fail", reason="not measured")
    verdict: Verdict = "pass" if coverage > 0 and coverage >= least else "fail"
    asked = f", at least {least:.1%} is asked" if least else ""
    return Check(name=name, verdict=verdict, reason=f"{coverage:.1%} of the eligible weights are {done}{asked}")


def _read_again(published: Published | None) -> Check:
    if published is None:
        return Check(name=PUBLISHED, verdict="fail", reason="not downloaded again; nobody overrides this")
    # Without where from: servers show the reasons to whoever may ask.
    reason = f"{published.read_bytes:,} bytes downloaded again, every digest holds"
    return Check(name=PUBLISHED, verdict="pass", reason=reason)


def _signed(published: Published | None) -> Check:
    signers = published.signed_by if published is not None else None
    if signers is None:
        reason = "not checked, as MODELPRESS_TRUST names no trust file here; nobody overrides this"
        return Check(name=SIGNATURE, verdict="fail", reason=reason)
    if not signers:
        return Check(name=SIGNATURE, verdict="fail", reason="nobody signed; nobody overrides this")
    return Check(name=SIGNATURE, verdict="pass", reason=f"signed by {', '.join(signers)}")


def _known(origin: Origin | None) -> Check:
    missing = origin.missing if origin is not None else ("manifest",)
    if missing:
        reason = f"the manifest does not say its {', '.join(missing)}; publish it by a run of the line"
        return Check(name="lineage", verdict="fail", reason=reason)
    return Check(name="lineage", verdict="pass", reason="source, recipe and libraries are in the manifest")


def _licensed(origin: Origin | None, allowed: list[str]) -> Check:
    name, asked = "licence", f"{' or '.join(allowed)} is asked"
    licence = origin.licence if origin is not None else UNKNOWN
    if licence.strip().lower() in ("", UNKNOWN):
        reason = f"nobody said which, {asked}; give the workload `licence`, or its folder a model card"
        return Check(name=name, verdict="fail", reason=reason)
    fits = any(fnmatchcase(licence.lower(), pattern.lower()) for pattern in allowed)
    return Check(name=name, verdict="pass" if fits else "fail", reason=f"{licence[:200]}, {asked}")
