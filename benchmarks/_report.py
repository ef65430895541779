"""What all benchmarks share: rows, the command line, JSON and the table under `results/`.

`python -m benchmarks.NAME [--quick] [--json PATH] [--write]` prints the table; `--write` keeps it as
`benchmarks/results/NAME_HARDWARE_DATE.md`. Our own rows have the system `modelpress`. A value that could not be
measured (a peer that is not installed) is None, and never 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"
VERSIONED = (
    "modelpress",
    "torch",
    "onnxruntime-gpu",
    "onnxruntime",
    "zstandard",
    "zipnn",
    "lz4",
    "blosc2",
    "openzl",
    "pcodec",
    "dahuffman",
    "constriction",
    "numba",
    "numpy",
    "prefect",
    "mlflow",
    "boto3",
    "jax",
    "torchax",
)


class Row(NamedTuple):
    """One figure: of which case, by which system, what, in which unit."""

    case: str
    system: str
    metric: str
    unit: str
    value: float | None


def main(
    name: str, measure: Callable[[bool], Iterable[Row]], argv: Sequence[str] | None = None, *, note: str = ""
) -> None:
    """Run a benchmark from the command line; `measure(quick)` yields its rows, `note` says how to read them."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores; less exact")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows as JSON")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/")
    parser.add_argument("--hardware", default=hardware(), help="name of this machine in the file's name")
    options = parser.parse_args(argv)
    rows = []
    for row in measure(options.quick):
        rows.append(row)
        print(f"{row.case}: {row.system}: {row.metric} {shown(row.value)} {row.unit}", file=sys.stderr, flush=True)
    text = page(name, rows, options.hardware, quick=options.quick, note=note)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        day = datetime.now(UTC).date().isoformat()
        path = RESULTS / f"{name}_{options.hardware}_{day}.md"
        path.write_text(text)
        print(f"wrote {path}", file=sys.stderr)


def page(name: str, rows: Sequence[Row], machine: str, *, quick: bool = False, note: str = "") -> str:
    """A markdown page: how to repeat it, on what it ran, the note, and a table per case with a column per metric."""
    command = f"python -m benchmarks.{name}" + (" --quick" if quick else "")
    parts = [
        f"# {name}\n",
        f"`{command}` on {machine}, Python {platform.python_version()}, {_versions()}.\n",
        *([note] if note else []),
    ]
    for case in dict.fromkeys(row.case for row in rows):
        parts.append(f"## {case}\n\n{table([row for row in rows if row.case == case])}")
    return "\n".join(parts)


def table(rows: Sequence[Row]) -> str:
    """Systems down, metrics across."""
    metrics = list(dict.fromkeys((row.metric, row.unit) for row in rows))
    values = {(row.system, row.metric, row.unit): row.value for row in rows}
    lines = [
        "| system | "
        + " | ".join(f"{metric}, {unit}" if unit not in ("", "1") else metric for metric, unit in metrics)
        + " |",
        "|---|" + "---:|" * len(metrics),
    ]
    for system in dict.fromkeys(row.system for row in rows):
        cells = [shown(values[system, *metric]) if (system, *metric) in values else "" for metric in metrics]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(value: float | None) -> str:
    """Four significant digits, whole numbers whole."""
    if value is None:
        return "not measured"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", " ")
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}".replace(",", " ")


def hardware() -> str:
    """Short name of this machine: processor and the cores that this process may use."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        model = found[1]
    words = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*", "", model, flags=re.IGNORECASE)
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{slug}-{cores}-cores"


def _versions() -> str:
    found = []
    for package in VERSIONED:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
