"""Model registries beside a store, as whoever reads one makes them."""

from __future__ import annotations

from collections.abc import Sequence

from modelpress.page.fleet import Fleet
from modelpress.page.registry import Registry, Version

ADDRESS = "http://mlflow.example:5000"


def version(name: str, number: int, pack: str, word: str = "") -> Version:
    return Version(
        name=name,
        number=str(number),
        pack=pack,
        uri=f"s3://bucket/packs/{name}/{pack}.json{word}" if pack else "",
        verdict=("pass", "fail", "inconclusive")[number % 3] if pack else "",
        notes=[f"overridden: Anna{word}"] if number % 3 == 2 else [],
        compression_ratio=4.0 + number if pack else None,
        speedup=None,
        tags={"accuracy": "0.972", f"team{word}": f"vision{word}"},
    )


def registry(fleet: Fleet, word: str = "", others: Sequence[Version] = ()) -> Registry:
    """A registry that has a version for each pack of the fleet, one whose pack is missing, and one without a pack."""
    found = list(others)
    aliases: dict[tuple[str, str], str] = {}
    for name, packs in fleet.packs.items():
        for number, pack in enumerate(sorted(packs), 1):
            found.append(version(name, number, pack, word))
            aliases |= {
                (one.name, one.alias): str(number) for one in fleet.served if (one.name, one.pack) == (name, pack)
            }
        found.append(version(name, len(packs) + 1, "f" * 64, word))
        aliases[name, "challenger"] = str(len(packs) + 1)
    found.append(version("somebody's own model", 1, "", word))
    aliases["somebody's own model", "champion"] = "7"
    return Registry(
        address=ADDRESS + word,
        models=sorted({one.name for one in found}),
        versions=sorted(found, key=lambda one: (one.name, -int(one.number))),
        aliases=aliases,
    )
