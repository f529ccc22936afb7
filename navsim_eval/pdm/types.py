"""What scoring needs to know about a scene, as plain arrays: built once per scene, shared by every proposal.

All coordinates are global (UTM metres) in float64. Time indices are 10 Hz unless said otherwise; index 0 is *now*.
Definitions follow the published evaluators (NAVSIM v1.1 for `pdms_v1`, v2.2 for `epdms_v2`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

SIMULATION_DT = 0.1
SIMULATION_STEPS = 40  # 4 s; 41 states


class StateIndex:
    """Columns of an ego state (…, 11): rear axle, SI units; velocity and acceleration in the ego frame."""

    X, Y, HEADING, VX, VY, AX, AY, STEERING, STEERING_RATE, YAW_RATE, YAW_ACCELERATION = range(11)
    SIZE = 11
    POSE = slice(0, 3)


class AreaKind(IntEnum):
    """What a polygon of the drivable map is."""

    ROADBLOCK = 0
    LANE = 1
    LANE_CONNECTOR = 2
    INTERSECTION = 3
    CARPARK = 4


@dataclass(frozen=True)
class DrivableMap:
    """Polygons within the 100 m patch around the ego, in the evaluator's list order.

    ids:      (P,) str
    kinds:    (P,) int8 AreaKind
    on_route: (P,) bool  lane or connector of the corrected route
    polygons: (P,) object array of shapely geometries, exactly as stored in the map (no repair, no union)
    """

    ids: np.ndarray
    kinds: np.ndarray
    on_route: np.ndarray
    polygons: np.ndarray


@dataclass(frozen=True)
class Observation:
    """Everything the ego could hit, sampled in time.

    tokens:   (N,) str track tokens in order of first appearance
    poses:    (T, N, 3) float64 box centre x, y, heading; NaN where the track is absent
    sizes:    (N, 2) float64 length, width
    is_agent: (N,) bool  vehicle, pedestrian or bicycle (False: static class)
    speed:    (N,) float64 speed of the track's *unique object* (its first snapshot), for the stopped-track test
    red_light_ids:      (R,) str lane connector ids that are red at some time
    red_light_polygons: (R,) object array of shapely polygons (whole connector)
    red_light_active:   (T, R) bool
    """

    tokens: np.ndarray
    poses: np.ndarray
    sizes: np.ndarray
    is_agent: np.ndarray
    speed: np.ndarray
    red_light_ids: np.ndarray
    red_light_polygons: np.ndarray
    red_light_active: np.ndarray


@dataclass(frozen=True)
class Rails:
    """Vehicles put onto the centre lines of lanes, along which they drive. Global coordinates.

    vehicle:      (A,) int32 vehicles that are driven, in order;  line: (A,) int32 line that each drives along
    snapped:      (A, 3) box centre and heading when put onto the line
    progress:     (A,) arc length along the line now [m];  target_speed: (A,) m/s
    points:       (V, 2) vertices of all lines, as in the map;  line l has those from offsets[l] to offsets[l + 1]
    offsets:      (L + 1,) int64
    standing:     (B,) int32 vehicles that stay where they are as long as nothing drives into them
    """

    vehicle: np.ndarray
    line: np.ndarray
    snapped: np.ndarray
    progress: np.ndarray
    target_speed: np.ndarray
    points: np.ndarray
    offsets: np.ndarray
    standing: np.ndarray


@dataclass(frozen=True)
class TrafficStart(Rails):
    """What reactive traffic starts from (v2), laid out by `navsim_eval.traffic.rails`; vehicles counted as tracks.

    Tracks, M = N + D of them, are those of the observation and behind them the `dropped` ones: tracks that touch the
    ego now, which log replay removes for good and reactive traffic does not.

    replayed, seen_now: (M,) bool  follows its log also under reactive traffic (no vehicle);  is there now
    dropped_tokens, dropped_poses, dropped_sizes, dropped_is_agent, dropped_speed: as in `Observation`, D tracks
    """

    replayed: np.ndarray
    seen_now: np.ndarray
    dropped_tokens: np.ndarray
    dropped_poses: np.ndarray
    dropped_sizes: np.ndarray
    dropped_is_agent: np.ndarray
    dropped_speed: np.ndarray


@dataclass(frozen=True)
class MetricCache:
    """One scene, ready to score any number of proposals under one metric version.

    metric:            "pdms_v1" or "epdms_v2"
    token, log_name, map_name: the scene;  start_time_us: time stamp of *now*
    initial_state:     (11,) ego state now
    centerline:        (M, 3) concatenated baselines of the route ahead (shared end points appear twice)
    drivable_map, observation: see above (v1: 51 snapshots, v2: 41)
    reference_poses:   (51, 3) open-loop poses of the PDM-Closed reference plan at 10 Hz
    human_poses:       (8, 3) future human poses relative to the current pose (2 Hz), or None
    history_states:    (H, 11) past ego states at 10 Hz for history comfort (v2), else None
    unknown_route_ids: (U,) str logged route ids that the map does not hold, dropped from the route
    synthetic:         a second-stage scene of NAVSIM v2: nobody drove it, so it has no human poses
    traffic:           what reactive traffic starts from (v2), else None
    """

    metric: str
    token: str
    log_name: str
    map_name: str
    start_time_us: int
    initial_state: np.ndarray
    centerline: np.ndarray
    drivable_map: DrivableMap
    observation: Observation
    reference_poses: np.ndarray
    human_poses: np.ndarray | None = None
    history_states: np.ndarray | None = None
    unknown_route_ids: np.ndarray = field(default_factory=lambda: np.array([], dtype=np.str_))
    synthetic: bool = False
    traffic: TrafficStart | None = None
