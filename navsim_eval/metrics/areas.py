"""Where on the map each ego footprint lies: the flags that several sub-scores build on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from navsim_eval.metrics.footprint import Footprints
from navsim_eval.metrics.polygons import Lookup, PolygonBatch, contains_any

CORNERS, CENTER, LANES = "corners", "center", "lanes"


def area_lookups(roles: Mapping[str, np.ndarray], red_lights: np.ndarray) -> dict[str, Lookup]:
    """What is asked about which points of the ego; `roles` as in `DrivableAreas`, polygons given by index.

    Corners: on the drivable area at all, and in which connectors with a red light. Centre (and rear axle): on a lane of
    the route, in an intersection. Where it matters whether the ego straddles lanes, the corners again: in which lanes.
    """
    none = np.zeros(0, np.int64)
    return {
        CORNERS: Lookup(red_lights, any_of=(roles["drivable"],)),
        CENTER: Lookup(none, any_of=(roles["route_lanes"], roles["intersections"])),
        LANES: Lookup(roles["lanes"]),
    }


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

    non_drivable:    some corner is in no roadblock, intersection or car park
    oncoming:        the centre is in no lane or connector of the route
    in_intersection: the centre is in an intersection
    """

    non_drivable: Tensor
    oncoming: Tensor
    in_intersection: Tensor


@dataclass(frozen=True)
class Located:
    """Polygons that strictly contain parts of the ego, as words: corners (W, S, 4, P, T), center (W, S, P, T).

    Valid for what `area_lookups` says is asked about corners and centres.
    """

    corners: Tensor
    center: Tensor


def locate(ego: Footprints, polygons: PolygonBatch) -> Located:
    """Look up the four corners and the centre of every footprint (a point on a boundary is outside)."""
    scene = torch.arange(len(ego.x), device=ego.x.device)
    return Located(
        corners=polygons.locate(CORNERS, scene[:, None, None, None], *ego.corners()),
        center=polygons.locate(CENTER, scene[:, None, None], ego.center_x, ego.center_y),
    )


def area_flags(located: Located, areas: DrivableAreas) -> AreaFlags:
    """Ego areas as NAVSIM's PDM scorer defines them; the third, several lanes, is `straddles_lanes`."""
    corners, center = located.corners, located.center
    return AreaFlags(
        non_drivable=~contains_any(corners, areas.drivable[:, :, None, None, None]).all(dim=1),
        oncoming=~contains_any(center, areas.route_lanes[:, :, None, None]),
        in_intersection=contains_any(center, areas.intersections[:, :, None, None]),
    )


def straddles_lanes(ego: Footprints, scene: Tensor, areas: DrivableAreas) -> Tensor:
    """(M,) bool: more than one lane (or lane connector) contains a corner of the ego, and none contains all four.

    ego: M states, each of its scene (M,). NAVSIM flags all states, but only those with a contact matter.
    """
    words = areas.polygons.locate(LANES, scene[:, None], *ego.corners()) & areas.lanes[:, scene, None]
    first, second, third, fourth = words.unbind(dim=-1)
    touched = first | second | third | fourth
    several = ((touched & (touched - 1)) != 0).any(dim=0) | ((touched != 0).sum(dim=0) > 1)
    return several & ~((first & second & third & fourth) != 0).any(dim=0)


def rear_axle_in_intersection(ego: Footprints, scene: Tensor, areas: DrivableAreas) -> Tensor:
    """(M,) bool: the rear axle is in an intersection. ego: M states, each of its scene (M,)."""
    words = areas.polygons.locate(CENTER, scene, ego.x, ego.y)
    return contains_any(words, areas.intersections[:, scene])
