"""Pictures and point clouds of any NAVSIM-format frame on any nuPlan map, by ray casting.

Sky and ground are looked up (`backdrop`, `ground`); everything else is triangles (`world`, `meshes`) met by Embree
(`solid`): rays are cast on a coarse grid first, and at every pixel only where neighbouring rays meet different planes
or something thin stands. The result follows from map, seed and frame alone: not from the process, nor from what was
rendered before.

Working frame ("local"): global axes, origin at the corner of the scenery square that the ego is in; z above ground.
"""

from __future__ import annotations

import functools
import zlib
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from navsim_eval.city import lidar, meshes
from navsim_eval.city.approaches import find_approaches
from navsim_eval.city.backdrop import Backdrop, clearness, make_backdrop
from navsim_eval.city.camera import View, make_view
from navsim_eval.city.ground import CURB_HEIGHT_M, LEVELS, WINDOW, GroundPainter, Window
from navsim_eval.city.meshes import Mesh
from navsim_eval.city.objects import object_mesh
from navsim_eval.city.signals import Signals, signal_mesh
from navsim_eval.city.solid import (
    Solid,
    block_mask,
    box_corners_3d,
    embree,
    make_solid,
    pixels_of_blocks,
    visible_faces,
)
from navsim_eval.city.textures import HORIZON, facade_atlas, sky_panorama
from navsim_eval.city.world import SQUARE_M, SUN, Scenery
from navsim_eval.errors import UserError
from navsim_eval.formats.maps import RoadMap
from navsim_eval.geometry import box_corners, to_global
from navsim_eval.scene import BoxIndex, Camera, Frame

FRONT_CAMERAS = ("CAM_L0", "CAM_F0", "CAM_R0")
_SCENERY_SQUARES = 2  # squares of static scenery on each side of the ego's own
_SIGNAL_RADIUS_M = 110.0
_MAX_VIEWS, _MAX_REGIONS = 16, 2
_LIDAR_GROUND_LEVEL = 2
_LIDAR_DIM_M = 120.0
_CURB_BISECTIONS = 5


class Renderer:
    """Renders frames that lie on `road_map`.

    seed:          look of the city (buildings, trees, clouds)
    ground_height: z of the ground in the ego frame [m]; boxes are expected to stand on it

    Raises UserError when Embree is not installed.
    """

    def __init__(self, road_map: RoadMap, seed: int = 0, ground_height: float = 0.0):
        embree()
        approaches = find_approaches(road_map)
        self.scenery = Scenery(road_map, approaches, seed)
        self.signals = Signals(road_map, approaches)
        self.ground = GroundPainter(road_map, approaches, seed, self.scenery.shadows)
        self._seed = seed
        self._ground_height = float(ground_height)
        self._views: OrderedDict[tuple, tuple[View, Backdrop]] = OrderedDict()
        self._regions: OrderedDict[tuple[int, int], _Region] = OrderedDict()
        self._staged: tuple[Frame, frozenset[str], _Stage] | None = None

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
        windows = self._windows(frame)
        eye = stage.to_local(np.array([[1.5, 0.0, 1.5]]))[0]
        colors = stage.region.solid.hazy_colors(eye), stage.traffic.hazy_colors(eye)
        return {name: self._image(frame.cameras[name], size, stage, windows, colors) for name in cameras}

    def point_cloud(self, frame: Frame, braking: Collection[str] = frozenset()) -> np.ndarray:
        """(6, N) float32 x, y, z [m, ego frame], intensity 0 to 255, ring, lidar id of the merged sweep.

        Cheaper right after `render` of the same frame with the same `braking`.
        """
        stage = self._stage(frame, frozenset(braking))
        rays = lidar.beams()
        origins, directions = stage.to_local(rays.origins), stage.rotate(rays.directions)
        distance, brightness = self._ground_returns(stage, origins, directions)
        for solid in (stage.region.solid, stage.traffic):
            face, reach = solid.cast_with_range(origins, directions)
            nearer = np.flatnonzero(reach < distance)
            face = face[nearer]
            distance[nearer] = reach[nearer]
            facing = np.abs(np.einsum("ij,ij->i", solid.plane[face, :3], directions[nearer]))
            brightness[nearer] = solid.color[face].mean(1) * (0.3 + 0.7 * facing)
        intensity = np.clip(brightness * np.exp(-distance / _LIDAR_DIM_M), 0.0, 255.0)
        rng = np.random.default_rng([self._seed, zlib.crc32(frame.token.encode())])
        return lidar.measure(rays, distance, intensity, rng)

    # --- what is on the stage in one frame ---

    def _stage(self, frame: Frame, braking: frozenset[str]) -> _Stage:
        if self._staged is None or self._staged[0] is not frame or self._staged[1] != braking:
            self._staged = frame, braking, self._set_up(frame, braking)
        return self._staged[2]

    def _set_up(self, frame: Frame, braking: frozenset[str]) -> _Stage:
        square = np.floor(frame.ego_pose[:2] / SQUARE_M).astype(int)
        origin = square * SQUARE_M
        pieces = self._objects(frame, braking, origin) + self._signals(frame, origin)
        return _Stage(
            frame.ego_pose,
            origin,
            self._ground_height,
            self._region(int(square[0]), int(square[1])),
            make_solid(meshes.merge(pieces)),
            _bounds(pieces),
        )

    def _region(self, ix: int, iy: int) -> _Region:
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
                parts.append(meshes.transform(square.near if max(abs(dx), abs(dy)) < 2 else square.far, shift))
                thin.append(square.thin + np.array([*shift, 0.0]))
        region = _Region(make_solid(meshes.merge(parts)), np.concatenate(thin))
        self._regions[key] = region
        if len(self._regions) > _MAX_REGIONS:
            self._regions.popitem(last=False)
        return region

    def _objects(self, frame: Frame, braking: frozenset[str], origin: np.ndarray) -> list[Mesh]:
        rows, boxes = _placed_boxes(frame)
        boxes[:, [BoxIndex.X, BoxIndex.Y]] -= origin
        boxes[:, BoxIndex.Z] -= self._ground_height
        result = []
        for row, values in zip(rows.tolist(), boxes, strict=True):
            name, token = str(frame.annotations.names[row]), str(frame.annotations.track_tokens[row])
            result.append(object_mesh(name, values, token, token in braking))
        return result

    def _signals(self, frame: Frame, origin: np.ndarray) -> list[Mesh]:
        state = {str(connector): bool(is_red) for connector, is_red in frame.traffic_lights}
        x, y = frame.ego_pose[:2]
        signals = self.signals.near(float(x), float(y), _SIGNAL_RADIUS_M, frozenset(state))
        return [signal_mesh(signal, state.get(signal.connector), origin) for signal in signals]

    # --- the ground ---

    def _windows(self, frame: Frame) -> list[Window]:
        """Ground pictures around the ego, one a level, with the shadows of this frame's objects."""
        x, y = frame.ego_pose[:2]
        windows = [self.ground.window(level, float(x), float(y)) for level in range(LEVELS)]
        _, boxes = _placed_boxes(frame)
        for window in windows:
            _object_shadows(window, boxes)
        return windows

    def _ground_returns(
        self, stage: _Stage, origins: np.ndarray, directions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Range (N,) to the road or a sidewalk, inf without, and the brightness there."""
        window = self.ground.window(_LIDAR_GROUND_LEVEL, *(float(v) for v in stage.pose[:2]))
        down = -directions[:, 2]
        per_metre = np.where(down > 1e-4, 1.0 / np.maximum(down, np.float32(1e-4)), np.float32(np.inf))
        low, high = origins[:, 2] * per_metre, (origins[:, 2] - np.float32(CURB_HEIGHT_M)) * per_metre
        raised, bright_high = _look_up(window, stage.origin, origins, directions, high)
        under, bright_low = _look_up(window, stage.origin, origins, directions, low)
        distance = np.where(raised, high, low).astype(np.float32)
        # A ray that passes over the road and would end below a sidewalk meets the curb in between.
        curb = np.flatnonzero(under & ~raised)
        before, after = high[curb], low[curb]
        for _ in range(_CURB_BISECTIONS):
            middle = 0.5 * (before + after)
            inside, _ = _look_up(window, stage.origin, origins[curb], directions[curb], middle)
            before, after = np.where(inside, before, middle), np.where(inside, middle, after)
        distance[curb] = after
        return distance, np.where(raised, bright_high, bright_low).astype(np.float32)

    # --- one camera ---

    def _view(self, camera: Camera, size: tuple[int, int]) -> tuple[View, Backdrop]:
        arrays = (camera.rotation, camera.translation, camera.intrinsics, camera.distortion)
        key = (size, *(np.asarray(a, np.float64).tobytes() for a in arrays))
        if key in self._views:
            self._views.move_to_end(key)
            return self._views[key]
        view = make_view(camera, size)
        entry = view, make_backdrop(view, self._ground_height)
        self._views[key] = entry
        if len(self._views) > _MAX_VIEWS:
            self._views.popitem(last=False)
        return entry

    def _image(
        self,
        camera: Camera,
        size: tuple[int, int],
        stage: _Stage,
        windows: Sequence[Window],
        colors: tuple[np.ndarray, np.ndarray],
    ) -> np.ndarray:
        """(H, W, 3) uint8. colors: of the faces of scenery and traffic, bytes R, G, B, A."""
        view, backdrop = self._view(camera, size)
        image = np.empty((*size, 4), np.uint8)
        backdrop.paint(image, stage.pose, windows, _wide_sky(self._seed))
        origin = stage.to_local(view.origin[None])[0]
        directions = stage.rotate(view.directions.reshape(-1, 3))
        flat = image.view(np.uint32).reshape(-1)

        scenery, traffic = stage.region.solid, stage.traffic
        thin = block_mask(view, stage.to_ego(box_corners_3d(stage.region.thin)), only_narrow=True)
        faces = visible_faces(scenery, origin, directions, size, thin)
        hit = np.flatnonzero(faces >= 0)
        seen = faces[hit]
        flat[hit] = np.take(colors[0], seen)
        fronts = np.take(scenery.pictured, seen)
        walls = hit[fronts]
        flat[walls] = self._facades(scenery, seen[fronts], origin, np.take(directions, walls, axis=0), view)

        blocks = block_mask(view, stage.to_ego(box_corners_3d(stage.bounds)))
        pixels = pixels_of_blocks(blocks, size)
        rays = np.take(directions, pixels, axis=0)
        face, reach = traffic.cast_with_range(origin, rays)
        reached = np.flatnonzero(face >= 0)
        pixels, rays, face, reach = pixels[reached], rays[reached], face[reached], reach[reached]
        behind = backdrop.distance(rays)
        covered = np.flatnonzero(faces[pixels] >= 0)
        behind[covered] = scenery.distance(faces[pixels[covered]], origin, rays[covered])
        front = np.flatnonzero(reach < behind)
        flat[pixels[front]] = np.take(colors[1], face[front])
        faces[pixels[front]] = face[front] + len(scenery.group)
        return _smooth_edges(image, faces, scenery, traffic)

    def _facades(
        self, solid: Solid, face: np.ndarray, origin: np.ndarray, rays: np.ndarray, view: View
    ) -> np.ndarray:
        """(N,) uint32 colour of pictured faces, each pixel looked up; bytes R, G, B, A."""
        ray_x, ray_y, ray_z = rays.T
        normal = [np.take(column, face) for column in solid.plane.T]
        facing = normal[0] * ray_x + normal[1] * ray_y + normal[2] * ray_z
        offset = normal[3] - (normal[0] * origin[0] + normal[1] * origin[1] + normal[2] * origin[2])
        reach = offset / np.where(np.abs(facing) < 1e-6, np.float32(-1e-6), facing)
        along_x, along_y, start, style = (np.take(column, face) for column in solid.wall.T)
        along = (along_x * ray_x + along_y * ray_y) * reach + (along_x * origin[0] + along_y * origin[1] - start)
        height = ray_z * reach + origin[2]
        footprint = reach * np.float32(view.pixel_angle) / np.maximum(np.abs(facing), np.float32(0.15))
        texel = facade_atlas(self._seed).sample(style.astype(np.int32), along, height, footprint)
        # The wall's own lit colour where the picture is tinted, plain light where it is glass, a mixture in the mips.
        tint = texel[:, 3] * np.float32(1.0 / 255.0)
        clear = clearness(reach)
        light = np.take(solid.light, face) * clear
        for channel in range(3):
            paint = np.take(solid.color[:, channel], face) * (clear * np.float32(1.0 / 255.0))
            haze = HORIZON[channel] - HORIZON[channel] * clear
            shade = texel[:, channel] * (light + (paint - light) * tint) + haze
            texel[:, channel] = np.clip(shade, 0.0, 255.0, out=shade)
        return texel.view(np.uint32)[:, 0]


@dataclass(frozen=True)
class _Region:
    """Static scenery around one square, local frame. thin: (T, 2, 3) float64 boxes of narrow things."""

    solid: Solid
    thin: np.ndarray


@dataclass(frozen=True)
class _Stage:
    """One frame set up for rendering.

    pose:   (3,) global pose of the ego; origin: (2,) global position of the local origin
    ground_height: z of the ground in the ego frame [m]
    bounds: (O, 2, 3) float32 boxes around moving things and traffic lights, local frame
    """

    pose: np.ndarray
    origin: np.ndarray
    ground_height: float
    region: _Region
    traffic: Solid
    bounds: np.ndarray

    def rotate(self, vectors: np.ndarray) -> np.ndarray:
        """Ego-frame directions (N, 3) in local axes, float32."""
        c, s = np.float32(np.cos(self.pose[2])), np.float32(np.sin(self.pose[2]))
        result = np.empty(vectors.shape, np.float32)
        np.subtract(c * vectors[:, 0], s * vectors[:, 1], out=result[:, 0])
        np.add(s * vectors[:, 0], c * vectors[:, 1], out=result[:, 1])
        result[:, 2] = vectors[:, 2]
        return result

    def to_local(self, points: np.ndarray) -> np.ndarray:
        """Ego-frame points (N, 3) in the local frame, float32."""
        shift = self.pose[:2] - self.origin
        return self.rotate(np.asarray(points, np.float32)) + np.array([*shift, -self.ground_height], np.float32)

    def to_ego(self, points: np.ndarray) -> np.ndarray:
        """Inverse of `to_local` for points (..., 3), float64."""
        c, s = np.cos(self.pose[2]), np.sin(self.pose[2])
        moved = points[..., :2] - (self.pose[:2] - self.origin)
        x, y = c * moved[..., 0] + s * moved[..., 1], -s * moved[..., 0] + c * moved[..., 1]
        return np.stack([x, y, points[..., 2] + self.ground_height], axis=-1)


@functools.lru_cache(maxsize=2)
def _wide_sky(seed: int) -> np.ndarray:
    """The sky twice around, RGBA, so that no azimuth needs wrapping."""
    return cv2.cvtColor(np.tile(sky_panorama(seed), (1, 2, 1)), cv2.COLOR_RGB2RGBA)


def _bounds(pieces: Sequence[Mesh]) -> np.ndarray:
    if not pieces:
        return np.zeros((0, 2, 3), np.float32)
    return np.stack([np.stack([m.vertices.min(0), m.vertices.max(0)]) for m in pieces])


def _look_up(
    window: Window, origin: np.ndarray, origins: np.ndarray, directions: np.ndarray, distance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether rays (N, 3) at `distance` are over a sidewalk, and the ground's brightness there."""
    reach = np.minimum(distance, np.float32(200.0))
    xy = origins[:, :2] + directions[:, :2] * reach[:, None]
    texel = np.clip(((xy - (window.origin - origin)) / window.texel).astype(np.int64), 0, WINDOW - 1)
    found = window.pixels[texel[:, 1], texel[:, 0]]
    return (found[:, 3] > 127) & np.isfinite(distance), found[:, :3].mean(1) * 0.5


def _placed_boxes(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N,) of annotations that have a finite box with an extent; the boxes (N, 7) in global x, y and heading."""
    if frame.annotations is None:
        return np.zeros(0, np.int64), np.zeros((0, 7))
    boxes = frame.annotations.boxes
    rows = np.flatnonzero(np.isfinite(boxes).all(1) & (boxes[:, BoxIndex.LENGTH : BoxIndex.HEIGHT + 1] > 0.0).all(1))
    placed = boxes[rows]
    columns = [BoxIndex.X, BoxIndex.Y, BoxIndex.HEADING]
    placed[:, columns] = to_global(frame.ego_pose, placed[:, columns])
    return rows, placed


def _object_shadows(window: Window, boxes: np.ndarray) -> None:
    """Darken the ground under and beside annotated boxes (N, 7, global), in place."""
    reach = 0.5 * WINDOW * window.texel
    boxes = boxes[(np.abs(boxes[:, :2] - (window.origin + reach)) < reach + 8.0).all(1)]
    if not len(boxes):
        return
    poses = boxes[:, [BoxIndex.X, BoxIndex.Y, BoxIndex.HEADING]]
    corners = box_corners(poses, boxes[:, BoxIndex.LENGTH], boxes[:, BoxIndex.WIDTH])
    away = -SUN[:2] / SUN[2] * 0.85
    blur = max(3, 2 * round(0.18 / window.texel) + 1)
    mask = np.zeros((WINDOW, WINDOW), np.uint8)
    for ring, height in zip(corners, boxes[:, BoxIndex.HEIGHT], strict=True):
        texels = (np.concatenate([ring, ring + away * height]) - window.origin) / window.texel - 0.5
        low = np.clip(np.floor(texels.min(0)).astype(int) - blur, 0, WINDOW)
        high = np.clip(np.ceil(texels.max(0)).astype(int) + blur, 0, WINDOW)
        if (high <= low).any():
            continue
        fixed = np.round(texels * 16.0).astype(np.int32)
        cv2.fillConvexPoly(mask, cv2.convexHull(fixed), 105, cv2.LINE_AA, 4)
        cv2.fillConvexPoly(mask, fixed[:4], 150, cv2.LINE_AA, 4)
        part = (slice(low[1], high[1]), slice(low[0], high[0]))
        lit = cv2.cvtColor(255 - cv2.blur(mask[part], (blur, blur)), cv2.COLOR_GRAY2RGB)
        window.pixels[part][..., :3] = cv2.multiply(
            np.ascontiguousarray(window.pixels[part][..., :3]), lit, scale=1.0 / 255.0
        )
        mask[part] = 0


def _smooth_edges(image: np.ndarray, faces: np.ndarray, scenery: Solid, traffic: Solid) -> np.ndarray:
    """(H, W, 3) the picture, softened where neighbouring pixels show different planes."""
    height, width = image.shape[:2]
    groups = np.concatenate([scenery.group, traffic.group + (len(scenery.group) + 1), np.array([-1], np.int32)])
    label = np.take(groups, faces).reshape(height, width)
    edge = np.zeros((height, width), np.uint8)
    across, down = label[:, 1:] != label[:, :-1], label[1:] != label[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    soft = cv2.GaussianBlur(image, (3, 3), 0.62)
    cv2.copyTo(soft, edge, image)
    return cv2.cvtColor(image, cv2.COLOR_RGBA2RGB)
