"""Writes constraints.txt: the versions that the suite ran with, of all that the images install.

::

    python infra/images/lock.py > infra/images/constraints.txt      # in the environment of `make venv`

It walks the requirements of the installed packages, from modelpress and its extras on. What stands in `BESIDE` is in no
environment of ours; the images that install it name its version themselves.
"""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
EXTRAS = ("demo", "docker", "kubernetes")
"""Those of pyproject that an image installs."""
BESIDE = {"prefect-redis", "psycopg2-binary", "flask-wtf", "wtforms", "onnxruntime"}
"""In the servers' images, and the CPU build of ONNX Runtime in the serving one."""


def wanted() -> list[Requirement]:
    """What pyproject asks for: the dependencies and `EXTRAS`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *[line for extra in EXTRAS for line in project["optional-dependencies"][extra]]]
    return [Requirement(line) for line in lines]


def closure(roots: list[Requirement]) -> dict[str, str]:
    """Versions of the installed packages that `roots` need, themselves included, by canonical name.

    Raises:
        LookupError: one is not installed, or not in a version that is asked for.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(one, extra) for one in roots for extra in ("", *one.extras)]
    while waiting:
        one, extra = waiting.pop()
        name = canonicalize_name(one.name)
        if (name, extra) in seen or name in BESIDE or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        seen.add((name, extra))
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise LookupError(f"{name} is not installed: run `make venv`") from None
        if not one.specifier.contains(installed.version, prereleases=True):
            raise LookupError(f"{name} {installed.version} is installed, {one} is asked for: run `make venv`")
        found[name] = installed.version
        for line in installed.requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(Requirement(_bare(needed)), inner) for inner in ("", *needed.extras)]
    return found


def _bare(requirement: Requirement) -> str:
    """A requirement whose marker was looked at already."""
    return f"{requirement.name}{requirement.specifier}"


def main() -> int:
    """Print the constraints."""
    try:
        found = closure(wanted())
    except LookupError as error:
        print(f"lock: {error}", file=sys.stderr)
        return 3
    print("# Written by infra/images/lock.py; the versions that the suite ran with.")
    for name, version in sorted(found.items()):
        print(f"{name}=={version.partition('+')[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
