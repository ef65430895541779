"""What speaks for a technique and what against it, in numbers; what was measured here comes first."""

from __future__ import annotations

from collections import Counter

from modelpress.advise.outlook import Found, Known
from modelpress.advise.work import Kernel, Speeds, Work, alike
from modelpress.reports import Outlook, Predicted

MOST_CLASSES = 4
"""Classes of products that are named."""

FLOAT = "it computes in float as before: fewer bytes, and no less time in a call"
EARLIER: dict[str, str] = {
    "dynamic": "ranges of activations are searched in every call; convolutions it leaves in float, as it would make "
    "them slower (docs/log.md)",
    "static": "on the pruned digits classifier static int8 was not dependably faster: 372,029/s in float and 436,707 "
    "in int8 in one run, 490,390 and 404,589 in another (docs/log.md)",
    "unstructured-pruning": "zeros are no speed-up: dense kernels multiply by them as well (docs/log.md)",
    "structured-pruning": "what repair restores on calibration data is not all of it: a fifth of an encoder's neurons, "
    "repaired on 96 pairs, lost too much for a one-point margin (docs/log.md)",
    "distill": "a student's quality is known once it is trained: what is foretold is that of the trial's own training",
}
"""What was measured on other models: less than a number of this one, and more than nothing."""


def evidence(found: Found, known: Known, now: Outlook, then: Outlook, speeds: Speeds) -> list[str]:
    """Numbers for a technique that was tried."""
    lines = []
    before, after = now.value("published_bytes"), then.value("published_bytes")
    if before and after:
        lines.append(f"{before:,.0f} → {after:,.0f} bytes, {before / after:.2f}×")
    for batch in (1, known.batch_size):
        lines += [f"batch {batch}: {line}" for line in _classes(found.plans[batch], speeds, faster=True)]
    return lines


def counter_evidence(technique: str, found: Found, known: Known, then: Outlook, speeds: Speeds) -> list[str]:
    """Numbers against it."""
    lines = []
    for batch in (1, known.batch_size):
        lines += [f"batch {batch}: {line}" for line in _classes(found.plans[batch], speeds, faster=False)]
    untouched = _untouched(found, known, speeds)
    if untouched:
        lines.append(untouched)
    same = all(found.plans[batch] == known.plans[batch] for batch in found.plans)
    if same:
        lines.append(FLOAT)
    if found.decode_seconds > 0:
        lines.append(f"decoding takes {found.decode_seconds:.3f} s of CPU time at each load")
    drop = then.quality_drop
    if isinstance(drop, Predicted) and drop.high > 0:
        lines.append(f"quality may drop by {drop.high:.4g} ({drop.value:.4g} is foretold; {drop.by})")
    lines += _odd_widths(found, known)
    if technique in EARLIER:
        lines.append(EARLIER[technique])
    return lines


def _classes(plan: list[tuple[Work, Kernel]], speeds: Speeds, *, faster: bool) -> list[str]:
    """Classes of products that a kernel makes faster, or slower, those of most seconds first."""
    rows: list[tuple[float, str]] = []
    among = alike(plan)
    for (work, kernel), count in Counter(plan).items():
        before, after = speeds.seconds(work, "float", among[work]), speeds.seconds(work, kernel, among[work])
        if kernel == "float" or not (isinstance(before, Predicted) and isinstance(after, Predicted)):
            continue
        change = count * (after.value - before.value)
        if change == 0 or (change < 0) != faster:
            continue
        text = f"{count} × {work}: {1e6 * before.value:.1f} µs in float, {1e6 * after.value:.1f} µs as {kernel}"
        rows.append((abs(change), text))
    return [text for _, text in sorted(rows, reverse=True)[:MOST_CLASSES]]


def _untouched(found: Found, known: Known, speeds: Speeds) -> str:
    """The share of the float products' time in those that stay in float beside others that do not."""
    plan = found.plans[known.batch_size]
    if all(kernel == "float" for _, kernel in plan):
        return ""
    seconds, among = {True: 0.0, False: 0.0}, alike(plan)
    for (work, kernel), count in Counter(plan).items():
        one = speeds.seconds(work, "float", among[work])
        seconds[kernel == "float"] += count * one.value if isinstance(one, Predicted) else 0.0
    share = seconds[True] / max(seconds[True] + seconds[False], 1e-12)
    return f"products with {share:.0%} of the products' time stay in float" if share > 0.005 else ""


def _odd_widths(found: Found, known: Known) -> list[str]:
    """Convolutions whose channels a vector register does not divide."""
    before = {work.weight for work, _ in known.plans[1]}
    odd = sorted({work.weight[0] for work, _ in found.plans[1] if work.op_type == "Conv" and work.weight not in before})
    widths = [width for width in odd if width % 8]
    if not widths:
        return []
    listed = ", ".join(map(str, widths))
    return [f"convolutions of {listed} channels, no multiple of 8, ran at half speed elsewhere (docs/log.md)"]
