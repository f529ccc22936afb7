"""PDM-Closed: proposals, leads, and which proposal becomes the reference plan."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from navsim_eval.errors import DataError
from navsim_eval.geometry import Vehicle
from navsim_eval.pdm.cache import build_with_plans
from navsim_eval.pdm.observation import Forecast
from navsim_eval.pdm.path import with_headings
from navsim_eval.pdm.proposals import Lead, ProposalDriver, Proposals, Start, idm_acceleration
from navsim_eval.pdm.reference import PlanningTask, ReferencePlan, first_best, plan_references
from navsim_eval.pdm.types import DrivableMap, MetricCache, Observation
from tests.golden import needs_golden
from tests.golden.pdms import GoldenScene, debug_scenes, load, scenes

CENTERLINE = with_headings(np.column_stack([np.arange(0.0, 301.0, 2.0), np.zeros(151)]))
EGO = np.array([10.0, 0.0, 0.0])


def world(*cars: tuple[float, ...], red: shapely.Polygon | None = None, ignored: bool = False) -> Forecast:
    """A forecast of cars (x, y now, speed along x, along y), 4 m x 2 m, and at most one red light."""
    start = np.array([(*car, 0.0)[:4] for car in cars], dtype=np.float64).reshape(-1, 4)
    velocity = start[:, 2:]
    time = (np.arange(51) // 2 * 0.2)[:, None, None]
    heading = np.broadcast_to(np.arctan2(velocity[:, 1], velocity[:, 0])[:, None], (51, len(start), 1))
    poses = np.concatenate([start[:, :2] + time * velocity, heading], axis=-1)
    red_polygons = np.array([red] if red is not None else [], dtype=object)
    observation = Observation(
        tokens=np.array([f"car{k}" for k in range(len(start))], dtype=np.str_),
        poses=poses,
        sizes=np.tile([4.0, 2.0], (len(start), 1)),
        is_agent=np.ones(len(start), dtype=bool),
        speed=np.hypot(velocity[:, 0], velocity[:, 1]),
        red_light_ids=np.array(["red"] * len(red_polygons), dtype=np.str_),
        red_light_polygons=red_polygons,
        red_light_active=np.ones((51, len(red_polygons)), dtype=bool),
    )
    return Forecast(observation, velocity, np.full(len(start), ignored), np.full(len(red_polygons), ignored))


def driver(forecast: Forecast, speed: float = 10.0, limit: float | None = 10.0) -> ProposalDriver:
    return ProposalDriver([Start(CENTERLINE, EGO, speed, limit, forecast)])


def drive(forecast: Forecast, speed: float = 10.0, limit: float | None = 10.0) -> Proposals:
    return driver(forecast, speed, limit).drive().of_scene(0)


def test_idm_matches_a_case_worked_by_hand() -> None:
    # v = 10, v0 = 20, lead 51 m ahead at the same speed: s* = 1 + 15, a = 1.5 (1 - 2^-10 - (16 / 51)^2)
    acceleration = idm_acceleration(np.array(0.0), np.array(10.0), np.array([51.0, 10.0, 0.0]), np.array(20.0))
    assert acceleration == pytest.approx(1.5 * (1 - 2.0**-10 - (16 / 51) ** 2))


def test_every_proposal_brakes_in_the_first_step_and_starts_on_its_path() -> None:
    proposals = drive(world())
    np.testing.assert_allclose(proposals.speed[:, 1], 10.0 - 0.3)
    for path, offset in enumerate((0.0, -1.0, 1.0)):
        np.testing.assert_allclose(proposals.poses[5 * path : 5 * path + 5, 0], [[10.0, offset, 0.0]] * 5, atol=1e-12)


def test_on_a_free_road_each_proposal_settles_at_its_share_of_the_limit() -> None:
    for limit, expected in ((10.0, 10.0), (None, 15.0)):
        target = driver(world(), 5.0, limit).target_speed
        np.testing.assert_allclose(target, np.tile(expected * np.array([0.2, 0.4, 0.6, 0.8, 1.0]), (3, 1)))
    speed = drive(world(), speed=2.0).speed[:, -1]
    assert (np.diff(speed[:5]) > 0).all() and speed[4] < 10.0


def test_leads_are_looked_up_every_second_step_only() -> None:
    lead = drive(world((60.0, 0.0, 3.0))).lead
    assert (lead[:, :2] == 0.0).all()
    np.testing.assert_array_equal(lead[:, 3::2], lead[:, 2:-1:2])


def test_the_lead_is_the_nearest_candidate_by_distance_between_boxes() -> None:
    lead = drive(world((60.0, 0.0, 3.0), (45.0, 0.5, 2.0), (40.0, 8.0, 1.0))).lead[4, 2]
    front = 10.0 + Vehicle.FRONT_LENGTH + 1.0  # where the ego's nose is after the first step
    at_snapshot = 45.0 - 2.0 + 0.2 * 2.0
    assert lead[Lead.PROGRESS] == pytest.approx(11.0 + at_snapshot - front)  # progress plus gap between boxes
    assert lead[Lead.SPEED] == pytest.approx(2.0)
    assert lead[Lead.REAR] == 0.0


def test_without_a_lead_the_end_of_the_path_counts() -> None:
    lead = drive(world((60.0, 0.0, 3.0), ignored=True)).lead[:5, 2]
    np.testing.assert_allclose(lead, [[300.0, 0.0, Vehicle.HALF_LENGTH]] * 5)


def test_a_red_light_has_no_speed_of_its_own() -> None:
    light = shapely.box(50.0, -3.0, 60.0, 3.0)
    assert (drive(world(red=light)).lead[:, 2, Lead.SPEED] == 0.0).all()
    stops = drive(world(red=light), speed=8.0).progress[:5, -1] + Vehicle.FRONT_LENGTH
    assert (stops < 50.0).all()


def test_what_a_slower_proposal_wrote_stays_for_the_faster_ones() -> None:
    """A car that cuts in behind the fast proposals leads only the slow ones; the fast ones inherit its speed."""
    lead = drive(world((25.0, -24.0, 1.0, 8.0)), speed=8.0).lead[:5]
    free = lead[..., Lead.PROGRESS] == 300.0
    step = int(np.flatnonzero(~free[0] & free[4] & (np.arange(41) > 1))[0])
    np.testing.assert_allclose(lead[:, step, Lead.SPEED], 1.0)
    np.testing.assert_array_equal(lead[:, step, Lead.REAR] > 0.0, free[:, step])


def test_extension_continues_the_chosen_proposal() -> None:
    road = driver(world((60.0, 0.0, 3.0)))
    proposals = road.drive()
    for index in (0, 9, 14):
        (extended,) = road.extend(proposals, np.array([index]))
        assert extended.shape == (51, 3)
        np.testing.assert_array_equal(extended[:41], proposals.poses[0, index])
        assert (np.diff(extended[40:, 0]) >= 0.0).all()


def test_the_first_of_scores_equal_up_to_rounding_wins() -> None:
    assert first_best(np.array([0.5, 1.0 - 1e-12, 1.0, 0.9])) == 1
    assert first_best(np.array([0.5, 1.0 - 1e-9, 1.0])) == 2
    assert first_best(np.zeros(15)) == 0


def scene_cache(forecast: Forecast, metric: str = "pdms_v1") -> MetricCache:
    """A straight road of 8 m width along the centreline."""
    road = np.array([shapely.box(-20.0, -4.0, 320.0, 4.0)] * 2, dtype=object)
    state = np.zeros(11)
    state[:3], state[3] = EGO, 10.0
    drivable = DrivableMap(np.array(["1", "2"]), np.array([0, 1], np.int8), np.array([False, True]), road)
    return MetricCache(
        metric=metric,
        token="scene",
        log_name="log",
        map_name="map",
        start_time_us=1_600_000_000_000_000,
        initial_state=state,
        centerline=CENTERLINE,
        drivable_map=drivable,
        observation=forecast.observation,
        reference_poses=np.empty((0, 3)),
    )


def plan_one(cache: MetricCache, speed_limit: float | None, forecast: Forecast) -> ReferencePlan:
    return plan_references([PlanningTask(cache, speed_limit, forecast)])[0]


def test_on_a_free_road_the_fastest_centred_proposal_is_the_plan() -> None:
    free = world()
    plan = plan_one(scene_cache(free), 10.0, free)
    assert plan.index == 4
    assert plan.poses.shape == (51, 3)


def test_what_the_ego_already_overlaps_costs_the_plan_nothing() -> None:
    inside = world((12.0, 0.0, 0.0), ignored=True)
    plan = plan_one(scene_cache(inside), 10.0, inside)
    assert float(plan.scores.columns["no_at_fault_collisions"].min()) == 1.0


def test_a_plan_that_is_not_finite_is_refused() -> None:
    free = world()
    cache = scene_cache(free)
    cache.initial_state[3] = 0.0  # standing where nobody may move: 0 / 0
    with pytest.raises(DataError, match=r"scene \[map\].*not finite \(speed limit 0.0\)"):
        plan_one(cache, 0.0, free)


def golden_plan(golden: GoldenScene, metric: str) -> ReferencePlan:
    return build_with_plans([golden.scene], [golden.road_map], metric)[0][1]


@needs_golden
def test_proposals_equal_the_reference() -> None:
    for golden in debug_scenes():
        plan, expected = golden_plan(golden, "pdms_v1"), golden.debug
        got = plan.proposals
        rollout = np.stack([got.progress, got.speed], axis=-1)
        for name, value in (("poses", got.poses), ("lead", got.lead), ("idm", rollout)):
            np.testing.assert_allclose(value, expected[f"proposal_{name}"], rtol=0, atol=1e-7, err_msg=golden.name)


@needs_golden
def test_the_choice_equals_the_reference_in_every_scene() -> None:
    expected = load("scores_v1")
    for golden in scenes():
        plan, row = golden_plan(golden, "pdms_v1"), golden.row
        assert plan.index == expected["reference_proposal_index"][row], golden.name
        scores = plan.scores.columns["score"].numpy()
        np.testing.assert_allclose(scores, expected["proposal_scores"][row], rtol=0, atol=1e-8, err_msg=golden.name)
        np.testing.assert_allclose(plan.poses, expected["reference_poses"][row], rtol=0, atol=1e-7, err_msg=golden.name)


@needs_golden
def test_the_choice_under_v2_equals_the_reference() -> None:
    for golden in debug_scenes():
        plan, expected = golden_plan(golden, "epdms_v2"), golden.debug
        assert plan.index == expected["v2_reference_index"], golden.name
        scores = plan.scores.columns["score"].numpy()
        np.testing.assert_allclose(scores, expected["v2_proposal_scores"], rtol=0, atol=1e-8, err_msg=golden.name)
        np.testing.assert_allclose(plan.poses, expected["v2_reference_poses"], rtol=0, atol=1e-7, err_msg=golden.name)
