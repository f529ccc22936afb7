"""Triangles that rays can hit: lit faces over an Embree scene, and which face each pixel sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from navsim_eval.city.backdrop import clearness
from navsim_eval.city.camera import View
from navsim_eval.city.meshes import Mesh
from navsim_eval.city.textures import HORIZON
from navsim_eval.city.world import SUN
from navsim_eval.errors import UserError

STEP = 4  # pixels between rays of the coarse grid
_AMBIENT, _SUNLIGHT = 0.66, 0.50
_NEAR_M = 0.2
_WIDE_PIXELS = 26.0  # the coarse grid cannot miss what is larger than this
_FAINT_PIXELS = 0.7


@dataclass(frozen=True)
class Solid:
    """Lit triangles. Frame: wherever the mesh was given.

    scene:  Embree scene, None without faces
    plane:  (F, 4) float32 outward normal and its product with a point of the plane
    center: (F, 3) float32; light: (F,) float32 brightness; color: (F, 3) float32 lit colour, RGB 0 to 255
    wall:   (F, 4) float32 as in `Mesh`; pictured: (F,) bool; group: (F,) int32 faces of one plane
    """

    scene: object | None
    plane: np.ndarray
    center: np.ndarray
    light: np.ndarray
    color: np.ndarray
    wall: np.ndarray
    pictured: np.ndarray
    group: np.ndarray

    def cast(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """(N,) int32 first face met by rays from `origin` (3,), -1 for none."""
        if self.scene is None or not len(directions):
            return np.full(len(directions), -1, np.int32)
        return self.scene.run(_repeated(origin, directions), directions)

    def cast_with_range(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First face (N,) int32, -1 for none, and its distance (N,) float32, inf for none. origins: (3,) or (N, 3)."""
        if self.scene is None or not len(directions):
            return np.full(len(directions), -1, np.int32), np.full(len(directions), np.inf, np.float32)
        if origins.ndim == 1:
            origins = _repeated(origins, directions)
        hits = self.scene.run(origins, directions, output=1)
        face = hits["primID"]
        return face, np.where(face >= 0, hits["tfar"], np.float32(np.inf))

    def distance(self, face: np.ndarray, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """(N,) float32 range along rays (N, 3) from `origin` to the planes of `face` (N,)."""
        plane = np.take(self.plane, face, axis=0)
        facing = np.einsum("ij,ij->i", plane[:, :3], directions)
        return (plane[:, 3] - plane[:, :3] @ origin) / np.where(np.abs(facing) < 1e-6, np.float32(-1e-6), facing)

    def hazy_colors(self, eye: np.ndarray) -> np.ndarray:
        """(F,) uint32 colour of each face seen from `eye` through the haze, bytes R, G, B, A."""
        offset = self.center - eye
        clear = clearness(np.sqrt(np.einsum("ij,ij->i", offset, offset)))[:, None]
        return pack(HORIZON + (self.color - HORIZON) * clear)


def pack(color: np.ndarray) -> np.ndarray:
    """(N,) uint32 bytes R, G, B, 255 of colours (N, 3) float, clipped to 0 to 255."""
    packed = np.empty((len(color), 4), np.uint8)
    packed[:, :3] = np.clip(color, 0.0, 255.0)
    packed[:, 3] = 255
    return packed.view(np.uint32)[:, 0]


def make_solid(mesh: Mesh) -> Solid:
    """Light the faces (sun and sky, no cast shadows) and build the acceleration structure.

    Raises UserError when Embree is not installed.
    """
    normals = mesh.normals
    corner = mesh.vertices[mesh.faces]
    plane = np.concatenate([normals, np.einsum("ij,ij->i", normals, corner[:, 0])[:, None]], axis=1)
    sun = np.maximum(normals @ SUN.astype(np.float32), 0.0)
    light = (_AMBIENT * (0.8 + 0.2 * normals[:, 2]) + _SUNLIGHT * sun).astype(np.float32)
    light = np.where(mesh.glow, np.float32(1.0), light)
    scene = None
    if len(mesh.faces):
        rtcore_scene, mesh_construction = embree()
        scene = rtcore_scene.EmbreeScene()
        mesh_construction.TriangleMesh(scene, np.ascontiguousarray(mesh.vertices), np.ascontiguousarray(mesh.faces))
    return Solid(
        scene,
        plane.astype(np.float32),
        corner.mean(1, dtype=np.float32),
        light,
        mesh.color * light[:, None],
        mesh.wall,
        mesh.wall[:, 3] >= 0.0,
        mesh.group,
    )


def embree():
    """The Embree bindings, imported when first needed: modules rtcore_scene and mesh_construction."""
    try:
        from embreex import mesh_construction, rtcore_scene
    except ImportError as error:
        raise UserError("rendering the city needs Embree: pip install -e .[city]") from error
    return rtcore_scene, mesh_construction


def _repeated(origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
    origins = np.empty_like(directions)
    origins[:] = origin
    return origins


# --- which face each pixel sees ---


def visible_faces(
    solid: Solid, origin: np.ndarray, directions: np.ndarray, size: tuple[int, int], thin: np.ndarray
) -> np.ndarray:
    """(H · W,) int32 face of each pixel, -1 for none. directions: (H · W, 3) float32.

    Rays are cast at the corners of blocks of STEP pixels; blocks whose four corners meet one plane are filled, the
    others and the blocks marked in `thin` (as from `block_mask`) are cast pixel by pixel.
    """
    height, width = size
    rows = np.minimum(np.arange(0, height + STEP, STEP), height - 1)
    columns = np.minimum(np.arange(0, width + STEP, STEP), width - 1)
    corner_rays = directions.reshape(height, width, 3)[rows[:, None], columns[None, :]]
    hit = solid.cast(origin, corner_rays.reshape(-1, 3)).reshape(len(rows), len(columns))
    group = np.where(hit >= 0, solid.group[np.maximum(hit, 0)], -1) if len(solid.group) else hit
    plain = (group[:-1, :-1] == group[1:, :-1]) & (group[:-1, :-1] == group[:-1, 1:])
    plain &= (group[:-1, :-1] == group[1:, 1:]) & ~thin[: len(rows) - 1, : len(columns) - 1]
    faces = _per_pixel(np.where(plain, hit[:-1, :-1], np.int32(-2)), size)
    mixed = np.flatnonzero(faces == -2)
    faces[mixed] = solid.cast(origin, np.take(directions, mixed, axis=0))
    return faces


def pixels_of_blocks(blocks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Flat indices of the pixels in marked blocks."""
    return np.flatnonzero(_per_pixel(blocks, size))


def _per_pixel(blocks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    return np.repeat(np.repeat(blocks, STEP, axis=1)[:, :width], STEP, axis=0)[:height].reshape(-1)


def block_mask(view: View, corners: np.ndarray, only_narrow: bool = False) -> np.ndarray:
    """(⌈H / STEP⌉, ⌈W / STEP⌉) bool blocks that may show one of the boxes with ego-frame corners (B, 8, 3).

    only_narrow: leave out boxes that appear too large for the coarse grid to miss, or too small to be seen
    """
    height, width = view.size
    mask = np.zeros((-(-height // STEP), -(-width // STEP)), bool)
    if not len(corners):
        return mask
    low, high = _normalised_bounds((corners - view.origin) @ view.rotation)
    if only_narrow:
        extent = np.sort((high - low) / view.pixel_angle, axis=1)
        low = np.where(((extent[:, 0] > _WIDE_PIXELS) | (extent[:, 0] < _FAINT_PIXELS))[:, None], np.inf, low)
    low, high = np.maximum(low, view.limits[0]), np.minimum(high, view.limits[1])
    seen = (low < high).all(1)
    # A lens bends straight edges: take corners, middles of the edges and the centre.
    pick = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0], [0, 0.5], [1, 0.5], [0.5, 1], [0.5, 0.5]])
    pixels = view.pixels(low[seen, None] + pick * (high - low)[seen, None])
    first = np.maximum(np.floor((pixels.min(1) - 3.0) / STEP).astype(int), 0)
    last = np.ceil((pixels.max(1) + 3.0) / STEP).astype(int)
    for (u0, v0), (u1, v1) in zip(first.tolist(), last.tolist(), strict=True):
        mask[v0:v1, u0:u1] = True
    return mask


def box_corners_3d(bounds: np.ndarray) -> np.ndarray:
    """(B, 8, 3) corners of boxes (B, 2, 3); corner k takes its upper x, y, z by bits 0, 1, 2 of k."""
    pick = (np.arange(8)[:, None] >> np.arange(3)) & 1
    return np.stack([bounds[:, pick[:, axis], axis] for axis in range(3)], axis=-1)


_EDGES = np.array([[a, a | 1 << bit] for a in range(8) for bit in range(3) if not a >> bit & 1])


def _normalised_bounds(local: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest (B, 2) normalised image coordinates of camera-frame boxes (B, 8, 3), cut at _NEAR_M.

    Boxes behind the camera get empty (inverted) bounds.
    """
    a, b = local[:, _EDGES[:, 0]], local[:, _EDGES[:, 1]]
    span = b[..., 2] - a[..., 2]
    cut = np.clip((_NEAR_M - a[..., 2]) / np.where(np.abs(span) < 1e-9, 1e-9, span), 0.0, 1.0)
    crossing = a + (b - a) * cut[..., None]
    points = np.concatenate([local, crossing], axis=1)
    front = points[..., 2] > _NEAR_M - 1e-6
    ratio = points[..., :2] / np.maximum(points[..., 2:], _NEAR_M)
    low = np.where(front[..., None], ratio, np.inf).min(1)
    high = np.where(front[..., None], ratio, -np.inf).max(1)
    return low, high
