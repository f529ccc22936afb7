"""What the ego could hit: the recorded future at 10 Hz for scoring, a forecast from *now* for the reference planner.

Everything is global (UTM metres). Recorded tracks come at 2 Hz and are interpolated over nominal time (frame k is at
k · 0.5 s, whatever its time stamp says), as both published evaluators do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import shapely

from navsim_eval.errors import DataError
from navsim_eval.formats.maps import RoadMap
from navsim_eval.formats.synthetic import FutureStep
from navsim_eval.geometry import box_corners, ego_center, ego_corners, to_global, wrap_angle
from navsim_eval.pdm.types import Observation
from navsim_eval.scene import STATIC_CLASSES, Annotations, BoxIndex, Frame

FRAME_STEPS = 5  # simulation steps (0.1 s) between two frames (0.5 s)

_PLANAR = [BoxIndex.X, BoxIndex.Y, BoxIndex.HEADING, BoxIndex.LENGTH, BoxIndex.WIDTH]

FORECAST_RADIUS = 100.0  # m, between centres
FORECAST_LIMITS = (  # nearest so many of each group, in the order of the forecast
    (STATIC_CLASSES, 50),
    (("vehicle",), 50),
    (("pedestrian",), 25),
    (("bicycle",), 10),
)
FORECAST_STEPS = 51  # 0.1 s each
SNAPSHOT_STEPS = 2  # the forecast moves every 0.2 s


@dataclass(frozen=True)
class Objects:
    """Objects of one frame in global coordinates.

    tokens, names: (N,) str;  poses: (N, 3) box centre;  sizes: (N, 2) length, width;  is_agent: (N,) bool
    velocity:      (N, 2) over ground, zero for static classes
    """

    tokens: np.ndarray
    names: np.ndarray
    poses: np.ndarray
    sizes: np.ndarray
    is_agent: np.ndarray
    velocity: np.ndarray


@dataclass(frozen=True)
class Forecast:
    """Constant-velocity future of what is around the ego now, as the reference planner imagines it.

    observation: 51 time steps; a box moves every second step and never turns
    velocity:    (N, 2) of *now*, global
    ignored:     (N,) bool, ignored_red_lights: (R,) bool: overlap the ego now; neither followed nor collided with
    """

    observation: Observation
    velocity: np.ndarray
    ignored: np.ndarray
    ignored_red_lights: np.ndarray


def global_objects(frame: Frame | FutureStep) -> Objects:
    """The annotated boxes of a frame, moved from its ego frame to global coordinates (where a step's are already).

    A box whose place or size is not a finite number is left out: nothing can be said to touch it.
    Raises DataError where the frame carries no annotations.
    """
    if isinstance(frame, FutureStep):
        is_agent = _is_agent(frame.names)
        return Objects(frame.track_tokens, frame.names, frame.poses, frame.sizes[:, :2], is_agent, frame.velocity)
    boxes = frame.annotations
    if boxes is None:
        raise DataError(frame.token, "the frame has no annotations", field="anns", remedy="score a labelled split")
    known = np.isfinite(boxes.boxes[:, _PLANAR]).all(axis=1)
    if not known.all():
        boxes = Annotations(boxes.boxes[known], boxes.names[known], boxes.velocity[known], boxes.track_tokens[known])
    is_agent = _is_agent(boxes.names)
    cos, sin = np.cos(frame.ego_pose[2]), np.sin(frame.ego_pose[2])
    vx, vy = boxes.velocity[:, 0], boxes.velocity[:, 1]
    velocity = np.column_stack([cos * vx - sin * vy, sin * vx + cos * vy])
    return Objects(
        tokens=boxes.track_tokens,
        names=boxes.names,
        poses=to_global(frame.ego_pose, boxes.boxes[:, [BoxIndex.X, BoxIndex.Y, BoxIndex.HEADING]]),
        sizes=boxes.boxes[:, [BoxIndex.LENGTH, BoxIndex.WIDTH]],
        is_agent=is_agent,
        velocity=np.where(is_agent[:, None], velocity, 0.0),
    )


def _is_agent(names: np.ndarray) -> np.ndarray:
    return np.array([name not in STATIC_CLASSES for name in names.tolist()], bool)  # np.isin takes far longer


def recorded_observation(
    frames: Sequence[Frame | FutureStep],
    red_light_edges: Collection[str] = (),
    road_map: RoadMap | None = None,
    objects: Sequence[Objects] | None = None,
) -> Observation:
    """The recorded future at 10 Hz.

    frames:          now and the future, F of them, 0.5 s apart; gives 5 · (F - 1) + 1 time steps
    red_light_edges: lane connectors whose red phases become obstacles (needs `road_map`); the state of a frame holds
                     until the next one
    objects:         `global_objects` of the frames, where the caller has them already
    A track is present from its first to its last frame; one that is seen only once stays there all the time.
    """
    objects = [global_objects(frame) for frame in frames] if objects is None else objects
    frame_index = np.concatenate([np.full(len(o.tokens), k) for k, o in enumerate(objects)])
    tokens, first, track = _by_first_appearance(np.concatenate([o.tokens for o in objects]))
    poses = np.full((len(frames), len(tokens), 3), np.nan)
    poses[frame_index, track] = np.concatenate([o.poses for o in objects])
    velocity = np.concatenate([o.velocity for o in objects])[first]
    steps = FRAME_STEPS * (len(frames) - 1) + 1
    red_lights = _red_lights(frames, red_light_edges, road_map)
    return Observation(
        tokens=tokens,
        poses=resample(_fill_gaps(poses)),
        sizes=np.concatenate([o.sizes for o in objects])[first],
        is_agent=np.concatenate([o.is_agent for o in objects])[first],
        speed=np.hypot(velocity[:, 0], velocity[:, 1]),
        red_light_ids=red_lights[0],
        red_light_polygons=red_lights[1],
        red_light_active=red_lights[2][np.minimum(np.arange(steps) // FRAME_STEPS, len(frames) - 1)],
    )


def resample(keyframes: np.ndarray) -> np.ndarray:
    """Poses (F, N, 3) at 2 Hz, NaN where absent, as poses (5 · (F - 1) + 1, N, 3) at 10 Hz; `[::5]` is the input.

    Linear between neighbouring frames, the heading along the shorter turn and wrapped.
    """
    change = np.diff(keyframes, axis=0)
    change[..., 2] = wrap_angle(change[..., 2])
    fraction = (np.arange(1, FRAME_STEPS) / FRAME_STEPS)[:, None, None]
    between = keyframes[:-1, None] + fraction * change[:, None]
    between[..., 2] = wrap_angle(between[..., 2])
    poses = np.empty((FRAME_STEPS * (len(keyframes) - 1) + 1, *keyframes.shape[1:]))
    poses[::FRAME_STEPS] = keyframes
    for step in range(1, FRAME_STEPS):
        poses[step::FRAME_STEPS] = between[:, step - 1]
    return poses


def split_at_ego(observation: Observation, ego_pose: np.ndarray) -> tuple[Observation, Observation]:
    """Tracks whose box is clear of the ego now, and those that overlap it: log replay of NAVSIM v2 drops the latter.

    ego_pose: (3,) rear axle.
    """
    overlaps = _overlaps_ego(observation.poses[0], observation.sizes, ego_pose)
    return _tracks(observation, ~overlaps), _tracks(observation, overlaps)


def _tracks(observation: Observation, chosen: np.ndarray) -> Observation:
    return replace(
        observation,
        tokens=observation.tokens[chosen],
        poses=observation.poses[:, chosen],
        sizes=observation.sizes[chosen],
        is_agent=observation.is_agent[chosen],
        speed=observation.speed[chosen],
    )


def forecast(frame: Frame, road_map: RoadMap, route_lanes: Collection[str], objects: Objects | None = None) -> Forecast:
    """What the reference planner believes will happen, from one frame alone.

    route_lanes: lanes of the corrected route; its red connectors are obstacles for good.
    objects:     `global_objects` of the frame, where the caller has them already
    """
    objects = global_objects(frame) if objects is None else objects
    rows = _nearest_by_class(objects, ego_center(frame.ego_pose)[:2])
    poses = objects.poses[rows]
    velocity = np.nan_to_num(objects.velocity[rows])  # unknown: standing
    speed = np.hypot(velocity[:, 0], velocity[:, 1])
    backwards = np.abs(wrap_angle(poses[:, 2] - np.arctan2(velocity[:, 1], velocity[:, 0]))) >= np.pi / 2
    direction = poses[:, 2] + np.where(backwards, np.pi, 0.0)
    time = (np.arange(FORECAST_STEPS) // SNAPSHOT_STEPS) * SNAPSHOT_STEPS * 0.1
    moved = np.tile(poses, (FORECAST_STEPS, 1, 1))
    moved[..., 0] += time[:, None] * (speed * np.cos(direction))
    moved[..., 1] += time[:, None] * (speed * np.sin(direction))
    red_ids, red_polygons, red_active = _red_lights([frame], route_lanes, road_map)
    observation = Observation(
        tokens=objects.tokens[rows],
        poses=moved,
        sizes=objects.sizes[rows],
        is_agent=objects.is_agent[rows],
        speed=speed,
        red_light_ids=red_ids,
        red_light_polygons=red_polygons,
        red_light_active=np.repeat(red_active, FORECAST_STEPS, axis=0),
    )
    footprint = shapely.polygons(ego_corners(frame.ego_pose))
    return Forecast(
        observation=observation,
        velocity=velocity,
        ignored=_overlaps_ego(poses, observation.sizes, frame.ego_pose),
        ignored_red_lights=shapely.within(footprint, red_polygons).astype(bool),
    )


def _nearest_by_class(objects: Objects, center: np.ndarray) -> np.ndarray:
    """Rows of the objects that the forecast keeps, group by group, each sorted by distance to `center`."""
    distance = np.hypot(*(objects.poses[:, :2] - center).T)
    kept = []
    for names, limit in FORECAST_LIMITS:
        group = np.flatnonzero(np.isin(objects.names, names) & (distance <= FORECAST_RADIUS))
        kept.append(group[np.argsort(distance[group], kind="stable")][:limit])
    return np.concatenate(kept)


def _overlaps_ego(poses: np.ndarray, sizes: np.ndarray, ego_pose: np.ndarray) -> np.ndarray:
    """(N,) bool: boxes (N, 3), (N, 2) that touch the ego's; absent ones (NaN) do not."""
    overlaps = np.zeros(len(poses), dtype=bool)
    present = np.flatnonzero(np.isfinite(poses[:, 0]))
    boxes = shapely.polygons(box_corners(poses[present], sizes[present, 0], sizes[present, 1]))
    overlaps[present] = shapely.intersects(boxes, shapely.polygons(ego_corners(ego_pose)))
    return overlaps


def _red_lights(
    frames: Sequence[Frame | FutureStep], edges: Collection[str], road_map: RoadMap | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Connectors among `edges` that are red in some frame: ids (R,), polygons (R,), and when (F, R) bool."""
    edges = set(edges)
    red = [dict.fromkeys(edge for edge, is_red in frame.traffic_lights if is_red and edge in edges) for frame in frames]
    ids = list(dict.fromkeys(edge for frame in red for edge in frame))
    polygons = np.empty(len(ids), dtype=object)
    polygons[:] = [road_map.polygon(edge) for edge in ids]
    active = np.array([[edge in frame for edge in ids] for frame in red], dtype=bool).reshape(len(frames), len(ids))
    return np.array(ids, dtype=np.str_), polygons, active


def _by_first_appearance(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unique tokens in order of first appearance, the index of that appearance, and the track of each entry."""
    unique, first, inverse = np.unique(tokens, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), dtype=int)
    rank[order] = np.arange(len(order))
    return unique[order], first[order], rank[inverse]


def _fill_gaps(poses: np.ndarray) -> np.ndarray:
    """Poses (F, N, 3) with gaps inside a track bridged linearly; a track with a single pose holds it in all frames."""
    present = np.isfinite(poses[..., 0])
    count, frames = present.sum(axis=0), np.arange(len(poses))
    filled = poses.copy()
    once = count == 1
    filled[:, once] = poses[present[:, once].argmax(axis=0), np.flatnonzero(once)]
    last = len(poses) - 1 - present[::-1].argmax(axis=0)
    gappy = np.flatnonzero((count > 1) & (last - present.argmax(axis=0) + 1 > count))
    for track in gappy:
        seen = np.flatnonzero(present[:, track])
        inside = frames[seen[0] : seen[-1] + 1]
        known = poses[seen, track]
        known[:, 2] = np.unwrap(known[:, 2])
        bridged = np.column_stack([np.interp(inside, seen, known[:, k]) for k in range(3)])
        bridged[:, 2] = wrap_angle(bridged[:, 2])
        missing = ~present[inside, track]
        filled[inside[missing], track] = bridged[missing]
    return filled
