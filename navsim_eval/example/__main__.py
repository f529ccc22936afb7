"""Print the tables of docs/metrics.md and write its picture."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from navsim_eval.example.explain import example_figure, example_tables
from navsim_eval.files import atomic_write

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "metrics.png"


def main() -> None:
    """Tables to the terminal, picture (a palette is enough for a line drawing) to docs/images."""
    print(example_tables())
    raster, small = io.BytesIO(), io.BytesIO()
    example_figure().savefig(raster, format="png")
    Image.open(raster).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    print(f"written: {atomic_write(PICTURE, small.getvalue())}")


if __name__ == "__main__":
    main()
