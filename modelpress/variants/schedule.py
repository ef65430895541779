"""Which stages variants share, and so what runs before what: nobody computes twice what another one is computing.

Finished stages are found in the work store by what decides them, so variants that run one after the other share them
anyway. Two that run at the same time would both begin the same training: records agree in the end, and the time is
lost. So what several share is a run of its own, and they begin when it has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelpress.config import OptimizeConfig

_ORDER = ("distill", "prune", "export", "quantize", "plan")
Prefix = tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One run."""

    variants: tuple[int, ...]
    """Numbers of the variants that need it."""
    last: str | None
    """The stage that it ends with; None: it is a variant itself, to its end."""
    after: int | None
    """The step that comes before it, by its place; None: none."""


def schedule(recipes: Sequence[OptimizeConfig]) -> list[Step]:
    """What is to be run for these variants, by number; a step stands behind the one that it comes after."""
    chains = [[_prefix(recipe, stage) for stage in recipe.parts] for recipe in recipes]
    sharing: dict[Prefix, list[int]] = {}
    for number, chain in enumerate(chains):
        for prefix in chain:
            sharing.setdefault(prefix, []).append(number)
    steps: list[Step] = []
    places: dict[Prefix, int] = {}
    for number, chain in enumerate(chains):
        after = None
        for place, prefix in enumerate(chain):
            members = sharing[prefix]
            following = sharing[chain[place + 1]] if place + 1 < len(chain) else []
            if len(members) < 2:
                break
            if following == members:
                continue  # the same variants share the next stage too: one run for both
            if prefix not in places:
                places[prefix] = len(steps)
                steps.append(Step(tuple(members), prefix[0], after))
            after = places[prefix]
        steps.append(Step((number,), None, after))
    return steps


def _prefix(recipe: OptimizeConfig, stage: str) -> Prefix:
    """What decides the output of a stage, as far as variants differ: the stage, and the configs up to it."""
    upto = _ORDER[: _ORDER.index(stage) + 1] if stage in _ORDER else ()
    # A plan weighs forms by their coded bytes.
    names = [*upto, "compress"] if stage == "plan" else upto
    configs = [getattr(recipe, name) for name in names]
    return (stage, *(config.fingerprint() if config is not None else "" for config in configs))
