"""Pieces of a self-contained web page: tables, histograms as inline SVG, embedded pictures. All text is escaped.

Style and script of the page lie beside this file, as page.css and page.js.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Sequence
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

_HERE = Path(__file__).parent


def page(title: str, sections: Sequence[str], script: bool = False) -> str:
    """A whole document without any reference to another file; `script`: with the one that searches scenes."""
    code = f"<script>\n{(_HERE / 'page.js').read_text()}</script>\n" if script else ""
    style = (_HERE / "page.css").read_text()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body>\n"
        + "\n".join(sections)
        + f"\n{code}</body></html>\n"
    )


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], focus: str | None = None, words: Collection[int] = (0,)
) -> str:
    """Rows of text; the row whose first cell is `focus` stands out. Columns of `words` are set left, numbers right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        sides = [' class="text"' if index in words else "" for index in range(len(row))]
        return "".join(f"<{tag}{side}>{escape(cell)}</{tag}>" for side, cell in zip(sides, row, strict=True))

    head, body = cells("th", header), ""
    for row in rows:
        mark = ' class="focus"' if row[0] == focus else ""
        body += f"<tr{mark}>{cells('td', row)}</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def note(text: str) -> str:
    """A line in small type."""
    return f'<p class="note">{escape(text)}</p>'


def badge(text: str, good: bool) -> str:
    """A coloured word."""
    return f'<span class="badge{"" if good else " partial"}">{escape(text)}</span>'


def histogram(title: str, values: np.ndarray, bins: int = 20, color: str = "#0a58d0") -> str:
    """Distribution of values in [0, 1] as inline SVG; bar heights are shares of all values."""
    values = values[np.isfinite(values)]
    counts, _ = np.histogram(values, bins=bins, range=(0.0, 1.0))
    width, height, base, left = 260, 128, 104, 8
    bar = (width - 2 * left) / bins
    top = max(int(counts.max(initial=0)), 1)
    parts = [
        f'<svg role="img" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui,sans-serif"><title>{escape(title)}</title>',
        f'<text x="{left}" y="13" font-size="12" font-weight="600" fill="#1c2430">{escape(title)}</text>',
    ]
    for index, count in enumerate(counts):
        size = (base - 26) * count / top
        x, low = left + index * bar, index / bins
        label = f"{low:.2f} to {low + 1 / bins:.2f}: {count} of {len(values)}"
        parts.append(
            f'<rect x="{x + 0.6:.1f}" y="{base - size:.1f}" width="{bar - 1.2:.1f}" height="{size:.1f}" '
            f'fill="{color}"><title>{label}</title></rect>'
        )
    parts.append(f'<line x1="{left}" x2="{width - left}" y1="{base}" y2="{base}" stroke="#aab2bd"/>')
    for fraction, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = left + fraction * (width - 2 * left)
        place = f'x="{x:.0f}" y="{base + 15}" text-anchor="{anchor}"'
        parts.append(f'<text {place} font-size="11" fill="#5b6675">{fraction:g}</text>')
    return "".join([*parts, "</svg>"])


def figure(picture: bytes, kind: str, alt: str) -> str:
    """An embedded WebP."""
    data = base64.b64encode(picture).decode()
    return f'<div class="{kind}"><img alt="{escape(alt)}" src="data:image/webp;base64,{data}"></div>'


def webp_of(drawing: Figure, quality: int = 82) -> bytes:
    """A drawing as WebP: a third of a PNG's or JPEG's size, read by every browser of the last years."""
    raster, file = io.BytesIO(), io.BytesIO()
    drawing.savefig(raster, format="png", bbox_inches="tight", pad_inches=0.02, pil_kwargs={"compress_level": 1})
    Image.open(raster).convert("RGB").save(file, "WEBP", quality=quality, method=4)
    return file.getvalue()
