"""A scene from above: map, objects, the recorded drive, what the planner considered and what it chose.

Everything is drawn in the ego frame turned so that the ego looks up the page: page right = −y, page up = x (metres).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import shapely
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline

from navsim_eval.geometry import Vehicle, box_corners, to_global, to_local
from navsim_eval.scene import STATIC_CLASSES, BoxIndex, Frame, Scene

AHEAD, BEHIND, SIDE = 62.0, 10.0, 34.0  # metres shown
SCORE_COLORS = LinearSegmentedColormap.from_list("score", ["#b3202c", "#e8902f", "#e9c940", "#4f9d3a", "#0b6b3a"])
HUMAN, CHOSEN = "#111111", "#0a58d0"

_GROUND = "#eef0ec"
_FILLS = (  # drawn in this order: (map layer, colour)
    ("carpark_areas", "#dddcd6"),
    ("generic_drivable_areas", "#d5d7d9"),
    ("walkways", "#e6dfd0"),
    ("lane_groups_polygons", "#cdd0d4"),
    ("lane_group_connectors", "#cdd0d4"),
    ("intersections", "#c6cacf"),
    ("crosswalks", "#f3f3ee"),
)
_ROUTE = "#a9c6ea"
_LIGHTS = {True: "#d2232f", False: "#2f9e44"}
_OBJECTS = {"vehicle": "#5d6f87", "pedestrian": "#c8553d", "bicycle": "#8a4fa3", "static": "#8d8577"}


@dataclass(frozen=True)
class Drawing:
    """What is laid over a scene. Poses are (…, 8, 3) in the ego frame at 2 Hz.

    chosen:     (8, 3) the plan that was judged
    candidates: (M, 8, 3) the modes, or None;  values: (M,) what colours them (None: no colour)
    value_name: what `values` are, for the colour bar;  value_range: ends of the bar
    human:      (8, 3) the recorded drive, or None
    """

    chosen: np.ndarray
    candidates: np.ndarray | None = None
    values: np.ndarray | None = None
    value_name: str = "score of each mode"
    value_range: tuple[float, float] = (0.0, 1.0)
    human: np.ndarray | None = None

    def colors(self) -> np.ndarray:
        """(M, 4) RGBA of the candidates; grey where nothing says better."""
        if self.values is None:
            return np.tile([0.45, 0.48, 0.55, 0.8], (len(self.candidates), 1))
        return SCORE_COLORS(Normalize(*self.value_range)(np.nan_to_num(self.values)))

    def worst_first(self) -> np.ndarray:
        """Drawing order of the candidates: the best are on top."""
        return np.arange(len(self.candidates)) if self.values is None else np.argsort(np.nan_to_num(self.values))


def bev_figure(scene: Scene, road_map: Any, drawing: Drawing, title: str = "") -> Figure:
    """One picture, ready to be saved.

    road_map: `navsim_eval.formats.maps.RoadMap` of the scene's location
    """
    figure = Figure(figsize=(6.8, 7.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    draw_map(axes, scene.current, road_map)
    draw_objects(axes, scene)
    draw_plans(axes, drawing)
    _draw_ego(axes)
    _finish(axes, title)
    if drawing.candidates is not None and drawing.values is not None:
        mappable = ScalarMappable(Normalize(*drawing.value_range), SCORE_COLORS)
        figure.colorbar(mappable, ax=axes, label=drawing.value_name, shrink=0.5, pad=0.02, aspect=28)
    return figure


def draw_map(axes: Axes, frame: Frame, road_map: Any) -> None:
    """Road surface by layer, the route, lane borders, centre lines, and the state of the traffic lights."""
    x, y, _ = to_global(frame.ego_pose, np.array([(AHEAD - BEHIND) / 2, 0.0, 0.0]))
    reach = float(np.hypot((AHEAD + BEHIND) / 2, SIDE))
    axes.set_facecolor(_GROUND)

    for order, (name, color) in enumerate(_FILLS):
        layer = road_map.layer(name)
        rows = layer.in_square(x, y, reach)
        _fill(axes, frame, layer.geometries[rows], color, zorder=1 + 0.1 * order, hatch=name == "crosswalks")
    route = set(frame.roadblock_ids)
    for name in ("lane_groups_polygons", "lane_group_connectors"):
        layer = road_map.layer(name)
        rows = [row for row in layer.in_square(x, y, reach) if layer.ids[row] in route]
        _fill(axes, frame, layer.geometries[rows], _ROUTE, zorder=1.65, alpha=0.75)

    lanes = road_map.layer("lanes_polygons")
    rings = [shapely.boundary(g) for g in lanes.geometries[lanes.in_square(x, y, reach)]]
    _lines(axes, frame, rings, "#ffffff", width=1.0, zorder=2.0)
    lines = road_map.layer("baseline_paths")
    near = lines.in_square(x, y, reach)
    _lines(axes, frame, lines.geometries[near], "#9aa0a8", width=0.6, zorder=2.1, style=(0, (4, 4)))
    for connector, is_red in frame.traffic_lights:
        u, v = _to_page(frame, road_map.baseline(str(connector))[:1])[0]
        style = {"markerfacecolor": _LIGHTS[is_red], "markeredgecolor": "#20242b", "markeredgewidth": 0.7}
        axes.plot([u], [v], marker="o", markersize=5.5, zorder=4.6, clip_on=True, **style)


def draw_objects(axes: Axes, scene: Scene) -> None:
    """Boxes of the current frame, a stroke from centre to front, and where agents go during the next four seconds."""
    annotations = scene.current.annotations
    if annotations is None or not len(annotations):
        return
    boxes = annotations.boxes
    poses = boxes[:, [BoxIndex.X, BoxIndex.Y, BoxIndex.HEADING]]
    kinds = np.where(np.isin(annotations.names, STATIC_CLASSES), "static", annotations.names)
    for kind, color in _OBJECTS.items():
        mine = kinds == kind
        corners = _page(box_corners(poses[mine], boxes[mine, BoxIndex.LENGTH], boxes[mine, BoxIndex.WIDTH]))
        axes.add_collection(PolyCollection(corners, facecolor=color, edgecolor="#20242b", linewidth=0.6, zorder=5))
    moving = kinds != "static"
    tips = poses[moving, :2] + 0.5 * boxes[moving, BoxIndex.LENGTH, None] * _direction(poses[moving, 2])
    noses = np.stack([_page(poses[moving, :2]), _page(tips)], axis=1)
    axes.add_collection(LineCollection(noses, colors="#f5f7fa", linewidth=1.0, zorder=5.1))

    tracks: dict[str, list[np.ndarray]] = {}
    for frame in (scene.current, *scene.future[:8]):
        if frame.annotations is None:
            continue
        local = to_local(scene.current.ego_pose, to_global(frame.ego_pose, frame.annotations.boxes[:, [0, 1, 6]]))
        for token, pose in zip(frame.annotations.track_tokens, local, strict=True):
            tracks.setdefault(str(token), []).append(pose[:2])
    known = set(annotations.track_tokens[moving].tolist())
    paths = [_page(np.array(points)) for token, points in tracks.items() if token in known and len(points) > 1]
    axes.add_collection(LineCollection(paths, colors="#3c4654", linewidth=0.9, linestyle=":", zorder=4.5))


def draw_plans(axes: Axes, drawing: Drawing) -> None:
    """The modes (best on top), the recorded drive, the chosen plan with a dot at every pose."""
    if drawing.candidates is not None:
        order = drawing.worst_first()
        paths = [_page(_with_origin(drawing.candidates[mode])) for mode in order]
        axes.add_collection(LineCollection(paths, colors=drawing.colors()[order], linewidth=1.7, alpha=0.9, zorder=6))
    if drawing.human is not None:
        u, v = _page(_with_origin(drawing.human)).T
        axes.plot(u, v, color="white", linewidth=4.0, zorder=7)
        axes.plot(u, v, color=HUMAN, linewidth=1.8, linestyle=(0, (3, 1.5)), zorder=7.1)
    u, v = _page(_with_origin(drawing.chosen)).T
    axes.plot(u, v, color="white", linewidth=4.6, zorder=8, solid_capstyle="round")
    axes.plot(u, v, color=CHOSEN, linewidth=2.4, zorder=8.1, marker="o", markersize=3.6, markevery=slice(1, None))


def _draw_ego(axes: Axes) -> None:
    centre = np.array([Vehicle.REAR_AXLE_TO_CENTER, 0.0, 0.0])
    corners = _page(box_corners(centre, np.float64(Vehicle.LENGTH), np.float64(Vehicle.WIDTH)))
    axes.add_collection(PolyCollection([corners], facecolor="#ffffff", edgecolor=CHOSEN, linewidth=1.8, zorder=9))
    nose = _page(np.array([[3.95, 0.0], [2.6, 0.75], [2.6, -0.75]]))
    axes.add_collection(PolyCollection([nose], facecolor=CHOSEN, edgecolor="none", zorder=9.1))


def _finish(axes: Axes, title: str) -> None:
    axes.set(xlim=(-SIDE, SIDE), ylim=(-BEHIND, AHEAD), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=9.5, loc="left")
    for spine in axes.spines.values():
        spine.set_color("#b8bcc2")
    left, bottom = SIDE - 13.5, -BEHIND + 2.0
    axes.plot([left, left + 10], [bottom, bottom], color="#20242b", linewidth=2.5, solid_capstyle="butt", zorder=11)
    axes.text(left + 5, bottom + 0.8, "10 m", ha="center", va="bottom", fontsize=8, color="#20242b", zorder=11)
    handles = [
        Line2D([], [], color=CHOSEN, linewidth=2.4, marker="o", markersize=3.6, label="chosen plan"),
        Line2D([], [], color=HUMAN, linewidth=1.8, linestyle=(0, (3, 1.5)), label="recorded drive"),
        Patch(facecolor=_ROUTE, label="route"),
        *(Patch(facecolor=color, label=kind) for kind, color in _OBJECTS.items()),
        Line2D([], [], color=_LIGHTS[True], marker="o", markersize=5, linestyle="", label="red light"),
    ]
    legend = axes.legend(handles=handles, loc="lower left", fontsize=7, framealpha=0.9, borderpad=0.5, ncols=2)
    legend.set_zorder(12)


def _page(points: np.ndarray) -> np.ndarray:
    """(…, 2+) ego x forward, y left → (…, 2) page right, page up."""
    return np.stack([-points[..., 1], points[..., 0]], axis=-1)


def _direction(heading: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(heading), np.sin(heading)], axis=-1)


def _with_origin(poses: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((1, 2)), np.asarray(poses, np.float64)[:, :2]])


def _to_page(frame: Frame, points: np.ndarray) -> np.ndarray:
    """(N, 2) map points → page."""
    poses = np.column_stack([points, np.zeros(len(points))])
    return _page(to_local(frame.ego_pose, poses))


def _fill(
    axes: Axes, frame: Frame, geometries: Sequence[Any], color: str, zorder: float, alpha: float = 1.0,
    hatch: bool = False,
) -> None:  # fmt: skip
    for polygon in _parts(geometries):
        rings = [polygon.exterior, *polygon.interiors]
        outline = Outline.make_compound_path(*(Outline(_to_page(frame, np.array(r.coords)[:, :2])) for r in rings))
        style = {"hatch": "////", "edgecolor": "#c2c5ca"} if hatch else {"edgecolor": "none"}
        axes.add_patch(PathPatch(outline, facecolor=color, linewidth=0, zorder=zorder, alpha=alpha, **style))


def _lines(
    axes: Axes, frame: Frame, geometries: Sequence[Any], color: str, width: float, zorder: float, style: Any = "solid"
) -> None:
    paths = [_to_page(frame, np.array(g.coords)[:, :2]) for g in _parts(geometries)]
    axes.add_collection(LineCollection(paths, colors=color, linewidth=width, linestyle=style, zorder=zorder))


def _parts(geometries: Sequence[Any]) -> list[Any]:
    """Simple geometries only: multi-polygons and multi-lines taken apart, empty ones dropped."""
    return [part for part in shapely.get_parts(np.asarray(list(geometries), object)) if not part.is_empty]


matplotlib.rcParams["hatch.linewidth"] = 0.7
