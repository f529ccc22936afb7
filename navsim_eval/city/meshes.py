"""Coloured triangles, and the plain solids that everything in the city is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

FLAT = -1.0  # `Mesh.wall` style of faces without a picture


@dataclass(frozen=True)
class Mesh:
    """Triangles with a colour each.

    vertices: (V, 3) float32 [m];  faces: (F, 3) int32, counter-clockwise seen from outside
    color:    (F, 3) float32 albedo, RGB 0 to 255
    glow:     (F,) bool, lamps that shine by themselves
    wall:     (F, 4) float32 direction along the wall (x, y), offset along it [m] and facade style; style FLAT: none
    group:    (F,) int32, equal for faces of one object that lie in one plane
    """

    vertices: np.ndarray
    faces: np.ndarray
    color: np.ndarray
    glow: np.ndarray
    wall: np.ndarray
    group: np.ndarray

    @property
    def normals(self) -> np.ndarray:
        """(F, 3) float32 outward unit normals."""
        a, b, c = (self.vertices[self.faces[:, k]] for k in range(3))
        normal = np.cross(b - a, c - a)
        return (normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def flat_mesh(vertices: np.ndarray, faces: np.ndarray, color: np.ndarray, group: np.ndarray | None = None) -> Mesh:
    """A mesh without pictures or lamps. color: (3,) or (F, 3)."""
    count = len(faces)
    return Mesh(
        np.asarray(vertices, np.float32),
        np.asarray(faces, np.int32),
        np.broadcast_to(np.asarray(color, np.float32), (count, 3)).copy(),
        np.zeros(count, bool),
        np.tile(np.array([1.0, 0.0, 0.0, FLAT], np.float32), (count, 1)),
        np.arange(count, dtype=np.int32) if group is None else np.asarray(group, np.int32),
    )


def merge(meshes: Sequence[Mesh]) -> Mesh:
    """One mesh of many; groups stay apart."""
    if not meshes:
        return flat_mesh(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(3))
    vertex_start = np.cumsum([0, *(len(m.vertices) for m in meshes)])
    group_start = np.cumsum([0, *(int(m.group.max()) + 1 if len(m.group) else 0 for m in meshes)])
    columns = {f.name: np.concatenate([getattr(m, f.name) for m in meshes]) for f in fields(Mesh)}
    counts = [len(m.faces) for m in meshes]
    columns["faces"] = columns["faces"] + np.repeat(vertex_start[:-1], counts).astype(np.int32)[:, None]
    columns["group"] = columns["group"] + np.repeat(group_start[:-1], counts).astype(np.int32)
    return Mesh(**columns)


def transform(mesh: Mesh, xy: np.ndarray, heading: float = 0.0, z: float = 0.0, scale: float = 1.0) -> Mesh:
    """The mesh scaled, turned about z and moved; pictures on walls stay where they were on the wall."""
    c, s = np.cos(heading), np.sin(heading)
    rotation = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    vertices = (mesh.vertices * scale) @ rotation.T + np.array([xy[0], xy[1], z])
    wall = mesh.wall.copy()
    wall[:, :2] = mesh.wall[:, :2] @ rotation[:2, :2].T
    wall[:, 2] = mesh.wall[:, 2] * scale + wall[:, :2] @ np.asarray(xy, np.float64)
    return replace(mesh, vertices=vertices.astype(np.float32), wall=wall)


# --- solids that everything is made of: vertices, faces and plane groups ---

_BOX_CORNERS = np.array([[x, y, z] for z in (0, 1) for y in (0, 1) for x in (0, 1)], np.float64)
BOX_QUADS = np.array([[0, 4, 6, 2], [1, 3, 7, 5], [0, 1, 5, 4], [2, 6, 7, 3], [4, 5, 7, 6], [0, 2, 3, 1]])

Part = tuple[np.ndarray, np.ndarray, np.ndarray]


def quads(vertices: np.ndarray, corners: np.ndarray) -> Part:
    """Planar quadrilaterals (Q, 4) as triangle pairs."""
    corners = np.asarray(corners)
    faces = np.stack([corners[:, [0, 1, 2]], corners[:, [0, 2, 3]]], axis=1).reshape(-1, 3)
    return np.asarray(vertices, np.float64), faces, np.repeat(np.arange(len(corners)), 2)


def box(low: Sequence[float], high: Sequence[float]) -> Part:
    """Axis-aligned box."""
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    return quads(low + _BOX_CORNERS * (high - low), BOX_QUADS)


def frustum(low: Sequence[float], high: Sequence[float], top: Sequence[float]) -> Part:
    """Box `low` … `high` whose roof is the rectangle `top` = (x0, x1, y0, y1)."""
    vertices, faces, group = box(low, high)
    x0, x1, y0, y1 = top
    vertices[4:, 0] = np.where(_BOX_CORNERS[4:, 0] > 0, x1, x0)
    vertices[4:, 1] = np.where(_BOX_CORNERS[4:, 1] > 0, y1, y0)
    return vertices, faces, group


def prism(outline: np.ndarray, z0: float, z1: float, taper: float = 1.0) -> Part:
    """Upright prism over a convex counter-clockwise outline (K, 2), its top scaled by `taper` about the centroid."""
    k = len(outline)
    top = outline.mean(0) + (outline - outline.mean(0)) * taper
    vertices = np.concatenate([np.c_[outline, np.full(k, z0)], np.c_[top, np.full(k, z1)]])
    ring = np.arange(k)
    sides = np.stack([ring, (ring + 1) % k, (ring + 1) % k + k, ring + k], axis=1)
    _, faces, group = quads(vertices, sides)
    fan = np.stack([np.full(k - 2, k), k + ring[1:-1], k + ring[2:]], axis=1)
    return vertices, np.concatenate([faces, fan]), np.concatenate([group, np.full(k - 2, k)])


def circle(radius: float, corners: int, phase: float = 0.0) -> np.ndarray:
    """(corners, 2) counter-clockwise polygon inscribed in a circle."""
    angle = phase + 2.0 * np.pi * np.arange(corners) / corners
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def profile(outline: np.ndarray, half_width: float) -> Part:
    """A convex side view (x, z) (K, 2), up the rear and down the front, given a width along y."""
    k = len(outline)
    left = np.c_[outline[:, 0], np.full(k, half_width), outline[:, 1]]
    right = np.c_[outline[:, 0], np.full(k, -half_width), outline[:, 1]]
    vertices = np.concatenate([left, right])
    ring = np.arange(k)
    sides = np.stack([ring, (ring + 1) % k, (ring + 1) % k + k, ring + k], axis=1)[:, ::-1]
    _, faces, group = quads(vertices, sides)
    fan = np.stack([np.zeros(k - 2, np.int64), ring[1:-1], ring[2:]], axis=1)
    caps = np.concatenate([fan, fan[:, ::-1] + k])
    return vertices, np.concatenate([faces, caps]), np.concatenate([group, np.repeat([k, k + 1], k - 2)])


def icosahedron() -> Part:
    """Unit icosahedron: 12 vertices, 20 faces, each its own plane."""
    g = (1.0 + 5.0**0.5) / 2.0
    v = np.array(
        [[-1, g, 0], [1, g, 0], [-1, -g, 0], [1, -g, 0], [0, -1, g], [0, 1, g],
         [0, -1, -g], [0, 1, -g], [g, 0, -1], [g, 0, 1], [-g, 0, -1], [-g, 0, 1]],
    )  # fmt: skip
    f = np.array(
        [[0, 11, 5], [0, 5, 1], [0, 1, 7], [0, 7, 10], [0, 10, 11], [1, 5, 9], [5, 11, 4], [11, 10, 2], [10, 7, 6],
         [7, 1, 8], [3, 9, 4], [3, 4, 2], [3, 2, 6], [3, 6, 8], [3, 8, 9], [4, 9, 5], [2, 4, 11], [6, 2, 10],
         [8, 6, 7], [9, 8, 1]]
    )  # fmt: skip
    return v / np.linalg.norm(v[0]), f, np.arange(20)


def sphere() -> Part:
    """Unit sphere of 80 triangles (an icosahedron divided once)."""
    vertices, faces, _ = icosahedron()
    middle: dict[tuple[int, int], int] = {}
    points = list(vertices)

    def between(a: int, b: int) -> int:
        key = (min(a, b), max(a, b))
        if key not in middle:
            point = vertices[a] + vertices[b]
            middle[key] = len(points)
            points.append(point / np.linalg.norm(point))
        return middle[key]

    split = []
    for a, b, c in faces.tolist():
        ab, bc, ca = between(a, b), between(b, c), between(c, a)
        split += [[a, ab, ca], [b, bc, ab], [c, ca, bc], [ab, bc, ca]]
    return np.array(points), np.array(split), np.arange(80)
