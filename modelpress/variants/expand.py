"""A recipe and a grid become recipes, each of them legal and none of them twice."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from modelpress.config import OptimizeConfig, VariantsConfig, parse_config
from modelpress.errors import ConfigError

STAGES = ("distill", "prune", "export", "quantize", "plan", "compress")
"""What may differ: the stages that make bytes. Another model, other data or another way to measure would be no variant
of the same thing."""
MOST = 256
"""More are no search any more, and each is a run of its own."""
_SHOWN = 5
_TRIAL_LATENCY_SECONDS = 0.001


@dataclass(frozen=True)
class Variant:
    """A recipe that differs from another in a few settings."""

    number: int
    """In the order of the grid, from 0 on."""
    settings: Mapping[str, Any]
    """What it sets, by dotted name."""
    recipe: OptimizeConfig
    """The whole."""

    @property
    def label(self) -> str:
        """What it sets, for people."""
        return label(self.settings)


def label(settings: Mapping[str, Any]) -> str:
    """`prune.sparsity=0.5, quantize.method=static`."""
    shown = ", ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()
    )
    return shown or "as it is"


def expand(recipe: OptimizeConfig, variants: VariantsConfig) -> list[Variant]:
    """All variants: the grid's combinations, the last setting changing fastest, then the further ones.

    Raises:
        ConfigError: a setting that is unknown or may not differ, a recipe that is not legal, one that comes twice, more
            than `MOST`, or one whose times are measured beside others.
    """
    combinations = math.prod(map(len, variants.grid.values())) if variants.grid else 0
    if combinations + len(variants.also) > MOST:
        raise ConfigError(
            f"making variants of {recipe.name!r}",
            found=f"{combinations + len(variants.also):,}",
            expected=f"at most {MOST}",
            fix="leave values out, or search in two steps: coarse first, then around the best",
        )
    document = recipe.model_dump(mode="json")
    found, refused = list[Variant](), list[str]()
    for settings in _all(variants):
        try:
            made = _checked(document, settings, variants.workers)
        except ConfigError as error:
            refused.append(f"{label(settings)}: {(error.found or error.doing).strip()}")
        else:
            found.append(Variant(len(found), settings, made))
    if refused:
        more = [f"and {len(refused) - _SHOWN} more"] if len(refused) > _SHOWN else []
        raise ConfigError(
            f"making variants of {recipe.name!r}",
            found="\n    ".join(["", *refused[:_SHOWN], *more]).strip("\n"),
            expected="legal recipes alone",
            fix="what not every combination may have stands in a list of its own: `also`",
        )
    _check_distinct(recipe.name, found)
    return found


def trial(recipe: OptimizeConfig) -> OptimizeConfig:
    """The recipe as a variant runs it: quality and bytes, in one process, without what is measured for its time."""
    evaluate = recipe.evaluate.model_copy(
        update={"batch_sizes": [1], "latency_seconds": min(_TRIAL_LATENCY_SECONDS, recipe.evaluate.latency_seconds)}
    )
    return recipe.model_copy(update={"evaluate": evaluate, "profile": None, "workers": None, "promote": False})


def parse_setting(text: str) -> tuple[str, list[Any]]:
    """`prune.sparsity=0.5,0.7` as a name and its values; each is read as YAML.

    Raises:
        ConfigError: it is not of this form.
    """
    name, equals, values = text.partition("=")
    try:
        found = yaml.safe_load(f"[{values}]") if equals else None
    except yaml.YAMLError as error:
        raise _malformed(text, str(error)) from error
    if not name.strip() or not found:
        raise _malformed(text, "no name" if equals and found else "no values")
    return name.strip(), found


def _malformed(text: str, found: str) -> ConfigError:
    return ConfigError(
        f"reading --set {text!r}", found=found, expected="NAME=VALUE,VALUE,…, such as prune.sparsity=0.5,0.7"
    )


def _all(variants: VariantsConfig) -> Iterator[dict[str, Any]]:
    if variants.grid:
        for values in itertools.product(*variants.grid.values()):
            yield dict(zip(variants.grid, values, strict=True))
    yield from variants.also


def _checked(document: Mapping[str, Any], settings: Mapping[str, Any], workers: int) -> OptimizeConfig:
    for name in settings:
        _check_name(name, settings)
    changed = json.loads(json.dumps(document))
    for name, value in settings.items():
        _set(changed, name, value)
    made = parse_config(changed, origin=label(settings))
    if made.plan is not None and made.plan.objective == "seconds" and workers > 1:
        raise ConfigError(
            "checking a plan for seconds",
            found="a plan for seconds, whose kernels would be timed beside other variants",
        )
    return made


def _check_name(name: str, settings: Mapping[str, Any]) -> None:
    if name.partition(".")[0] not in STAGES:
        raise ConfigError("checking a setting", found=f"{name}: variants may differ in {', '.join(STAGES)}")
    inside = [other for other in settings if other.startswith(f"{name}.")]
    if inside:
        raise ConfigError("checking a setting", found=f"{name} and {inside[0]}, which is a part of it")


def _set(document: dict[str, Any], name: str, value: Any) -> None:
    """Set a field; a stage that the recipe leaves out is switched on by a field below it."""
    *path, last = name.split(".")
    at = document
    for depth, step in enumerate(path, start=1):
        if at.get(step) is None:
            at[step] = {}
        at = at[step]
        if not isinstance(at, dict):
            raise ConfigError("checking a setting", found=f"{name}: {'.'.join(path[:depth])} has no fields")
    at[last] = value


def _check_distinct(name: str, found: Sequence[Variant]) -> None:
    """Refuse recipes that make the same bytes."""
    seen: dict[str, Variant] = {}
    for one in found:
        first = seen.setdefault(one.recipe.fingerprint(), one)
        if first is not one:
            raise ConfigError(
                f"making variants of {name!r}",
                found=f"the same recipe twice: {first.label}; and {one.label}",
                expected="each once",
                fix="leave one out; what only says where a stage is computed makes no variant",
            )
