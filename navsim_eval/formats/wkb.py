"""The outline of well-known binary geometries, walked without building them."""

from __future__ import annotations

import struct

SINGLE = POINT, LINE, POLYGON = 1, 2, 3
COLLECTIONS = (4, 5, 6, 7)  # of points, lines, polygons, anything


def is_flat(wkb: bytes) -> bool:
    """Whether a geometry is a point, line or polygon, or a collection of such, nothing deeper.

    wkb: ISO or extended well-known binary. GEOS reads collections in collections by recursion, and a
    file of a megabyte can nest them deeper than any stack.
    """
    kind, dimensions, order = _wkb_type(wkb, 0)
    if kind in SINGLE:
        return True
    if kind not in COLLECTIONS or len(wkb) < 9:
        return False
    position = 9
    for _ in range(struct.unpack_from(f"{order}I", wkb, 5)[0]):
        kind, dimensions, order = _wkb_type(wkb, position)
        if kind not in SINGLE:
            return False
        position = _end_of_single(wkb, position + 5, kind, 8 * dimensions, order)
        if position > len(wkb):
            return False
    return True


def _wkb_type(wkb: bytes, position: int) -> tuple[int, int, str]:
    """Geometry type (0: none), number of dimensions and byte order of the geometry at a position."""
    if len(wkb) < position + 5 or wkb[position] > 1:
        return 0, 0, "<"
    order = "<" if wkb[position] else ">"
    code = struct.unpack_from(f"{order}I", wkb, position + 1)[0]
    flags, number = code >> 29, code & 0x1FFFFFFF  # flags: Z, M, and srs id, which no GeoPackage uses
    if flags & 1:
        return 0, 0, order
    family = number // 1000 if number < 4000 else 0
    dimensions = 2 + (bool(flags & 4) or family in (1, 3)) + (bool(flags & 2) or family in (2, 3))
    return number % 1000 if number < 4000 else 0, dimensions, order


def _end_of_single(wkb: bytes, position: int, kind: int, size: int, order: str) -> int:
    """Where a point, line or polygon ends whose content starts at a position; beyond the end where it is cut off."""
    if kind == POINT:
        return position + size
    rings = 1
    if kind == POLYGON:
        if len(wkb) < position + 4:
            return len(wkb) + 1
        rings, position = struct.unpack_from(f"{order}I", wkb, position)[0], position + 4
    for _ in range(rings):
        if len(wkb) < position + 4:
            return len(wkb) + 1
        position += 4 + size * struct.unpack_from(f"{order}I", wkb, position)[0]
    return position
