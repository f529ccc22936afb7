"""Which polygons contain a point: exact answers for millions of points, from a grid prepared once per scene.

A map patch holds some hundred polygons with thousands of edges; testing every point against every edge is what makes
area checks slow. Here a square grid around the ego stores, for each cell, which polygons contain the cell's centre (one
bit a polygon) and which edges pass through the cell. A point differs from its cell's centre in exactly those polygons
whose boundary is crossed an odd number of times on the straight way between the two, and only edges of that cell can be
crossed. Points beyond the grid are tested against all edges.

Most questions are smaller than "which polygons?". Whether a wheel is on the road at all does not depend on lane
boundaries, nor on the border of one polygon where another one covers the whole cell. A `Lookup` says what is asked, and
has lists of edges of its own that hold only what can change the answer.

Containment is strict, as in shapely's `contains`: a point on the boundary is outside. Holes, multipolygons and
self-touching rings follow the even-odd rule.

Coordinates are metres relative to an origin near the scene, so that float64 keeps its precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import shapely
import torch
from torch import Tensor

CELL = 1.0
BITS = 63  # per int64 word; the sign bit stays clear
_MARGIN = 1e-3  # cells are given edges that pass them by this much, against rounding
_CENTER_SHIFT = 0.3819660112501051  # keeps cell centres off round coordinates, where maps of test worlds have edges
_SLOW_CHUNK = 1 << 22


@dataclass(frozen=True)
class Lookup:
    """What is asked about points, polygons given by index: which of `each` contain it, and for every group in `any_of`
    whether one of the group does (not which)."""

    each: np.ndarray
    any_of: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class CellEdges:
    """The edges that matter to one lookup, by cell.

    start: (C + 1,) int32 range of each cell in
    edges: (I,) int32 2 * edge + (1 if the cell's centre lies to the left of the edge)
    """

    start: np.ndarray
    edges: np.ndarray


@dataclass(frozen=True)
class PolygonGrid:
    """Polygons of one scene, packed (numpy). P polygons, W = ceil(P / 63) words, C = side² cells.

    corner:      (2,) lower corner of the grid;  side: cells per side
    base:        (W, C) int64 polygons that contain the centre of each cell (row-major in y)
    lookups:     edges by cell for each lookup, by its name
    edges:       (E, 4) float64 x, y of both ends, in the order of the polygons
    edge_polygon: (E,) int32
    """

    corner: np.ndarray
    side: int
    base: np.ndarray
    lookups: dict[str, CellEdges]
    edges: np.ndarray
    edge_polygon: np.ndarray

    def words(self, chosen: np.ndarray) -> np.ndarray:
        """(W,) int64 words with the bits of the polygons `chosen` by index."""
        return polygon_words(chosen, len(self.base))


def polygon_words(chosen: np.ndarray, count: int) -> np.ndarray:
    """(count,) int64 words with the bits of the polygons `chosen` by index."""
    words = np.zeros(count, np.int64)
    np.bitwise_or.at(words, chosen // BITS, np.int64(1) << (chosen % BITS))
    return words


def build_grid(
    polygons: np.ndarray, origin: np.ndarray, reach: float, lookups: Mapping[str, Lookup] | None = None
) -> PolygonGrid:
    """Pack shapely polygons (P,) into a grid that covers `reach` metres around `origin` (2,) in all directions.

    lookups: by name; without any there is one, "all", that asks for each polygon
    """
    lookups = {"all": Lookup(np.arange(len(polygons)))} if lookups is None else lookups
    edges, owner = polygon_edges(polygons, origin)
    side = 2 * int(np.ceil(reach / CELL)) + 1
    corner = np.full(2, -0.5 * side * CELL + _CENTER_SHIFT)
    words = max(1, -(-len(polygons) // BITS))
    centers = (np.arange(side) + 0.5) * CELL
    base = _containing_polygons(edges, owner, centers + corner[0], centers + corner[1], words)
    cells, edge_ids = _edges_by_cell(edges, corner, side)

    center_x = corner[0] + centers[cells % side]
    center_y = corner[1] + centers[cells // side]
    ax, ay, bx, by = edges[edge_ids].T
    left = (bx - ax) * (center_y - ay) - (by - ay) * (center_x - ax) > 0.0
    codes = (2 * edge_ids + left).astype(np.int32)
    packed = {}
    for name, needed in _needed(lookups, cells, owner[edge_ids], base, len(polygons)):
        start = np.zeros(side * side + 1, np.int32)
        np.cumsum(np.bincount(cells[needed], minlength=side * side), out=start[1:])
        packed[name] = CellEdges(start, codes[needed])
    return PolygonGrid(corner, side, base, packed, edges, owner)


def _needed(
    lookups: Mapping[str, Lookup], cells: np.ndarray, owner: np.ndarray, base: np.ndarray, polygons: int
) -> Iterator[tuple[str, np.ndarray]]:
    """For each lookup the entries (I,) bool, sorted by cell, that can change its answer; `owner`: their polygons.

    An edge of a group does not where another polygon of the group covers the whole cell: it contains the centre and has
    no edge there.
    """
    first = np.flatnonzero(np.diff(cells, prepend=-1))  # entry of each cell that has any
    size = np.diff(first, append=len(cells))
    bits = np.zeros((len(base), len(cells)), np.int64)
    bits[owner // BITS, np.arange(len(cells))] = np.int64(1) << (owner % BITS).astype(np.int64)
    covering = base[:, cells[first]]
    if len(first):
        covering &= ~np.bitwise_or.reduceat(bits, first, axis=1)
    for name, lookup in lookups.items():
        needed = _members(lookup.each, polygons)[owner]
        for group in lookup.any_of:
            settled = ((covering & polygon_words(group, len(base))[:, None]) != 0).any(axis=0)
            needed |= _members(group, polygons)[owner] & ~np.repeat(settled, size)
        yield name, needed


def _members(chosen: np.ndarray, count: int) -> np.ndarray:
    member = np.zeros(count, bool)
    member[chosen] = True
    return member


def polygon_edges(polygons: np.ndarray, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All ring edges (E, 4) x, y, x, y of shapely polygons relative to `origin`, and the polygon (E,) of each."""
    parts, part_owner = shapely.get_parts(np.asarray(polygons, dtype=object), return_index=True)
    rings, ring_part = shapely.get_rings(parts, return_index=True)
    points, ring = shapely.get_coordinates(rings, return_index=True)
    if not len(points):
        return np.zeros((0, 4)), np.zeros(0, np.int32)
    points = points - origin
    same = ring[1:] == ring[:-1]
    edges = np.concatenate([points[:-1], points[1:]], axis=1)[same]
    return edges, part_owner[ring_part[ring[1:][same]]].astype(np.int32)


def _containing_polygons(
    edges: np.ndarray, owner: np.ndarray, xs: np.ndarray, ys: np.ndarray, words: int
) -> np.ndarray:
    """(W, len(ys) * len(xs)) int64: the polygons around each cell centre, by scan lines towards -x."""
    low, high = np.minimum(edges[:, 1], edges[:, 3]), np.maximum(edges[:, 1], edges[:, 3])
    first, last = np.searchsorted(ys, low), np.searchsorted(ys, high)  # half-open: low <= y < high
    edge, row = _expand(first, last)
    ax, ay, bx, by = edges[edge].T
    column = np.searchsorted(xs, ax + (ys[row] - ay) * (bx - ax) / (by - ay), side="right")
    inside = column < len(xs)
    row, column, polygon = row[inside], column[inside], owner[edge[inside]]
    toggles = np.zeros((words, len(ys), len(xs)), np.int64)
    flat = ((polygon // BITS).astype(np.int64) * len(ys) + row) * len(xs) + column
    np.bitwise_xor.at(toggles.reshape(-1), flat, np.int64(1) << (polygon % BITS).astype(np.int64))
    return np.bitwise_xor.accumulate(toggles, axis=2).reshape(words, -1)


def _edges_by_cell(edges: np.ndarray, corner: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (cell, edge), sorted by cell, of all edges that pass through or within a margin of a cell."""
    x0, x1 = (edges[:, 0] - corner[0]) / CELL, (edges[:, 2] - corner[0]) / CELL
    y0, y1 = (edges[:, 1] - corner[1]) / CELL, (edges[:, 3] - corner[1]) / CELL
    low, high = np.minimum(y0, y1), np.maximum(y0, y1)
    first = np.clip(np.floor(low - _MARGIN), 0, side).astype(np.int64)
    last = np.clip(np.floor(high + _MARGIN) + 1, 0, side).astype(np.int64)
    edge, row = _expand(first, last)

    # The edge's x range within the row's band.
    rise = y1 - y0
    steep = np.abs(rise) > 1e-9
    slope = np.divide(x1 - x0, rise, out=np.zeros_like(rise), where=steep)[edge]
    steep = steep[edge]
    from_y = np.clip(row - _MARGIN, low[edge], high[edge])
    to_y = np.clip(row + 1 + _MARGIN, low[edge], high[edge])
    at_from = np.where(steep, x0[edge] + (from_y - y0[edge]) * slope, x0[edge])
    at_to = np.where(steep, x0[edge] + (to_y - y0[edge]) * slope, x1[edge])
    first = np.clip(np.floor(np.minimum(at_from, at_to) - _MARGIN), 0, side).astype(np.int64)
    last = np.clip(np.floor(np.maximum(at_from, at_to) + _MARGIN) + 1, 0, side).astype(np.int64)
    pair, column = _expand(first, last)

    cells, edge_ids = row[pair] * side + column, edge[pair]
    order = np.argsort(cells, kind="stable")
    return cells[order], edge_ids[order]


def _expand(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integer ranges [first, last) as flat pairs (index of the range, member)."""
    count = np.maximum(last - first, 0)
    index = np.repeat(np.arange(len(count)), count)
    member = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count) + first[index]
    return index, member


@dataclass(frozen=True)
class PolygonBatch:
    """Grids of S scenes as tensors on one device; cells and edges of all scenes lie behind one another."""

    corner: Tensor  # (S, 2) float64
    side: Tensor  # (S,) int64
    cell_offset: Tensor  # (S,) int64
    base: Tensor  # (W, cells) int64
    lookups: dict[str, tuple[Tensor, Tensor]]  # per lookup: start (cells + S,), S separate runs, of edges (I,); int32
    edges: Tensor  # (4, E) float64
    edge_polygon: Tensor  # (E,) int64 index within the scene; below as word and bit
    edge_word: Tensor  # (E,) int64
    edge_bit: Tensor  # (E,) int64
    edge_offset: tuple[int, ...]  # (S + 1,)

    @staticmethod
    def of(grids: list[PolygonGrid], device: torch.device | str = "cpu") -> PolygonBatch:
        words = max(len(grid.base) for grid in grids)
        base = [np.pad(grid.base, ((0, words - len(grid.base)), (0, 0))) for grid in grids]
        edge_offset = np.cumsum([0] + [len(grid.edges) for grid in grids])
        cell_offset = np.cumsum([0] + [grid.side**2 for grid in grids])[:-1]
        polygon = np.concatenate([grid.edge_polygon for grid in grids])

        def tensor(array: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)

        def lookup(name: str) -> tuple[Tensor, Tensor]:
            parts = [grid.lookups[name] for grid in grids]
            entry_offset = np.cumsum([0] + [len(part.edges) for part in parts], dtype=np.int32)
            starts = [part.start + offset for part, offset in zip(parts, entry_offset, strict=False)]
            edges = [part.edges + np.int32(2 * offset) for part, offset in zip(parts, edge_offset, strict=False)]
            return tensor(np.concatenate(starts), torch.int32), tensor(np.concatenate(edges), torch.int32)

        return PolygonBatch(
            corner=tensor(np.stack([grid.corner for grid in grids]), torch.float64),
            side=tensor(np.array([grid.side for grid in grids])),
            cell_offset=tensor(cell_offset),
            base=tensor(np.concatenate(base, axis=1)),
            lookups={name: lookup(name) for name in grids[0].lookups},
            edges=tensor(np.concatenate([grid.edges for grid in grids]).T, torch.float64),
            edge_polygon=tensor(polygon),
            edge_word=tensor(polygon // BITS),
            edge_bit=tensor(np.int64(1) << (polygon % BITS).astype(np.int64)),
            edge_offset=tuple(int(offset) for offset in edge_offset),
        )

    def locate(self, lookup: str, scene: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Polygons that strictly contain each point, as far as the lookup asks for them.

        x, y: (...) points relative to the origin of their scene;  scene: its index, broadcastable to (...)
        Returns words (W, ...) int64. Bits of polygons that the lookup does not ask for mean nothing; of a group that it
        asks for jointly, some bit is set if some polygon of the group contains the point.
        """
        corner_x, corner_y = self.corner[scene].unbind(-1)
        side = self.side[scene]
        column = torch.floor((x - corner_x) / CELL)
        row = torch.floor((y - corner_y) / CELL)
        known = (column >= 0) & (column < side) & (row >= 0) & (row < side)
        cell = torch.where(known, row * side + column, 0.0).to(torch.int64) + self.cell_offset[scene]
        words = torch.index_select(self.base, 1, cell.reshape(-1))

        starts, edges = self.lookups[lookup]
        entry = (cell + scene).reshape(-1)  # the scenes before have one more start than cells each
        start, end = torch.index_select(starts, 0, entry), torch.index_select(starts, 0, entry + 1)
        active = torch.nonzero((end > start) & known.reshape(-1)).squeeze(1)
        points = (x, y, corner_x + (column + 0.5) * CELL, corner_y + (row + 0.5) * CELL)
        columns = (*(value.reshape(-1) for value in points), start, end - start)
        self._cross_edges(words, edges, active, *_pick(columns, active))
        if not bool(known.all()):
            self._locate_beyond(
                words, scene.expand(x.shape).reshape(-1), x.reshape(-1), y.reshape(-1), ~known.reshape(-1)
            )
        return words.reshape(len(words), *x.shape)

    def _cross_edges(self, words, edges, active, x, y, center_x, center_y, start, count) -> None:
        """Toggle, in place, the polygons whose edges lie between the cell's centre and the point.

        words: (W, Q);  active: (M,) the points among Q that have `count` edges to be tested from `start` on in `edges`
        """
        first = torch.cumsum(count, 0) - count
        point = torch.repeat_interleave(count)
        entry = torch.index_select(start - first, 0, point) + torch.arange(len(point), device=point.device)
        code = torch.index_select(edges, 0, entry)
        ax, ay, bx, by, word, bit = _pick((*self.edges, self.edge_word, self.edge_bit), code >> 1)
        px, py, cx, cy = _pick((x, y, center_x, center_y), point)
        dx, dy = px - cx, py - cy
        straddles = (dx * (ay - cy) > dy * (ax - cx)) != (dx * (by - cy) > dy * (bx - cx))
        side = (bx - ax) * (py - ay) - (by - ay) * (px - ax)
        crosses = straddles & ((side > 0.0) != (code & 1).to(torch.bool))
        place = word * words.shape[1] + torch.index_select(active, 0, point)
        toggled = bit * crosses

        in_line = side == 0.0
        on_boundary = bool(in_line.any())
        if on_boundary:
            touched = bit * (in_line & ((px - ax) * (px - bx) <= 0.0) & ((py - ay) * (py - by) <= 0.0))
            boundary = torch.zeros_like(words)
        left, slot = torch.arange(len(active), device=active.device), 0
        while len(left):  # one edge of every point at a time
            pair = torch.index_select(first, 0, left) + slot
            at, bits = _pick((place, toggled), pair)
            words.view(-1)[at] ^= bits
            if on_boundary:
                boundary.view(-1)[at] |= touched[pair]
            slot += 1
            left = left[torch.index_select(count, 0, left) > slot]
        if on_boundary:
            words &= ~boundary

    def _locate_beyond(self, words: Tensor, scene: Tensor, x: Tensor, y: Tensor, beyond: Tensor) -> None:
        """Fill in, in place, the points (M,) that lie beyond the grid of their scene, by testing all of its edges."""
        far = torch.nonzero(beyond).squeeze(1)
        words[:, far] = 0
        far = far[torch.argsort(scene[far], stable=True)]
        found, counts = torch.unique_consecutive(scene[far], return_counts=True)
        for index, own in zip(found.tolist(), far.split(counts.tolist()), strict=True):
            first, last = self.edge_offset[index], self.edge_offset[index + 1]
            if first == last:
                continue
            ax, ay, bx, by = self.edges[:, first:last]
            px, py = x[own], y[own]
            near = (px >= torch.minimum(ax, bx).min()) & (px <= torch.maximum(ax, bx).max())
            near &= (py >= torch.minimum(ay, by).min()) & (py <= torch.maximum(ay, by).max())
            for part in own[near].split(max(1, _SLOW_CHUNK // (last - first))):
                words[:, part] = self._locate_slowly(x[part], y[part], first, last)

    def _locate_slowly(self, px: Tensor, py: Tensor, first: int, last: int) -> Tensor:
        """Points (Q,) against edges [first, last), by rays towards +x: words (W, Q)."""
        ay, by = self.edges[1, first:last], self.edges[3, first:last]
        point, edge = torch.nonzero((py[:, None] - ay) * (py[:, None] - by) <= 0.0, as_tuple=True)
        count, edge = len(px), edge + first
        px, py = px[point], py[point]
        ax, ay, bx, by = self.edges[:, edge]
        side = (bx - ax) * (py - ay) - (by - ay) * (px - ax)
        crosses = ((ay > py) != (by > py)) & ((side > 0.0) == (by > ay))
        touches = (side == 0.0) & ((px - ax) * (px - bx) <= 0.0)

        slots = len(self.base) * BITS
        place = point * slots + self.edge_polygon[edge]
        counts = torch.zeros(2, count, slots, dtype=torch.int64, device=px.device)
        crossings, contacts = counts
        crossings.view(-1).index_add_(0, place, crosses.long())
        contacts.view(-1).index_add_(0, place, touches.long())
        inside = ((crossings % 2 == 1) & (contacts == 0)).long().unflatten(1, (-1, BITS))
        return (inside << torch.arange(BITS, device=px.device)).sum(dim=-1).T


def _pick(columns: tuple[Tensor, ...], index: Tensor) -> list[Tensor]:
    """The same elements of several vectors (much faster on a CPU than indexing a matrix)."""
    return [torch.index_select(column, 0, index) for column in columns]


def contains_any(words: Tensor, mask: Tensor) -> Tensor:
    """Whether any polygon of `mask` contains the point: words (W, ...), mask (W, ...) broadcastable → (...) bool."""
    return ((words & mask) != 0).any(dim=0)
