"""Draw docs/img/line.svg, the picture of the line: `python docs/img/make_line.py`."""

from __future__ import annotations

from html import escape
from pathlib import Path

STAGES = [
    ("source", "your model,\nyour data"),
    ("distill", "teacher\n→ student"),
    ("prune", "zeros, channels,\nneurons, heads"),
    ("export", "ONNX\ngraph"),
    ("quantize", "int8, few bits,\nor by a plan"),
    ("compress", "Huffman,\nrun-length, zstd"),
    ("shard", "objects of\na chosen size"),
    ("upload", "by content,\nmanifest last"),
]
AFTER = [
    ("register", "MLflow version\n= pack digest"),
    ("gate", "pass, fail,\ninconclusive"),
    ("promote", "append to the\npointer log"),
    ("serve", "verify, load,\nswap"),
]
BOX_W, BOX_H, GAP, LEFT = 112, 74, 14, 16
INK, LINE, PAPER = "#1f2933", "#52606d", "#ffffff"
FILLS = {"model": "#e3f2fd", "bytes": "#e8f5e9", "decision": "#fff3e0"}


def _box(x: int, y: int, title: str, text: str, fill: str) -> list[str]:
    lines = text.split("\n")
    parts = [f'<rect x="{x}" y="{y}" width="{BOX_W}" height="{BOX_H}" rx="8" fill="{fill}" stroke="{LINE}"/>']
    centre = x + BOX_W // 2
    parts.append(f'<text x="{centre}" y="{y + 22}" class="title">{escape(title)}</text>')
    parts += [
        f'<text x="{centre}" y="{y + 42 + 16 * i}" class="text">{escape(line)}</text>' for i, line in enumerate(lines)
    ]
    return parts


def _arrow(x1: int, y1: int, x2: int, y2: int, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{LINE}" marker-end="url(#head)"{dash}/>'


def draw() -> str:
    """The whole picture, as SVG text."""
    step = BOX_W + GAP
    width, top, bottom = LEFT * 2 + step * len(STAGES) - GAP, 16, 208
    parts: list[str] = []
    for i, (title, text) in enumerate(STAGES):
        x = LEFT + i * step
        parts += _box(x, top, title, text, FILLS["model" if i < 5 else "bytes"])
        if i:
            parts.append(_arrow(x - GAP, top + BOX_H // 2, x - 2, top + BOX_H // 2))
    gauge_y = top + BOX_H + 32
    left, right = LEFT, LEFT + step * 5 - GAP
    label = "evaluate after each: quality with its interval, bytes, latency · over budget = stop, with the reason"
    parts.append(
        f'<rect x="{left}" y="{gauge_y}" width="{right - left}" height="34" rx="8" '
        f'fill="{FILLS["decision"]}" stroke="{LINE}"/>'
    )
    parts.append(f'<text x="{(left + right) // 2}" y="{gauge_y + 22}" class="text">{escape(label)}</text>')
    for i in range(5):
        x = LEFT + i * step + BOX_W // 2
        parts.append(_arrow(x, top + BOX_H, x, gauge_y - 2, dashed=True))
    offset = LEFT + step * (len(STAGES) - len(AFTER))
    for i, (title, text) in enumerate(AFTER):
        x = offset + i * step
        parts += _box(x, bottom, title, text, FILLS["bytes" if title in {"serve"} else "decision"])
        if i:
            parts.append(_arrow(x - GAP, bottom + BOX_H // 2, x - 2, bottom + BOX_H // 2))
    last, turn, first = LEFT + step * 7 + BOX_W // 2, (gauge_y + 52), offset + BOX_W // 2
    parts.append(
        f'<path d="M{last} {top + BOX_H} V{turn} H{first} V{bottom - 2}" fill="none" '
        f'stroke="{LINE}" marker-end="url(#head)"/>'
    )
    stores = "stage outputs: content-addressed, resumable · packs: shards + manifest + pointer, in S3 or a folder"
    parts.append(f'<text x="{LEFT}" y="{bottom + 30}" class="left">{escape(stores.split(" · ")[0])}</text>')
    parts.append(f'<text x="{LEFT}" y="{bottom + 50}" class="left">{escape(stores.split(" · ")[1])}</text>')
    height = bottom + BOX_H + 16
    style = (
        f".title{{font:600 15px sans-serif;fill:{INK};text-anchor:middle}}"
        f".text{{font:12px sans-serif;fill:{INK};text-anchor:middle}}.left{{font:12px sans-serif;fill:{INK}}}"
    )
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="The stages of modelpress, from source to serve"><style>{style}</style>{head}'
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    Path(__file__).with_name("line.svg").write_text(draw(), encoding="utf-8")
