"""Where on the map each ego footprint lies: the flags that several sub-scores build on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from navsim_eval.metrics.footprint import Footprints
from navsim_eval.metrics.polygons import PolygonBatch, contains_any


@dataclass(frozen=True)
class DrivableAreas:
    """The drivable map of S scenes: its polygons, and for each role the polygons that play it as words (W, S)."""

    polygons: PolygonBatch
    lanes: Tensor  # lanes and lane connectors
    route_lanes: Tensor  # those of them on the corrected route
    drivable: Tensor  # roadblocks, intersections and car parks
    intersections: Tensor


@dataclass(frozen=True)
class AreaFlags:
    """Each (S, P, T) bool, per proposal and 0.1 s.

    multiple_lanes:  more than one lane (or lane connector) contains a corner of the ego, and none contains all four
    non_drivable:    some corner is in no roadblock, intersection or car park
    oncoming:        the centre is in no lane or connector of the route
    in_intersection: the centre is in an intersection
    """

    multiple_lanes: Tensor
    non_drivable: Tensor
    oncoming: Tensor
    in_intersection: Tensor


@dataclass(frozen=True)
class Located:
    """Polygons that strictly contain parts of the ego, as words: corners (W, S, 4, P, T), center (W, S, P, T)."""

    corners: Tensor
    center: Tensor


def locate(ego: Footprints, polygons: PolygonBatch) -> Located:
    """Look up the four corners and the centre of every footprint (a point on a boundary is outside)."""
    corner_x, corner_y = ego.corners()
    x = torch.cat([corner_x, ego.center_x[:, None]], dim=1)
    y = torch.cat([corner_y, ego.center_y[:, None]], dim=1)
    scene = torch.arange(len(x), device=x.device).reshape(-1, 1, 1, 1)
    words = polygons.locate(scene, x, y)  # (W, S, 5, P, T)
    return Located(corners=words[:, :, :4], center=words[:, :, 4])


def area_flags(located: Located, areas: DrivableAreas) -> AreaFlags:
    """Ego areas as NAVSIM's PDM scorer defines them."""
    corners, center = located.corners, located.center
    return AreaFlags(
        multiple_lanes=_several_lanes(corners & areas.lanes[:, :, None, None, None]),
        non_drivable=~contains_any(corners, areas.drivable[:, :, None, None, None]).all(dim=1),
        oncoming=~contains_any(center, areas.route_lanes[:, :, None, None]),
        in_intersection=contains_any(center, areas.intersections[:, :, None, None]),
    )


def _several_lanes(corners: Tensor) -> Tensor:
    """Lanes around each corner as words (W, S, 4, P, T) → (S, P, T) bool."""
    first, second, third, fourth = corners.unbind(dim=2)
    touched = first | second | third | fourth
    several = ((touched & (touched - 1)) != 0).any(dim=0) | ((touched != 0).sum(dim=0) > 1)
    return several & ~((first & second & third & fourth) != 0).any(dim=0)
