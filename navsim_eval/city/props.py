"""Single things of the scenery as meshes that stand on the origin: house, lamp post, stop sign, tree."""

from __future__ import annotations

import functools

import numpy as np

from navsim_eval.city import meshes
from navsim_eval.city.meshes import Mesh
from navsim_eval.city.textures import FOLIAGE

TINTS = np.array(
    [[196, 120, 92], [172, 104, 82], [214, 196, 166], [226, 214, 188], [190, 186, 178], [168, 170, 172],
     [204, 176, 140], [150, 128, 112], [222, 222, 216], [182, 156, 130], [206, 148, 116], [160, 164, 176]],
    np.float32,
)  # fmt: skip
_ROOFS = np.array([[92, 88, 86], [112, 70, 56], [80, 84, 92], [128, 122, 116]], np.float32)
LEAVES = np.array([[74, 104, 46], [92, 118, 52], [62, 92, 48], [112, 124, 56]], np.float32)
_BARK = np.array([92, 74, 58], np.float32)
_STEEL = np.array([104, 108, 112], np.float32)


def house(
    corners: np.ndarray, height: float, tint: np.ndarray, style: int, pitched: bool, rng: np.random.Generator
) -> Mesh:
    """Walls with a front picture, and a flat or a pitched roof. corners: (4, 2) counter-clockwise, front first."""
    base = np.c_[corners, np.zeros(4)]
    top = np.c_[corners, np.full(4, height)]
    vertices = np.concatenate([base, top])
    sides = np.array([[k, (k + 1) % 4, (k + 1) % 4 + 4, k + 4] for k in range(4)])
    points, faces, group = meshes.quads(vertices, sides)
    walls = meshes.flat_mesh(points, faces, tint, group)
    for k in range(4):
        along = corners[(k + 1) % 4] - corners[k]
        along = along / np.hypot(*along)
        walls.wall[2 * k : 2 * k + 2] = (*along, along @ corners[k], style)
    roof_color = _ROOFS[int(rng.integers(len(_ROOFS)))]
    if not pitched:
        outward = corners - corners.mean(0)
        lip = corners + 0.35 * outward / np.hypot(*outward.T)[:, None]
        slab = meshes.prism(lip, height, height + 0.5)
        return meshes.merge([walls, meshes.flat_mesh(*slab[:2], roof_color * 1.25, slab[2])])
    rise = 0.36 * float(np.hypot(*(corners[3] - corners[0])))
    ridge = np.stack([(corners[0] + corners[3]) / 2.0, (corners[1] + corners[2]) / 2.0])
    eave = np.c_[corners, np.full(4, height)]
    gable_points = np.concatenate([eave, np.c_[ridge, np.full(2, height + rise)]])
    slopes, slope_faces, slope_group = meshes.quads(gable_points, np.array([[0, 1, 5, 4], [2, 3, 4, 5]]))
    gables = meshes.flat_mesh(gable_points, np.array([[3, 0, 4], [1, 2, 5]]), tint * 0.95)
    return meshes.merge([walls, meshes.flat_mesh(slopes, slope_faces, roof_color, slope_group), gables])


@functools.lru_cache(maxsize=1)
def lamp_post() -> Mesh:
    pole = meshes.prism(meshes.circle(0.09, 6), 0.0, 7.6, 0.7)
    arm = meshes.box((0.0, -0.05, 7.5), (1.7, 0.05, 7.6))
    lamp = meshes.box((1.2, -0.14, 7.42), (1.85, 0.14, 7.52))
    foot = meshes.prism(meshes.circle(0.16, 6), 0.0, 0.6)
    return meshes.merge([meshes.flat_mesh(p[0], p[1], _STEEL * shade, p[2])
                         for p, shade in ((pole, 1.0), (arm, 1.0), (lamp, 1.6), (foot, 0.8))])  # fmt: skip


@functools.lru_cache(maxsize=1)
def stop_sign() -> Mesh:
    """Facing traffic that drives along +x, that is, shown towards -x."""
    parts = []
    for x, radius, color in ((0.0, 0.42, (232, 232, 228)), (-0.012, 0.37, (196, 24, 30))):
        ring = meshes.circle(radius, 8, np.pi / 8.0)
        points = np.c_[np.full(8, x), -ring[:, 0], ring[:, 1] + 2.4]
        fan = np.stack([np.zeros(6, np.int64), np.arange(1, 7), np.arange(2, 8)], axis=1)
        parts.append(meshes.flat_mesh(points, fan, color, np.zeros(6)))
    for low, high in ((-0.27, -0.17), (-0.11, -0.01), (0.05, 0.15), (0.19, 0.29)):  # the word, from afar
        letter = meshes.quads(
            [[-0.022, -low, 2.31], [-0.022, -high, 2.31], [-0.022, -high, 2.49], [-0.022, -low, 2.49]], [[0, 1, 2, 3]]
        )
        parts.append(meshes.flat_mesh(letter[0], letter[1], (236, 236, 232), letter[2]))
    back = meshes.prism(meshes.circle(0.04, 6) + np.array([0.06, 0.0]), 0.0, 2.75)
    plate = meshes.box((0.004, -0.34, 2.08), (0.02, 0.34, 2.72))
    parts += [meshes.flat_mesh(p[0], p[1], _STEEL, p[2]) for p in (back, plate)]
    return meshes.merge(parts)


@functools.cache
def tree(kind: int, tone: int, seed: int, coarse: bool) -> Mesh:
    """A tree of height 1: round, oval or conical crown of leaf clumps on a trunk; fewer of them where `coarse`."""
    rng = np.random.default_rng([kind, tone, seed, 5])
    trunk = meshes.prism(meshes.circle(0.022, 3 if coarse else 6), 0.0, 0.5, 0.7)
    parts = [meshes.flat_mesh(trunk[0], trunk[1], _BARK, trunk[2])]
    if kind == 2:
        for z0, z1, radius in ((0.16, 0.62, 0.20), (0.40, 0.84, 0.15), (0.62, 1.0, 0.10)):
            cone = meshes.prism(meshes.circle(radius, 5 if coarse else 9, rng.uniform(0, 1)), z0, z1, 0.06)
            shade = rng.uniform(0.72, 1.08, (len(cone[1]), 1))
            parts.append(_leafy(meshes.flat_mesh(cone[0], cone[1], LEAVES[2] * 0.85 * shade, cone[2])))
        return meshes.merge(parts)
    clumps = [(0.0, 0.0, 0.66, 0.20)]
    clumps += [(*(0.11 * np.array([np.cos(a), np.sin(a)])), rng.uniform(0.52, 0.84), rng.uniform(0.10, 0.14))
               for a in np.arange(5) * 1.257 + rng.uniform(0, 1)]  # fmt: skip
    clumps.append((0.0, 0.0, 0.87, 0.125))
    if coarse:
        clumps = [(0.0, 0.0, 0.70, 0.24)]
    for place, (x, y, z, radius) in enumerate(clumps):
        points, faces, _ = meshes.sphere() if place == 0 and not coarse else meshes.icosahedron()
        bumpy = points * (radius * rng.uniform(0.86, 1.12, (len(points), 1)))
        vertices = bumpy * np.array([1.0, 1.0, 1.0 if kind == 0 else 1.15]) + np.array([x, y, z])
        shade = rng.uniform(0.70, 1.15, (len(faces), 1))
        parts.append(_leafy(meshes.flat_mesh(vertices, faces, LEAVES[tone] * shade)))
    return meshes.merge(parts)


def _leafy(mesh: Mesh) -> Mesh:
    """The mesh with a picture of leaves on each face, running along the face's own horizontal direction."""
    normals = mesh.normals
    level = np.hypot(normals[:, 0], normals[:, 1])
    along = np.where(level[:, None] > 1e-3, np.stack([-normals[:, 1], normals[:, 0]], axis=1), np.array([1.0, 0.0]))
    along = along / np.maximum(np.hypot(*along.T)[:, None], 1e-9)
    mesh.wall[:, :2], mesh.wall[:, 3] = along, FOLIAGE
    return mesh
