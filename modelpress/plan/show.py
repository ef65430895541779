"""A plan as tables, sentences and files."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import PlanConfig
from modelpress.plan import figure
from modelpress.reports import PlanOutline, PlanPoint, PlanReport
from modelpress.store.local import check_free, local_errors

Table = list[dict[str, str]]


def outline(rows: Sequence[PlanOutline]) -> Table:
    """A row per weight that would be planned."""
    return [
        {
            "weight": row.name,
            "shape": "×".join(map(str, row.shape)),
            "read by": str(len(row.nodes)),
            "candidates": str(len(row.candidates)),
            "measurements": f"{row.least_measurements} to {len(row.candidates)}",
        }
        for row in rows
    ]


def effort(rows: Sequence[PlanOutline], config: PlanConfig) -> str:
    """How much a plan takes."""
    least, most = sum(row.least_measurements for row in rows), sum(len(row.candidates) for row in rows)
    if config.objective == "seconds":
        return (
            f"{len(rows)} products, at most {most} measurements on {config.sensitivity_samples} samples; the time of "
            f"each kernel for each class of products; {config.points} and a few more on the whole calibration split"
        )
    whole = len(config.num_bits) * len(config.sharing) * len(config.sparsity) + config.points
    return (
        f"{len(rows)} weights, {least} to {most} measurements on {config.sensitivity_samples} samples, "
        f"up to {whole} and a few more on the whole calibration split"
    )


def tensors(report: PlanReport) -> Table:
    """A row per weight."""
    timed = report.objective == "seconds"
    return [
        {
            "weight": row.name,
            "shape": "×".join(map(str, row.shape)),
            "form": row.form,
            "coded bytes": f"{row.coded_bytes + row.inline_bytes:,}",
            **({"ms off": f"{1000 * (row.seconds or 0):.3f}"} if timed else {}),
            "alone": f"{row.disagreement:.2e}" + ("" if row.is_measured else " foretold"),
        }
        for row in report.tensors
    ]


def points(report: PlanReport) -> Table:
    """The front and the uniform settings, by what was made least."""
    timed = report.objective == "seconds"
    rows: list[PlanPoint] = sorted(
        [*report.front, *report.uniform], key=lambda point: (point.seconds or 0.0, point.coded_bytes)
    )
    return [
        {
            "choice": row.label,
            **({"ms a call": f"{1000 * (row.seconds or 0):.3f}"} if timed else {}),
            "coded bytes": f"{row.coded_bytes:,}",
            "disagreement": f"{row.disagreement:.3e}",
            "foretold": "" if row.predicted_disagreement is None else f"{row.predicted_disagreement:.3e}",
        }
        for row in rows
    ] or [{"choice": "none"}]


def summary(report: PlanReport) -> str:
    """What was asked, reached, and is worth on held-out data."""
    found = report.quality
    lines = [
        f"{report.float_bytes:,} bytes coded in float, {report.coded_bytes:,} planned; "
        f"the graph's file {report.file_bytes:,}",
        f"disagreement {report.disagreement:.3e} on calibration data (foretold {report.predicted_disagreement:.3e}, "
        f"asked at most {report.max_disagreement:.3e}), {report.held_out_disagreement:.3e} on held-out data",
        f"{found.metric} {found.value:.4f} on {found.samples} held-out samples",
    ]
    if report.untrained_disagreement is not None:
        lines.insert(2, f"disagreement {report.untrained_disagreement:.3e} on calibration data before the training")
    if report.seconds is not None and report.float_seconds is not None and report.predicted_seconds is not None:
        lines.insert(
            0,
            f"{1000 * report.float_seconds:.3f} ms a call in float, {1000 * report.seconds:.3f} planned "
            f"(foretold {1000 * report.predicted_seconds:.3f}): {report.float_seconds / report.seconds:.2f}× as fast",
        )
    if found.difference is not None:
        lines[-1] += (
            f", {found.difference:+.4f} to the float graph "
            f"({found.confidence:.0%} interval {found.difference_low:+.4f} to {found.difference_high:+.4f})"
        )
    return "\n".join(lines)


def check_folder(folder: Path, name: str) -> None:
    """Refuse to write over another plan.

    Raises:
        ConfigError: a file of this name is there, or the folder is no folder.
    """
    check_free(folder, _paths(folder, name), f"writing plan {name!r}")


def write(made: Checkpoint, report: PlanReport, folder: Path, name: str) -> list[Path]:
    """The checkpoint, the graph as other tools read it, the report and the plot: all of them, or none.

    Raises:
        StoreError: they cannot be written, or something has come in their place.
    """
    targets = _paths(folder, name)
    with local_errors(f"writing plan {name!r} to {folder}", writing=True):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".plan-") as partial:
            checkpoint, model, data, document, plot = _paths(Path(partial), name)
            checkpoint.write_bytes(made.to_bytes())
            onnx.save_model(graph.join(made), str(model), save_as_external_data=True, location=data.name)
            document.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
            figure.draw(report, plot)
            made_ = [
                (path, target)
                for path, target in zip((checkpoint, model, data, document, plot), targets, strict=True)
                if path.exists()  # a graph without large tensors has no data beside it
            ]
            return _rename_all(made_)


def _rename_all(pairs: Sequence[tuple[Path, Path]]) -> list[Path]:
    """Give files their names, over nothing; where one cannot have it, those that have theirs are removed again."""
    done: list[Path] = []
    try:
        for path, target in pairs:
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            path.rename(target)
            done.append(target)
    except BaseException:
        for target in done:
            target.unlink()
        raise
    return done


def _paths(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}.{ending}" for ending in ("safetensors", "onnx", "onnx.data", "json", "png")]
