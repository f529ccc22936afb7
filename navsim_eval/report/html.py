"""Pieces of a self-contained web page: tables, histograms as inline SVG, embedded pictures. All text is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

_STYLE = """
:root { --ink:#1c2430; --soft:#5b6675; --line:#dfe3e8; --accent:#0a58d0; --good:#0b6b3a; --warn:#a15c00; }
* { box-sizing:border-box; }
body { margin:0 auto; max-width:1180px; padding:28px 24px 60px; color:var(--ink); background:#fff;
       font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
h1 { font-size:25px; margin:0 0 4px; } h2 { font-size:19px; margin:38px 0 10px; }
h3 { font-size:15px; margin:20px 0 6px; }
p.note, figcaption { color:var(--soft); margin:4px 0 10px; font-size:13.5px; }
.badge { display:inline-block; padding:2px 10px; border-radius:11px; color:#fff; font-size:13px; font-weight:600;
         background:var(--good); margin-right:8px; } .badge.partial { background:var(--warn); }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; font-variant-numeric:tabular-nums; font-size:14px; min-width:50%; }
th, td { padding:5px 11px; border-bottom:1px solid var(--line); text-align:right; white-space:nowrap; }
th { color:var(--soft); font-weight:600; border-bottom:2px solid var(--line); }
th:first-child, td:first-child { text-align:left; }
tr.focus td { background:#eef4fd; font-weight:600; }
.row { display:flex; flex-wrap:wrap; gap:18px; align-items:flex-start; }
.scene { border:1px solid var(--line); border-radius:8px; padding:14px 16px; margin:14px 0; }
.scene img { max-width:100%; display:block; border-radius:4px; }
.scene .bev { flex:0 1 460px; } .scene .camera { flex:1 1 560px; min-width:300px; }
.scene h3 { margin:0 0 8px; } code { font-size:13px; background:#f3f5f7; padding:1px 5px; border-radius:4px; }
details { margin-top:10px; } pre { background:#f6f7f9; padding:12px; overflow-x:auto; font-size:12.5px; }
"""


def page(title: str, sections: Sequence[str]) -> str:
    """A whole document without any reference to another file."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], focus: str | None = None) -> str:
    """Rows of text; the row whose first cell is `focus` stands out."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        mark = ' class="focus"' if row[0] == focus else ""
        body += f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


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
    """An embedded PNG or JPEG."""
    mime = "image/png" if picture.startswith(b"\x89PNG") else "image/jpeg"
    data = base64.b64encode(picture).decode()
    return f'<div class="{kind}"><img alt="{escape(alt)}" src="data:{mime};base64,{data}"></div>'


def png_of(drawing: Figure) -> bytes:
    """A line drawing as a PNG."""
    file = io.BytesIO()
    _raster(drawing).convert("RGB").save(file, "PNG", optimize=True)
    return file.getvalue()


def jpeg_of(drawing: Figure, quality: int = 85) -> bytes:
    """A drawing over a photograph as a JPEG."""
    file = io.BytesIO()
    _raster(drawing).convert("RGB").save(file, "JPEG", quality=quality)
    return file.getvalue()


def _raster(drawing: Figure) -> Image.Image:
    file = io.BytesIO()
    drawing.savefig(file, format="png")
    return Image.open(file)
