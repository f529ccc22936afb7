"""Pictures and point clouds of any NAVSIM-format frame on any nuPlan map, by ray casting.

The ground is flat (sidewalks a curb higher) and met analytically; its colour is looked up in painted tiles
(`ground`). Everything else is triangles (`world`, `meshes`) met by Embree: rays are cast on a coarse grid first, and
at every pixel only where neighbouring grid rays meet different planes or something thin stands. The result follows
from map, seed and frame alone: not from the process, nor from what was rendered before.

Working frame ("local"): global axes, origin at the corner of the scenery square that the ego is in; z above ground.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from navsim_eval.city import lidar, meshes
from navsim_eval.city.camera import View, make_view
from navsim_eval.city.ground import CURB_COLOR, CURB_HEIGHT_M, LEVELS, TEXEL_M, TILE, GroundPainter, Window
from navsim_eval.city.meshes import Mesh
from navsim_eval.city.textures import HORIZON, facade_atlas, sky_panorama
from navsim_eval.city.world import SQUARE_M, SUN, Scenery, signal_mesh
from navsim_eval.errors import UserError
from navsim_eval.formats.maps import RoadMap
from navsim_eval.geometry import box_corners, to_global
from navsim_eval.scene import BoxIndex, Camera, Frame

FRONT_CAMERAS = ("CAM_L0", "CAM_F0", "CAM_R0")
_STEP = 4  # pixels between rays of the coarse grid
_SCENERY_SQUARES = 2  # squares of static scenery on each side of the ego's own
_SIGNAL_RADIUS_M = 110.0
_FOG_M = 260.0
_FAR_M = 900.0
_AMBIENT, _SUNLIGHT = 0.58, 0.52
_MAX_VIEWS, _MAX_REGIONS = 16, 2


@dataclass(frozen=True)
class Solid:
    """Triangles ready to be hit: the Embree scene and what shading needs to know of each face.

    plane: (F, 4) float32 outward normal and its product with a point of the plane
    light: (F,) float32 brightness of the face; color: (F, 3) float32 lit colour
    wall:  (F, 4) float32 as in `Mesh`; group: (F,) int32 faces of one plane
    """

    scene: object | None
    plane: np.ndarray
    light: np.ndarray
    color: np.ndarray
    wall: np.ndarray
    group: np.ndarray


@dataclass(frozen=True)
class Region:
    """Static scenery around one square. thin: (T, 2, 3) float32 boxes of narrow things."""

    solid: Solid
    thin: np.ndarray


@dataclass(frozen=True)
class GroundRays:
    """Where a camera's pixels meet the plane z = 0, fixed in the ego frame.

    rows:     first image row with such a pixel
    points:   (H - rows, W, 2) float32 ego x, y [m]
    distance: (H, W) float32 along the ray [m], inf above the horizon
    levels:   (H - rows, W) int8 resolution that suits each pixel, LEVELS beyond the painted range
    haze:     (H - rows, W, 1) float32 share of the horizon's colour
    azimuth, elevation: (S, W) float32 sky coordinates of the rows above, in texels of the panorama
    """

    rows: int
    points: np.ndarray
    distance: np.ndarray
    levels: np.ndarray
    haze: np.ndarray
    azimuth: np.ndarray
    elevation: np.ndarray


class Renderer:
    """Renders frames that lie on `road_map`.

    seed:          look of the city (buildings, trees, clouds)
    ground_height: z of the ground in the ego frame [m]; boxes are expected to stand on it

    Raises UserError when Embree is not installed.
    """

    def __init__(self, road_map: RoadMap, seed: int = 0, ground_height: float = 0.0):
        _embree()
        self.scenery = Scenery(road_map, seed)
        self.ground = GroundPainter(road_map, seed, self.scenery.shadows)
        self._seed = seed
        self._ground_height = float(ground_height)
        self._views: OrderedDict[tuple, tuple[View, GroundRays]] = OrderedDict()
        self._regions: OrderedDict[tuple[int, int], Region] = OrderedDict()

    def render(
        self,
        frame: Frame,
        cameras: Sequence[str] = FRONT_CAMERAS,
        size: tuple[int, int] = (540, 960),
        braking: Collection[str] = frozenset(),
    ) -> dict[str, np.ndarray]:
        """Camera name → (H, W, 3) uint8 RGB.

        size: height, width [px]; braking: track tokens of vehicles whose brake lamps shine
        """
        missing = [name for name in cameras if name not in frame.cameras]
        if missing:
            raise UserError(f"frame {frame.token}: no calibration for {', '.join(missing)}")
        stage = self._stage(frame, frozenset(braking))
        windows = self._windows(stage)
        return {name: self._image(frame.cameras[name], size, stage, windows) for name in cameras}

    def point_cloud(self, frame: Frame) -> np.ndarray:
        """(6, N) float32 x, y, z [m, ego frame], intensity 0 to 255, ring, lidar id of the merged sweep."""
        stage = self._stage(frame, frozenset())
        rays = lidar.beams()
        origins = stage.to_local(rays.origins, self._ground_height)
        directions = stage.rotate(rays.directions)
        distance, brightness = self._ground_returns(stage, origins, directions)
        for solid in (stage.region.solid, stage.traffic):
            if solid.scene is None:
                continue
            hits = solid.scene.run(origins, directions, output=1)
            nearer = (hits["primID"] >= 0) & (hits["tfar"] < distance)
            face = hits["primID"][nearer]
            distance[nearer] = hits["tfar"][nearer]
            facing = np.abs(np.einsum("ij,ij->i", solid.plane[face, :3], directions[nearer]))
            brightness[nearer] = solid.color[face].mean(1) * (0.3 + 0.7 * facing)
        intensity = np.clip(brightness * np.exp(-distance / 120.0), 0.0, 255.0)
        rng = np.random.default_rng([self._seed, zlib.crc32(frame.token.encode())])
        return lidar.measure(rays, distance, intensity, rng)

    # --- what is on the stage in one frame ---

    def _stage(self, frame: Frame, braking: frozenset[str]) -> _Stage:
        corner = np.floor(frame.ego_pose[:2] / SQUARE_M).astype(int)
        region = self._region(int(corner[0]), int(corner[1]))
        origin = corner * SQUARE_M
        pieces = self._objects(frame, braking, origin) + self._signals(frame, origin)
        return _Stage(frame, origin, region, _solid(meshes.merge(pieces)), _bounds(pieces))

    def _region(self, ix: int, iy: int) -> Region:
        key = (ix, iy)
        if key in self._regions:
            self._regions.move_to_end(key)
            return self._regions[key]
        parts, thin = [], []
        reach = range(-_SCENERY_SQUARES, _SCENERY_SQUARES + 1)
        for dx in reach:
            for dy in reach:
                square = self.scenery.square(ix + dx, iy + dy)
                shift = np.array([dx, dy]) * SQUARE_M
                parts.append(meshes.transform(square.mesh, shift))
                thin.append(square.thin + np.array([*shift, 0.0]))
        region = Region(_solid(meshes.merge(parts)), np.concatenate(thin).astype(np.float32))
        self._regions[key] = region
        if len(self._regions) > _MAX_REGIONS:
            self._regions.popitem(last=False)
        return region

    def _objects(self, frame: Frame, braking: frozenset[str], origin: np.ndarray) -> list[Mesh]:
        if frame.annotations is None:
            return []
        noted = frame.annotations
        boxes = noted.boxes.copy()
        poses = to_global(frame.ego_pose, boxes[:, [BoxIndex.X, BoxIndex.Y, BoxIndex.HEADING]])
        boxes[:, [BoxIndex.X, BoxIndex.Y]] = poses[:, :2] - origin
        boxes[:, BoxIndex.HEADING] = poses[:, 2]
        boxes[:, BoxIndex.Z] -= self._ground_height
        finite = np.isfinite(boxes).all(1) & (boxes[:, BoxIndex.LENGTH : BoxIndex.HEIGHT + 1] > 0.0).all(1)
        names, tokens = noted.names.tolist(), [str(token) for token in noted.track_tokens]
        return [
            meshes.object_mesh(names[i], boxes[i], tokens[i], tokens[i] in braking)
            for i in np.flatnonzero(finite).tolist()
        ]

    def _signals(self, frame: Frame, origin: np.ndarray) -> list[Mesh]:
        state = {str(connector): bool(is_red) for connector, is_red in frame.traffic_lights}
        x, y = frame.ego_pose[:2]
        signals = self.scenery.signals(float(x), float(y), _SIGNAL_RADIUS_M, frozenset(state))
        return [signal_mesh(signal, state.get(signal.connector), origin) for signal in signals]

    # --- the ground ---

    def _windows(self, stage: _Stage) -> list[Window]:
        """Ground pictures around the ego, one a level, with the shadows of this frame's objects."""
        x, y = stage.frame.ego_pose[:2]
        windows = [self.ground.window(level, float(x), float(y)) for level in range(LEVELS)]
        if stage.frame.annotations is not None:
            for window in windows:
                _object_shadows(window, stage.frame)
        return windows

    def _ground_returns(
        self, stage: _Stage, origins: np.ndarray, directions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Range (N,) to the ground or a sidewalk, inf without, and the brightness there."""
        window = self.ground.window(2, *(float(v) for v in stage.frame.ego_pose[:2]))
        with np.errstate(divide="ignore"):
            down = np.where(directions[:, 2] < -1e-4, -1.0 / directions[:, 2], np.float32(np.inf)).astype(np.float32)
        low, high = origins[:, 2] * down, (origins[:, 2] - np.float32(CURB_HEIGHT_M)) * down
        raised, bright = _look_up(window, stage.origin, origins, directions, high)
        under, bright_low = _look_up(window, stage.origin, origins, directions, low)
        distance = np.where(raised, high, low)
        # A ray that passes over the road and would end below a sidewalk meets the curb in between.
        curb = under & ~raised
        distance = np.where(curb, 0.5 * (low + high), distance)
        return distance.astype(np.float32), np.where(raised, bright, bright_low).astype(np.float32)

    # --- one camera ---

    def _view(self, camera: Camera, size: tuple[int, int]) -> tuple[View, GroundRays]:
        arrays = (camera.rotation, camera.translation, camera.intrinsics, camera.distortion)
        key = (size, *(np.asarray(a, np.float64).tobytes() for a in arrays))
        if key in self._views:
            self._views.move_to_end(key)
            return self._views[key]
        view = make_view(camera, size)
        entry = view, _ground_rays(view, self._ground_height)
        self._views[key] = entry
        if len(self._views) > _MAX_VIEWS:
            self._views.popitem(last=False)
        return entry

    def _image(self, camera: Camera, size: tuple[int, int], stage: _Stage, windows: Sequence[Window]) -> np.ndarray:
        view, rays = self._view(camera, size)
        image = np.empty((*size, 3), np.uint8)
        self._paint_sky(image, rays, stage)
        _paint_ground(image, rays, stage, windows, view, self._ground_height)
        origin = stage.to_local(view.origin[None], self._ground_height)[0]
        directions = stage.rotate(view.directions.reshape(-1, 3))
        flat = image.reshape(-1, 3)
        depth = rays.distance.reshape(-1).copy()
        thin = _block_mask(view, stage.to_ego(_box_corners(stage.region.thin), self._ground_height))
        faces = _static_faces(stage.region.solid, origin, directions, size, thin)
        self._shade(flat, depth, np.flatnonzero(faces >= 0), faces, stage.region.solid, origin, directions, view)
        moving = _block_mask(view, stage.to_ego(_box_corners(stage.bounds), self._ground_height))
        faces = _masked_faces(stage.traffic, origin, directions, size, moving)
        self._shade(flat, depth, np.flatnonzero(faces >= 0), faces, stage.traffic, origin, directions, view)
        return image

    def _paint_sky(self, image: np.ndarray, rays: GroundRays, stage: _Stage) -> None:
        panorama = sky_panorama(self._seed)
        turn = panorama.shape[1] - 1
        shift = np.float32(stage.frame.ego_pose[2] / (2.0 * np.pi) * turn)
        azimuth = np.mod(rays.azimuth + shift, np.float32(turn))
        rows = len(azimuth)
        image[:rows] = cv2.remap(
            panorama, azimuth, rays.elevation, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )

    def _shade(
        self,
        flat: np.ndarray,
        depth: np.ndarray,
        pixels: np.ndarray,
        faces: np.ndarray,
        solid: Solid,
        origin: np.ndarray,
        directions: np.ndarray,
        view: View,
    ) -> None:
        """Colour `pixels` of the flat image whose faces are nearer than `depth`; both are updated."""
        if not len(pixels):
            return
        face = faces[pixels]
        rays = directions[pixels]
        plane = solid.plane[face]
        facing = np.einsum("ij,ij->i", plane[:, :3], rays)
        height = plane[:, 3] - plane[:, :3] @ origin
        distance = height / np.where(np.abs(facing) < 1e-6, np.float32(-1e-6), facing)
        visible = (distance < depth[pixels]) & (distance > 0.0)
        if not visible.all():
            pixels, face, rays = pixels[visible], face[visible], rays[visible]
            facing, distance = facing[visible], distance[visible]
        depth[pixels] = distance
        color = solid.color[face]
        pictured = np.flatnonzero(solid.wall[face, 3] >= 0.0)
        if len(pictured):
            near, ray = distance[pictured], rays[pictured]
            wall, light = solid.wall[face[pictured]], solid.light[face[pictured]]
            point = origin + ray * near[:, None]
            along = np.einsum("ij,ij->i", point[:, :2], wall[:, :2]) - wall[:, 2]
            footprint = near * np.float32(view.pixel_angle) / np.maximum(np.abs(facing[pictured]), np.float32(0.15))
            texel = facade_atlas(self._seed).sample(wall[:, 3].astype(np.int32), along, point[:, 2], footprint)
            tinted = texel[:, 3:] > 127
            bare = texel[:, :3].astype(np.float32)
            color[pictured] = np.where(
                tinted, bare * np.float32(1.0 / 255.0) * color[pictured], bare * light[:, None]
            )
        clear = np.exp(distance * np.float32(-1.0 / _FOG_M))[:, None]
        flat[pixels] = np.clip(HORIZON + (color - HORIZON) * clear, 0.0, 255.0).astype(np.uint8)


@dataclass(frozen=True)
class _Stage:
    """One frame set up for rendering. bounds: (O, 2, 3) float32 boxes around its moving things, local frame."""

    frame: Frame
    origin: np.ndarray
    region: Region
    traffic: Solid
    bounds: np.ndarray

    def rotate(self, vectors: np.ndarray) -> np.ndarray:
        """Ego-frame directions (N, 3) in local axes, float32."""
        heading = float(self.frame.ego_pose[2])
        c, s = np.float32(np.cos(heading)), np.float32(np.sin(heading))
        result = np.empty_like(vectors, dtype=np.float32)
        np.subtract(c * vectors[:, 0], s * vectors[:, 1], out=result[:, 0])
        np.add(s * vectors[:, 0], c * vectors[:, 1], out=result[:, 1])
        result[:, 2] = vectors[:, 2]
        return result

    def to_local(self, points: np.ndarray, ground_height: float) -> np.ndarray:
        """Ego-frame points (N, 3) in the local frame, float32."""
        shift = self.frame.ego_pose[:2] - self.origin
        return self.rotate(points) + np.array([*shift, -ground_height], np.float32)

    def to_ego(self, points: np.ndarray, ground_height: float) -> np.ndarray:
        """Inverse of `to_local` for points (..., 3), float64."""
        heading = float(self.frame.ego_pose[2])
        c, s = np.cos(heading), np.sin(heading)
        moved = points[..., :2] - (self.frame.ego_pose[:2] - self.origin)
        x, y = c * moved[..., 0] + s * moved[..., 1], -s * moved[..., 0] + c * moved[..., 1]
        return np.stack([x, y, points[..., 2] + ground_height], axis=-1)


def _embree():
    """The Embree bindings, imported when first needed."""
    try:
        from embreex import mesh_construction, rtcore_scene
    except ImportError as error:
        raise UserError("rendering the city needs Embree: pip install -e .[city]") from error
    return rtcore_scene, mesh_construction


def _solid(mesh: Mesh) -> Solid:
    """Light the faces and build the acceleration structure."""
    normals = mesh.normals
    plane = np.concatenate(
        [normals, np.einsum("ij,ij->i", normals, mesh.vertices[mesh.faces[:, 0]])[:, None]], axis=1
    ).astype(np.float32)
    sun = np.maximum(normals @ SUN.astype(np.float32), 0.0)
    light = (_AMBIENT * (0.8 + 0.2 * normals[:, 2]) + _SUNLIGHT * sun).astype(np.float32)
    light = np.where(mesh.glow, np.float32(1.0), light)
    scene = None
    if len(mesh.faces):
        rtcore_scene, mesh_construction = _embree()
        scene = rtcore_scene.EmbreeScene(robust=True)
        mesh_construction.TriangleMesh(scene, np.ascontiguousarray(mesh.vertices), np.ascontiguousarray(mesh.faces))
    return Solid(scene, plane, light, mesh.color * light[:, None], mesh.wall, mesh.group)


def _bounds(pieces: Sequence[Mesh]) -> np.ndarray:
    if not pieces:
        return np.zeros((0, 2, 3), np.float32)
    return np.stack([np.stack([m.vertices.min(0), m.vertices.max(0)]) for m in pieces])


def _box_corners(bounds: np.ndarray) -> np.ndarray:
    """(B, 8, 3) corners of boxes (B, 2, 3); corner k takes its upper x, y, z by bits 0, 1, 2 of k."""
    pick = (np.arange(8)[:, None] >> np.arange(3)) & 1
    return np.stack([bounds[:, pick[:, axis], axis] for axis in range(3)], axis=-1)


# --- ground ---


def _ground_rays(view: View, ground_height: float) -> GroundRays:
    height = view.size[0]
    down = -view.directions[..., 2]
    camera_height = float(view.origin[2]) - ground_height
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(down > 1e-5, camera_height / down, np.inf).astype(np.float32)
    rows = int(np.flatnonzero(np.isfinite(distance).any(1))[0]) if np.isfinite(distance).any() else height
    limited = np.minimum(distance[rows:], np.float32(_FAR_M))
    points = (view.origin[:2] + view.directions[rows:, :, :2] * limited[..., None]).astype(np.float32)
    # A pixel covers distance · angle across and that, divided by the grazing angle, along; take the geometric mean.
    footprint = limited * view.pixel_angle * np.sqrt(limited / camera_height)
    exact = np.log2(np.maximum(footprint, 1e-6) / (1.1 * TEXEL_M))
    dither = np.random.default_rng(7).random(exact.shape, dtype=np.float32) - 0.5
    levels = np.clip(np.round(exact + 0.7 * dither), 0, LEVELS - 1)
    # Finer windows end nearer; leave a margin for their being aligned to texels.
    reach = np.abs(points).max(-1)
    for level in range(LEVELS):
        levels[(levels == level) & (reach > (TILE / 2 - 2) * TEXEL_M * 2**level)] = level + 1
    haze = 1.0 - np.exp(-limited / _FOG_M)
    haze = np.maximum(haze, np.clip((limited - 250.0) / 300.0, 0.0, 1.0))
    above = int(np.flatnonzero((~np.isfinite(distance)).any(1))[-1]) + 1 if not np.isfinite(distance).all() else 0
    sky = view.directions[:above]
    panorama_rows, turn = 256, 2048
    azimuth = np.arctan2(sky[..., 1], sky[..., 0]) / (2.0 * np.pi) * turn
    elevation = np.arcsin(np.clip(sky[..., 2], 0.0, 1.0)) / (np.pi / 2.0) * (panorama_rows - 1)
    return GroundRays(
        rows,
        points,
        distance,
        levels.astype(np.int8),
        haze[..., None].astype(np.float32),
        azimuth.astype(np.float32),
        elevation.astype(np.float32),
    )


def _paint_ground(
    image: np.ndarray, rays: GroundRays, stage: _Stage, windows: Sequence[Window], view: View, ground_height: float
) -> None:
    """Fill the image below the horizon."""
    if rays.rows >= len(image):
        return
    heading = float(stage.frame.ego_pose[2])
    c, s = np.float32(np.cos(heading)), np.float32(np.sin(heading))
    shrink = np.float32(1.0 - CURB_HEIGHT_M / (float(view.origin[2]) - ground_height))
    for level, window in enumerate(windows):
        chosen = rays.levels == level
        used = np.flatnonzero(chosen.any(1))
        if not len(used):
            continue
        band = slice(int(used[0]), int(used[-1]) + 1)
        x, y = rays.points[band, :, 0], rays.points[band, :, 1]
        shift = (stage.frame.ego_pose[:2] - window.origin) / window.texel - 0.5
        scale = np.float32(1.0 / window.texel)
        u = (c * x - s * y) * scale + np.float32(shift[0])
        v = (s * x + c * y) * scale + np.float32(shift[1])
        texels = cv2.remap(window.pixels, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        if level <= 2:
            # The plane of the sidewalks is met earlier, at the same bearing from the camera's foot.
            foot = view.origin[:2]
            fu = np.float32((c * foot[0] - s * foot[1]) / window.texel + shift[0])
            fv = np.float32((s * foot[0] + c * foot[1]) / window.texel + shift[1])
            raised = cv2.remap(
                window.pixels,
                fu + (u - fu) * shrink,
                fv + (v - fv) * shrink,
                cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )
            on_top = raised[..., 3] > 127
            curb = (texels[..., 3] > 127) & ~on_top
            texels[on_top] = raised[on_top]
            texels[curb, :3] = CURB_COLOR
        target = image[rays.rows + band.start : rays.rows + band.stop]
        mask = chosen[band]
        target[mask] = texels[mask][:, :3]
    below = image[rays.rows :]
    finite = np.isfinite(rays.distance[rays.rows :])
    mixed = (below + (HORIZON - below) * rays.haze).astype(np.uint8)
    below[finite] = mixed[finite]


def _look_up(
    window: Window, origin: np.ndarray, origins: np.ndarray, directions: np.ndarray, distance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether rays (N, 3) at `distance` are over a sidewalk, and the ground's brightness there."""
    reach = np.minimum(distance, np.float32(200.0))
    xy = origins[:, :2] + directions[:, :2] * reach[:, None]
    texel = np.clip(((xy - (window.origin - origin)) / window.texel).astype(np.int64), 0, TILE - 1)
    found = window.pixels[texel[:, 1], texel[:, 0]]
    valid = np.isfinite(distance)
    return (found[:, 3] > 127) & valid, found[:, :3].mean(1) * 0.5


def _object_shadows(window: Window, frame: Frame) -> None:
    """Darken the ground under and beside the annotated objects, in place."""
    boxes = frame.annotations.boxes
    poses = to_global(frame.ego_pose, boxes[:, [BoxIndex.X, BoxIndex.Y, BoxIndex.HEADING]])
    reach = 0.5 * TILE * window.texel
    centre = window.origin + reach
    near = np.flatnonzero((np.abs(poses[:, :2] - centre) < reach + 8.0).all(1) & np.isfinite(boxes).all(1))
    if not len(near):
        return
    corners = box_corners(poses[near], boxes[near, BoxIndex.LENGTH], boxes[near, BoxIndex.WIDTH])
    drop = -SUN[:2] / SUN[2]
    mask = np.zeros((TILE, TILE), np.uint8)
    for ring, height in zip(corners, boxes[near, BoxIndex.HEIGHT], strict=True):
        both = np.concatenate([ring, ring + drop * 0.85 * height]).astype(np.float64)
        texels = ((both - window.origin) / window.texel - 0.5) * 16.0
        hull = cv2.convexHull(np.round(np.clip(texels, -1e6, 1e6)).astype(np.int32))
        cv2.fillConvexPoly(mask, hull, 105, cv2.LINE_AA, 4)
        low, high = np.floor(texels.min(0) / 16).astype(int) - 12, np.ceil(texels.max(0) / 16).astype(int) + 12
        low, high = np.clip(low, 0, TILE), np.clip(high, 0, TILE)
        if (high - low).min() <= 0:
            continue
        under = np.round((((ring - window.origin) / window.texel) - 0.5) * 16.0).astype(np.int32)
        cv2.fillConvexPoly(mask, under, 150, cv2.LINE_AA, 4)
        part = (slice(low[1], high[1]), slice(low[0], high[0]))
        blur = max(3, 2 * round(0.18 / window.texel) + 1)
        soft = cv2.blur(mask[part], (blur, blur))
        window.pixels[part][..., :3] = (
            window.pixels[part][..., :3] * (1.0 - soft[..., None] * np.float32(1.0 / 255.0))
        ).astype(np.uint8)
        mask[part] = 0


# --- which face each pixel sees ---


def _static_faces(
    solid: Solid, origin: np.ndarray, directions: np.ndarray, size: tuple[int, int], thin: np.ndarray
) -> np.ndarray:
    """(H · W,) int32 face of each pixel, -1 for none.

    Rays are cast at the corners of blocks of _STEP pixels; blocks whose four corners meet one plane are filled, the
    others and the blocks marked `thin` are cast pixel by pixel.
    """
    height, width = size
    if solid.scene is None:
        return np.full(height * width, -1, np.int32)
    rows = np.minimum(np.arange(0, height + _STEP, _STEP), height - 1)
    columns = np.minimum(np.arange(0, width + _STEP, _STEP), width - 1)
    corner_rays = directions.reshape(height, width, 3)[rows[:, None], columns[None, :]]
    hit = _cast(solid, origin, np.ascontiguousarray(corner_rays.reshape(-1, 3))).reshape(len(rows), len(columns))
    group = np.where(hit >= 0, solid.group[np.maximum(hit, 0)], -1)
    plain = (group[:-1, :-1] == group[1:, :-1]) & (group[:-1, :-1] == group[:-1, 1:])
    plain &= group[:-1, :-1] == group[1:, 1:]
    plain &= ~thin[: len(rows) - 1, : len(columns) - 1]
    blocks = np.where(plain, hit[:-1, :-1], -2)
    faces = np.repeat(np.repeat(blocks, _STEP, axis=0)[:height], _STEP, axis=1)[:, :width].reshape(-1)
    mixed = np.flatnonzero(faces == -2)
    faces[mixed] = _cast(solid, origin, directions[mixed])
    return faces


def _masked_faces(
    solid: Solid, origin: np.ndarray, directions: np.ndarray, size: tuple[int, int], blocks: np.ndarray
) -> np.ndarray:
    """(H · W,) int32 face of each pixel in the marked blocks, -1 elsewhere and for none."""
    height, width = size
    faces = np.full(height * width, -1, np.int32)
    if solid.scene is None or not blocks.any():
        return faces
    mask = np.repeat(np.repeat(blocks, _STEP, axis=0)[:height], _STEP, axis=1)[:, :width].reshape(-1)
    pixels = np.flatnonzero(mask)
    faces[pixels] = _cast(solid, origin, directions[pixels])
    return faces


def _cast(solid: Solid, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """(N,) int32 index of the first face met, -1 for none."""
    if not len(directions):
        return np.zeros(0, np.int32)
    origins = np.empty_like(directions)
    origins[:] = origin
    return solid.scene.run(origins, directions)


def _block_mask(view: View, corners: np.ndarray) -> np.ndarray:
    """(⌈H / _STEP⌉, ⌈W / _STEP⌉) bool blocks that may show one of the boxes with ego-frame corners (B, 8, 3)."""
    height, width = view.size
    mask = np.zeros((-(-height // _STEP), -(-width // _STEP)), bool)
    if not len(corners):
        return mask
    local = (corners - view.origin) @ view.rotation
    low, high = _normalised_bounds(local)
    low, high = np.maximum(low, view.limits[0]), np.minimum(high, view.limits[1])
    seen = np.flatnonzero((low < high).all(1))
    # A lens bends straight edges: take corners, middles of the edges and the centre.
    pick = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0], [0, 0.5], [1, 0.5], [0.5, 1], [0.5, 0.5]])
    pixels = view.pixels(low[seen, None] + pick * (high - low)[seen, None])
    first = np.floor((pixels.min(1) - 3.0) / _STEP).astype(int)
    last = np.ceil((pixels.max(1) + 3.0) / _STEP).astype(int)
    first = np.maximum(first, 0)
    for (u0, v0), (u1, v1) in zip(first.tolist(), last.tolist(), strict=True):
        mask[v0:v1, u0:u1] = True
    return mask


_EDGES = np.array([[a, a | 1 << bit] for a in range(8) for bit in range(3) if not a >> bit & 1])
_NEAR_M = 0.2


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
