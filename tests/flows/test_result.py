"""How a run reads: the table, the report and the plots."""

from __future__ import annotations

from pathlib import Path

from flows import figures
from flows.result import StageRow, markdown, table
from modelpress.reports import CodedTensor, CompressReport, LatencyReport, QualityReport

QUALITY = QualityReport(metric="accuracy", samples=400, value=0.98333, low=0.9712, high=0.9904)
LATENCY = [
    LatencyReport(batch_size=size, calls=9, p50_seconds=0.002 * size, p99_seconds=0.003, throughput_per_second=1234.5)
    for size in (1, 32)
]
ROWS = [
    StageRow(
        stage="source",
        runtime="torch",
        quality=QUALITY,
        size_bytes=2_800_123,
        latency=LATENCY,
        seconds=9.04,
        reused=False,
    ),
    StageRow(stage="compress", size_bytes=40_000, seconds=0.5, reused=True),
]


def test_the_table_has_each_measurement_and_a_dash_where_there_is_none() -> None:
    assert table(ROWS) == [
        {
            "stage": "source",
            "quality": "0.9833 [0.9712, 0.9904]",
            "bytes": "2,800,123",
            "p50 ms b1": "2.00",
            "p50 ms b32": "64.00",
            "/s b32": "1,234",
            "seconds": "9.0",
        },
        {
            "stage": "compress",
            "quality": "–",
            "bytes": "40,000",
            "p50 ms b1": "–",
            "p50 ms b32": "–",
            "/s b32": "–",
            "seconds": "0.5 (reused)",
        },
    ]


def test_the_markdown_table_has_one_line_per_stage() -> None:
    lines = markdown(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert {line.count("|") for line in lines} == {8}


def test_the_plots_are_drawn_without_a_display(tmp_path: Path) -> None:
    tensor = CodedTensor(
        name="w",
        dtype="I8",
        shape=[4],
        codec="zstd",
        raw_bytes=4,
        stored_bytes=3,
        entropy_bound_bytes=2.0,
        decode_seconds=0.1,
    )
    report = CompressReport(raw_bytes=4, stored_bytes=3, compression_ratio=4 / 3, coded_share=1.0, tensors=[tensor])
    for name, compressed in (("whole", report), ("cut short", None)):
        figures.draw(ROWS, compressed, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
