"""Which modules a config means: names and globs, each of which must match."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from modelpress.errors import ConfigError


def select(names: Sequence[str], targets: Sequence[str], ignore: Sequence[str], stage: str = "prune") -> list[str]:
    """Names matched by `targets` (all, where it is empty) and not by `ignore`, in their order.

    A pattern matches a module by its name or glob, and all that lies below a module that it matches.

    Args:
        names: dotted names of the modules that the method can take.
        targets: patterns.
        ignore: patterns.
        stage: whose config the patterns stand in.

    Raises:
        ConfigError: a pattern matches none of `names`.
    """
    for option, patterns in (("targets", targets), ("ignore", ignore)):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names[:3])
                raise ConfigError(
                    f"choosing modules by {stage}.{option}",
                    found=f"{pattern!r} matches nothing that {stage} can take",
                    expected=f"a name or glob such as {', '.join(near)}",
                    fix=f"the {len(names)} modules that this method can take here: {_listed(names)}",
                )
    chosen = [name for name in names if not targets or any(matches(name, pattern) for pattern in targets)]
    return [name for name in chosen if not any(matches(name, pattern) for pattern in ignore)]


def matches(name: str, pattern: str) -> bool:
    """Whether a glob matches a dotted name or one of its ancestors."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _listed(names: Iterable[str], limit: int = 40) -> str:
    known = list(names)
    return ", ".join(known[:limit]) + (f" and {len(known) - limit} more" if len(known) > limit else "")
