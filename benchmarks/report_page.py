"""Size and time of the report's page: `python -m benchmarks.report_page [--quick] [--write]`.

Three pages, each of a pack that is published first and read back from its store: the digits run with everything that
its run reported; the sentence encoder, coded without loss, without a run; and a made-up pack of 3,000 tensors with
3,000 sensitivities. A page must take at most 3 MB and come out the same twice; the run fails otherwise. Time is from
the store to the text, the best of three.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks._encoder import encoder_config
from benchmarks._report import Row, main
from benchmarks._servers import QUIET
from modelpress.checkpoint import Checkpoint
from modelpress.page import Story, read_story, render, report_page
from modelpress.reports import QuantizeReport, RunReport, RunStage, SensitivityRow
from modelpress.store import Store, open_store

MOST_BYTES = 3_000_000
TENSORS, QUICK_TENSORS = 3_000, 300
RUNS = 3


def measure(quick: bool) -> Iterable[Row]:
    """Rows of each page."""
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        for case, story in _stories(Path(folder), quick):
            yield from _page(case, story)


def _stories(folder: Path, quick: bool) -> Iterator[tuple[str, Callable[[], Story]]]:
    store, name = _digits(folder / "digits", "digits-quick" if quick else "digits")
    yield "digits, with its run", lambda: read_story(store, name, "champion")
    if not quick:
        encoder = open_store(str(folder / "encoder"))
        digest = _publish(encoder, folder / "encoder-shards", _encoder(), "encoder")
        yield "sentence encoder, coded without loss", lambda: read_story(encoder, "encoder", digest)
    many = QUICK_TENSORS if quick else TENSORS
    large = open_store(str(folder / "large"))
    made = _publish(large, folder / "large-shards", _made_up(many), "large")
    yield f"made up, {many:,} tensors", lambda: read_story(large, "large", made, _sensitivities(made, many))


def _page(case: str, story: Callable[[], Story]) -> Iterator[Row]:
    pages, read, drawn = set(), [], []
    for _ in range(RUNS):
        began = time.perf_counter()
        found = story()
        at = time.perf_counter()
        pages.add(render(report_page(found)))
        read.append(at - began)
        drawn.append(time.perf_counter() - at)
    (page,) = pages  # the same each time
    size = len(page.encode())
    if size > MOST_BYTES:
        raise RuntimeError(f"{case}: a page of {size} bytes, of at most {MOST_BYTES}")
    tensors = len(found.manifest.tensors) if found.manifest is not None else 0
    for metric, unit, value in (
        ("tensors", "1", float(tensors)),
        ("page", "bytes", float(size)),
        ("plots", "1", float(page.count("<svg"))),
        ("reading the store", "s", min(read)),
        ("drawing", "s", min(drawn)),
    ):
        yield Row(case, "modelpress", metric, unit, value)


def _digits(home: Path, recipe: str) -> tuple[Store, str]:
    """A run of the shipped recipe in this process, which keeps its report beside its pack."""
    home.mkdir(parents=True)
    os.environ |= {**QUIET, "PREFECT_HOME": str(home / "prefect"), "MODELPRESS_HOME": str(home)}
    from benchmarks.orchestration import CONFIGS
    from flows.optimize import optimize
    from modelpress.config import load_config
    from modelpress.settings import read_settings

    result = optimize(load_config(CONFIGS / f"{recipe}.yaml"))
    settings = read_settings()
    return open_store(settings.store_uri, settings), result.name


def _encoder() -> Checkpoint:
    from modelpress.checkpoint import from_module
    from modelpress.workload import load_workload

    return from_module(load_workload(encoder_config(calibration=8, evaluation=8)).source())


def _made_up(count: int) -> Checkpoint:
    import torch

    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{number // 10}.part{number % 10}.weight" for number in range(count)]
    return Checkpoint("torch", {name: torch.randn(32, 32, generator=generator) for name in names}, {}, {})


def _publish(store: Store, folder: Path, checkpoint: Checkpoint, name: str) -> str:
    from modelpress.compress import compress
    from modelpress.config import CompressConfig, ShardConfig
    from modelpress.publish import publish
    from modelpress.shard import draft_manifest, write_shards

    coded, report = compress(checkpoint, CompressConfig())
    shards, _ = write_shards(coded, ShardConfig(), folder)
    manifest, blobs = draft_manifest(name, coded, shards, reports={"compress": report})
    return publish(store, manifest, shards, blobs, source_bytes=report.raw_bytes).pack


def _sensitivities(pack: str, count: int) -> RunReport:
    rows = [
        SensitivityRow(node=f"/model/layers.{number}/MatMul", disagreement=1 / (number + 1), kept_float=number < 9)
        for number in range(count)
    ]
    report = QuantizeReport(
        method="static", eligible_weights=1, quantized_weights=1, coverage=1.0, agreement=1.0, sensitivity=rows
    )
    stage = RunStage(stage="quantize", size_bytes=1, report=report.model_dump(mode="json"))
    return RunReport(name="large", pack=pack, stages=[stage])


if __name__ == "__main__":
    main("report_page", measure)
