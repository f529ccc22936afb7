"""Route correction, starting lane, centreline and drivable map."""

from __future__ import annotations

import numpy as np
import pytest

from navsim_eval.errors import DataError
from navsim_eval.formats.maps import RoadMap
from navsim_eval.pdm.drivable import build_drivable_map
from navsim_eval.pdm.lane_graph import lane_graph
from navsim_eval.pdm.path import Path
from navsim_eval.pdm.route import correct_route, route_centerline, starting_lane
from navsim_eval.pdm.types import AreaKind
from tests.golden import needs_golden
from tests.golden.pdms import debug_scenes
from tests.navsim_eval.tiny_map import CONNECTOR, LANE, ORIGIN, write_tiny_map

# East along y = 0: 1 → 2 → 3 → 4, with a way round (7) from 2 to 4, and 5, which comes back and crosses 2 → 3.
BLOCKS = {
    1: ((0.0, 0.0), (40.0, 0.0)),
    2: ((50.0, 0.0), (90.0, 0.0)),
    3: ((100.0, 0.0), (140.0, 0.0)),
    4: ((150.0, 0.0), (190.0, 0.0)),
    5: ((95.0, 40.0), (95.0, 10.0)),
    6: ((95.0, -10.0), (95.0, -50.0)),
    7: ((100.0, -20.0), (140.0, -20.0)),
}
LINKS = {12: (1, 2), 23: (2, 3), 34: (3, 4), 45: (4, 5), 56: (5, 6), 27: (2, 7), 74: (7, 4)}


@pytest.fixture(scope="module")
def road_map(tmp_path_factory: pytest.TempPathFactory) -> RoadMap:
    return write_tiny_map(tmp_path_factory.mktemp("maps"), BLOCKS, LINKS)


def pose(x: float, y: float, heading: float = 0.0) -> np.ndarray:
    return np.array([ORIGIN[0] + x, ORIGIN[1] + y, heading])


def corrected(road_map: RoadMap, route: list[int], ego: np.ndarray) -> list[int]:
    return [int(block) for block in correct_route([str(block) for block in route], ego, lane_graph(road_map)).blocks]


def test_a_connected_route_stays_as_it_is(road_map: RoadMap) -> None:
    assert corrected(road_map, [1, 12, 2, 23, 3], pose(10, 0)) == [1, 12, 2, 23, 3]


def test_repeats_are_removed(road_map: RoadMap) -> None:
    assert corrected(road_map, [1, 12, 1, 2, 12, 2, 23, 3], pose(10, 0)) == [1, 12, 2, 23, 3]


def test_gaps_are_filled_by_the_shortest_way_and_only_where_one_exists(road_map: RoadMap) -> None:
    assert corrected(road_map, [1, 3], pose(10, 0)) == [1, 12, 2, 23, 3]
    # 23, 3, 34 is as short; of equally deep ways the one found last counts
    assert corrected(road_map, [2, 4], pose(60, 0)) == [2, 27, 7, 74, 4]
    assert corrected(road_map, [3, 1], pose(110, 0)) == [3, 1]


def test_a_route_that_starts_ahead_is_extended_backwards_to_the_ego(road_map: RoadMap) -> None:
    assert corrected(road_map, [3, 34, 4], pose(10, 0)) == [1, 12, 2, 23, 3, 34, 4]


def test_a_route_that_starts_behind_is_entered_where_the_ego_reaches_it(road_map: RoadMap) -> None:
    # From 7 nothing leads backwards from block 1; forwards 74 → 4 meets the third block of the route.
    assert corrected(road_map, [1, 3, 4, 45], pose(110, -20)) == [7, 74, 4, 45]


def test_a_route_is_cut_before_it_crosses_itself(road_map: RoadMap) -> None:
    assert corrected(road_map, [2, 23, 3, 34, 4, 45, 5, 56, 6], pose(60, 0))[-1] == 5


def test_an_ego_off_the_map_takes_the_nearest_blocks(road_map: RoadMap) -> None:
    # one of each layer (1 and 12); the search backwards meets 12 first
    assert corrected(road_map, [2, 23, 3], pose(10, -15)) == [12, 2, 23, 3]


def test_heading_decides_among_lanes_under_the_ego(road_map: RoadMap) -> None:
    graph = lane_graph(road_map)
    for heading, lane in ((0.0, CONNECTOR + 23), (-np.pi / 2, CONNECTOR + 56)):
        ego = pose(95, 0, heading)
        route = correct_route(["2", "23", "3"] if heading == 0.0 else ["5", "56", "6"], ego, graph)
        assert starting_lane(route, build_drivable_map(road_map, ego, route.lanes), ego, graph) == str(lane)


def test_beside_the_route_the_nearest_lane_starts_the_centreline(road_map: RoadMap) -> None:
    graph, ego = lane_graph(road_map), pose(60, 5)
    route = correct_route(["2", "23", "3"], ego, graph)
    assert starting_lane(route, build_drivable_map(road_map, ego, route.lanes), ego, graph) == str(LANE + 2)


def test_the_centreline_doubles_shared_end_points(road_map: RoadMap) -> None:
    graph = lane_graph(road_map)
    route = correct_route(["1", "12", "2"], pose(10, 0), graph)
    centerline = route_centerline(route, str(LANE + 1), graph)
    path = Path(centerline)
    assert path.length == pytest.approx(90.0, abs=1e-6)
    assert np.count_nonzero(np.diff(path.arc_length) < 1e-6) == 2
    np.testing.assert_allclose(path.interpolate(np.array([0.0, 45.0])), [pose(0, 0), pose(45, 0)], atol=1e-4)


def test_the_centreline_ends_at_the_deepest_lane_where_the_goal_is_out_of_reach(road_map: RoadMap) -> None:
    graph = lane_graph(road_map)
    route = correct_route(["2", "27", "7", "1"], pose(60, 0), graph)
    np.testing.assert_allclose(route_centerline(route, str(LANE + 2), graph)[-1], pose(140, -20), atol=1e-6)


def test_unknown_ids_are_dropped_and_named(road_map: RoadMap) -> None:
    route = correct_route(["999", "1", "12", "2"], pose(10, 0), lane_graph(road_map))
    assert route.unknown == ("999",)
    assert route.logged == ("1", "12", "2")


@pytest.mark.parametrize("ids, problem", [([], "route is empty"), (["999"], "none of 1 route ids is in the map")])
def test_a_scene_without_a_usable_route_is_refused(road_map: RoadMap, ids: list[str], problem: str) -> None:
    with pytest.raises(DataError, match=rf"abc \[roadblock_ids\].*{problem}.*map version"):
        correct_route(ids, pose(10, 0), lane_graph(road_map), token="abc")


def test_drivable_map_lists_what_meets_the_patch_by_kind(road_map: RoadMap) -> None:
    drivable = build_drivable_map(road_map, pose(-60, 0), [str(LANE + 1)])
    assert drivable.ids[drivable.kinds == AreaKind.ROADBLOCK].tolist() == ["1"]  # the patch ends 41 m along x
    assert drivable.ids[drivable.kinds == AreaKind.LANE_CONNECTOR].tolist() == [str(CONNECTOR + 12)]
    assert drivable.ids[drivable.on_route].tolist() == [str(LANE + 1)]
    assert (np.diff(drivable.kinds) >= 0).all() and AreaKind.CARPARK not in drivable.kinds


def test_drivable_map_far_from_everything_is_empty(road_map: RoadMap) -> None:
    drivable = build_drivable_map(road_map, pose(5000, 0), [str(LANE + 1)])
    assert len(drivable.ids) == len(drivable.polygons) == 0


def test_path_saturates_at_its_ends_and_survives_zero_length() -> None:
    path = Path(np.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [2.0, 0.0, 1.0], [2.0, 2.0, np.pi / 2]]))
    np.testing.assert_allclose(path.project(np.array([[-1.0, 0.0], [2.0, 1.0], [2.0, 9.0]])), [0.0, 3.0, 4.0])
    np.testing.assert_allclose(path.interpolate(np.array([9.0])), [[2.0, 2.0, np.pi / 2]])
    np.testing.assert_allclose(path.shifted(1.0).poses[0], [0.0, 1.0, 0.0], atol=1e-15)
    assert (Path(np.zeros((2, 3))).interpolate(np.array([0.0, 1.0])) == 0.0).all()


@needs_golden
def test_routes_centrelines_and_maps_equal_the_reference() -> None:
    for golden in debug_scenes():
        frame, road_map, expected = golden.scene.current, golden.road_map, golden.debug
        graph = lane_graph(road_map)
        route = correct_route(frame.roadblock_ids, frame.ego_pose, graph)
        assert route.blocks == tuple(expected["route_blocks"]), golden.name
        assert route.lanes == tuple(expected["route_lane_ids"]), golden.name
        drivable = build_drivable_map(road_map, frame.ego_pose, route.lanes)
        assert drivable.ids.tolist() == expected["drivable_tokens"].tolist(), golden.name
        kinds = [kind.replace("_AREA", "") for kind in expected["drivable_types"]]
        assert [AreaKind(kind).name for kind in drivable.kinds] == kinds, golden.name
        centerline = route_centerline(route, starting_lane(route, drivable, frame.ego_pose, graph), graph)
        np.testing.assert_allclose(centerline, expected["centerline"], rtol=0, atol=1e-8, err_msg=golden.name)
