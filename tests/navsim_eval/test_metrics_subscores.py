"""Each sub-score on states made by hand in a street whose answers a person can check."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import savgol_filter

from navsim_eval.geometry import Vehicle
from navsim_eval.metrics import aggregate
from navsim_eval.metrics.comfort import CHECKS, comfort_checks_v1, comfort_checks_v2, savgol
from navsim_eval.metrics.extended_comfort import extended_comfort, motion, preceding_scenes
from navsim_eval.metrics.history_comfort import history_comfort
from navsim_eval.metrics.progress import ego_progress_v1, ego_progress_v2
from navsim_eval.metrics.scene_batch import SceneBatch, prepare
from navsim_eval.pdm.types import AreaKind, MetricCache, StateIndex
from navsim_eval.scoring import measure
from tests.golden import needs_golden
from tests.golden.pdms import debug_scenes, load
from tests.navsim_eval.street import BUMPER, car, drive, light, make_street

NC, DAC, DDC = "no_at_fault_collisions", "drivable_area_compliance", "driving_direction_compliance"
TTC, TLC, LK = "time_to_collision_within_bound", "traffic_light_compliance", "lane_keeping"


def judge(street: MetricCache, *states: np.ndarray) -> dict[str, list[float]]:
    """Sub-scores and details of states (41, 11) given relative to the street's origin, one value a row."""
    found = measure(SceneBatch.of([prepare(street)]), torch.from_numpy(np.stack(states))[None])
    return {name: values[0].tolist() for name, values in (found.columns | found.details).items()}


# --- collisions ------------------------------------------------------------------------------------------------------


def test_an_empty_street_is_safe() -> None:
    found = judge(make_street(), drive(speed=8.0))
    assert found[NC] == found[TTC] == found[DAC] == [1.0]
    assert found["first_collision_index"] == found["first_ttc_index"] == [np.inf]


def test_running_into_a_stopped_car_is_at_fault_from_the_first_touch() -> None:
    gap = 20.0  # metres between bumpers at the start
    found = judge(make_street([car("car", BUMPER + gap)]), drive(speed=10.0))
    assert found[NC] == [0.0] and found["first_collision_index"] == [20.0]  # touching counts
    assert found["first_ttc_index"] == [11.0]  # 0.9 s earlier


def test_a_static_obstacle_costs_half() -> None:
    assert judge(make_street([car("cone", 20.0, agent=False)]), drive(speed=10.0))[NC] == [0.5]


def test_the_worst_collision_counts_and_the_first_is_remembered() -> None:
    found = judge(make_street([car("cone", 15.0, agent=False), car("car", 30.0)]), drive(speed=10.0))
    assert found[NC] == [0.0] and found["first_collision_index"] == [9.0]


def test_who_stands_is_not_at_fault() -> None:
    found = judge(make_street([car("car", 14.0, speed=-5.0)]), drive(speed=0.0))
    assert found[NC] == [1.0] and found[TTC] == [1.0]


def test_being_hit_from_behind_is_not_the_egos_fault_nor_is_what_follows() -> None:
    """The car behind overtakes through the ego: first contact from behind exempts it for good."""
    found = judge(make_street([car("car", -9.0, speed=12.0)]), drive(speed=4.0))
    assert found[NC] == [1.0]


@pytest.mark.parametrize(("offset", "expected"), [(0.0, 1.0), (1.75, 0.0)])
def test_a_side_contact_counts_only_where_the_ego_straddles_lanes(offset: float, expected: float) -> None:
    """A car slides in from the left, level with the ego; the ego keeps to its lane, or drives on the lane marking."""
    slider = car("car", 1.4, offset + 4.5, speed=5.0, side_speed=-1.5, length=3.0)
    found = judge(make_street([slider]), drive(speed=5.0, y=offset))
    assert found[NC] == [expected]


def test_tracks_that_are_absent_or_ignored_cannot_be_hit() -> None:
    street = make_street([car("car", 20.0)])
    states = torch.from_numpy(drive(speed=10.0))[None, None]
    assert measure(SceneBatch.of([prepare(street)], ignored_tokens=[["car"]]), states).columns[NC].item() == 1.0
    street.observation.poses[:, 0] = np.nan
    assert judge(street, drive(speed=10.0))[NC] == [1.0]


# --- time to collision -----------------------------------------------------------------------------------------------


def test_following_closely_at_equal_speed_keeps_the_time_to_collision() -> None:
    assert judge(make_street([car("car", BUMPER + 2.0, speed=10.0)]), drive(speed=10.0))[TTC] == [1.0]


def test_closing_in_breaks_it_before_anything_is_hit() -> None:
    found = judge(make_street([car("car", BUMPER + 30.0, speed=3.0)]), drive(speed=10.0))
    assert found[TTC] == [0.0] and found[NC] == [1.0]


def test_traffic_that_rubs_along_the_side_breaks_it_in_an_intersection_only() -> None:
    """The other car is 34° off the heading: neither ahead nor behind."""
    beside = car("car", 3.0, 2.0, speed=4.0)
    assert judge(make_street([beside]), drive(speed=4.0))[TTC] == [1.0]
    assert judge(make_street([beside], intersection=True), drive(speed=4.0))[TTC] == [0.0]


# --- areas -----------------------------------------------------------------------------------------------------------


def test_one_corner_off_the_road_is_enough() -> None:
    edge = -1.75 + Vehicle.HALF_WIDTH  # where the right wheels touch the right edge of the road
    found = judge(make_street(), drive(speed=5.0, y=edge + 0.01), drive(speed=5.0, y=edge - 0.01))
    assert found[DAC] == [1.0, 0.0]


def test_wheels_exactly_on_the_edge_are_off_the_road() -> None:
    assert judge(make_street(), drive(speed=5.0, y=-1.75 + Vehicle.HALF_WIDTH))[DAC] == [0.0]


@pytest.mark.parametrize(("speed", "expected"), [(1.9, 1.0), (3.0, 0.5), (7.0, 0.0)])
def test_metres_within_a_second_in_the_wrong_lane_decide(speed: float, expected: float) -> None:
    """Eleven steps of 0.1 s are summed up: 1.1 s of driving. The left lane is not on the route."""
    street = make_street(left_on_route=False)
    assert judge(street, drive(speed=speed / 1.1 * 1.0, y=3.5))[DDC] == [expected]
    assert judge(street, drive(speed=speed, y=0.0))[DDC] == [1.0]


def test_intersections_are_spared_in_v2_only() -> None:
    for metric, expected in (("pdms_v1", 0.0), ("epdms_v2", 1.0)):
        street = make_street(left_on_route=False, intersection=True, metric=metric)
        assert judge(street, drive(speed=8.0, y=3.5))[DDC] == [expected]


# --- progress --------------------------------------------------------------------------------------------------------


def test_raw_progress_is_metres_along_the_centreline_and_never_negative() -> None:
    found = judge(make_street(), drive(speed=8.0), drive(speed=8.0, y=1.0), drive(speed=-3.0), drive(speed=0.0))
    np.testing.assert_allclose(found["raw_progress"], [32.0, 32.0, 0.0, 0.0], atol=1e-9)


def test_progress_saturates_at_the_end_of_the_centreline() -> None:
    found = judge(make_street(length=20.0), drive(speed=20.0))
    assert found["raw_progress"] == pytest.approx([20.0 - Vehicle.REAR_AXLE_TO_CENTER])


def test_progress_ratios_worked_by_hand() -> None:
    raw, multi, best = (
        torch.tensor(v, dtype=torch.float64)
        for v in ([8.0, 8.0, 3.0, 3.0], [1.0, 0.0, 1.0, 0.0], [16.0, 16.0, 5.0, 5.0])
    )
    assert ego_progress_v1(raw, multi, best).tolist() == [0.5, 0.0, 1.0, 0.0]
    assert ego_progress_v2(raw, best).tolist() == [0.5, 0.5, 1.0, 1.0]
    assert ego_progress_v2(torch.tensor(30.0), torch.tensor(20.0)).item() == 1.0  # masked best below the own progress


# --- comfort ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "order", "derivative"), [(41, 2, 0), (15, 2, 1), (5, 3, 2), (5, 2, 1), (41, 2, 1)])
def test_odd_filters_equal_scipys(window: int, order: int, derivative: int) -> None:
    values = np.random.default_rng(0).normal(size=(3, 41)).cumsum(axis=1)
    expected = savgol_filter(values, window, order, deriv=derivative, delta=0.1, axis=-1)
    np.testing.assert_allclose(savgol(torch.from_numpy(values), window, order, derivative), expected, atol=2e-8)


def test_the_even_filter_has_its_published_weights_and_fits_its_ends() -> None:
    values = np.random.default_rng(1).normal(size=41).cumsum()
    found = savgol(torch.from_numpy(values), 8, 2).numpy()
    weights = np.array([-15.75, 15.75, 36.75, 47.25, 47.25, 36.75, 15.75, -15.75]) / 168.0
    np.testing.assert_allclose(found[20], weights @ values[17:25], atol=1e-8)
    for part, at in ((slice(0, 8), np.arange(4)), (slice(33, 41), np.arange(4, 8))):
        expected = np.polyval(np.polyfit(np.arange(8), values[part], 2), at)
        np.testing.assert_allclose(found[part][at], expected, atol=1e-8)


def test_a_window_longer_than_the_signal_is_cut() -> None:
    values = torch.linspace(0, 1, 10, dtype=torch.float64) ** 2
    np.testing.assert_allclose(savgol(values, 15, 2), values, atol=1e-8)  # a parabola is kept as it is


@pytest.mark.parametrize("checks", [comfort_checks_v1, comfort_checks_v2])
def test_each_comfort_bound_fails_alone(checks) -> None:
    states = np.zeros((5, 41, StateIndex.SIZE))
    time = 0.1 * np.arange(41)
    states[1, :, StateIndex.AX] = 2.5  # longitudinal
    states[2, :, StateIndex.AY] = -5.0  # lateral
    states[3, :, StateIndex.HEADING] = 1.0 * time + 3.0  # yaw rate 1, wraps through pi
    states[3, :, StateIndex.HEADING] = np.angle(np.exp(1j * states[3, :, StateIndex.HEADING]))
    states[4, :, StateIndex.HEADING] = 2.0 * (time - 2.0) ** 2 / 2  # yaw acceleration 2, rate up to 4
    found = checks(torch.from_numpy(states)).numpy()
    assert found[0].all()
    failed = [{CHECKS[i] for i in np.flatnonzero(~row)} for row in found]
    assert failed[1:4] == [{"longitudinal_acceleration"}, {"lateral_acceleration"}, {"yaw_rate"}]
    assert failed[4] == {"yaw_rate", "yaw_acceleration"}


def test_jerk_bounds() -> None:
    states = np.zeros((1, 41, StateIndex.SIZE))
    states[..., StateIndex.AX] = np.linspace(-2.0, 2.0, 41)  # 1 m/s³
    assert comfort_checks_v2(torch.from_numpy(states)).all()
    states[..., StateIndex.AX] = np.interp(np.arange(41), [20, 30], [-3.0, 2.0])  # 5 m/s³ for a second
    failed = {CHECKS[i] for i in np.flatnonzero(~comfort_checks_v2(torch.from_numpy(states)).numpy()[0])}
    assert failed == {"longitudinal_jerk"}


@needs_golden
def test_comfort_flags_equal_the_reference() -> None:
    flags = load("scores_v1")["comfort_flags"]
    for scene in debug_scenes():
        states = torch.from_numpy(scene.debug["candidate_simulated"])
        np.testing.assert_array_equal(comfort_checks_v1(states).numpy(), flags[scene.row])


def test_history_comfort_sees_the_past() -> None:
    future = torch.zeros(1, 2, 41, StateIndex.SIZE, dtype=torch.float64)
    past = torch.zeros(14, StateIndex.SIZE, dtype=torch.float64)
    past[:, StateIndex.AX] = 3.0
    scene = torch.tensor([0])
    assert history_comfort(future, [(scene, torch.zeros_like(past)[None])]).tolist() == [[1.0, 1.0]]
    assert history_comfort(future, [(scene, past[None])]).tolist() == [[0.0, 0.0]]
    assert history_comfort(future, []).tolist() == [[1.0, 1.0]]


# --- v2 --------------------------------------------------------------------------------------------------------------


def test_a_red_light_forbids_every_touch_while_it_is_red() -> None:
    front = Vehicle.FRONT_LENGTH
    stop = drive(speed=0.0)
    for start, expected in ((front + 0.01, 1.0), (front, 0.0), (front - 0.01, 0.0)):
        street = make_street(lights=[light(start, start + 10.0)], metric="epdms_v2")
        assert judge(street, stop)[TLC] == [expected]


def test_a_light_that_turns_green_in_time_is_no_obstacle() -> None:
    for red_until, expected in ((15, 1.0), (25, 0.0)):
        street = make_street(lights=[light(20.0, 30.0, red_until)], metric="epdms_v2")
        assert judge(street, drive(speed=(20.0 - Vehicle.FRONT_LENGTH) / 2.0))[TLC] == [expected]


def test_touching_a_red_connector_without_a_corner_inside_counts() -> None:
    """A connector narrower than the ego, and shorter: it lies under the ego between its corners."""
    street = make_street(lights=[light(1.0, 2.0, width=0.5)], metric="epdms_v2")
    assert judge(street, drive(speed=0.0))[TLC] == [0.0]
    aside = make_street(lights=[light(1.0, 2.0, width=0.5, y=2.0)], metric="epdms_v2")
    assert judge(aside, drive(speed=0.0))[TLC] == [1.0]


def test_v1_has_no_eyes_for_lights() -> None:
    found = judge(make_street(lights=[light(5.0, 30.0)]), drive(speed=8.0))
    assert TLC not in found and found[NC] == [1.0]


def test_two_seconds_off_the_centreline_break_lane_keeping() -> None:
    states = [drive(speed=5.0) for _ in range(4)]
    for row, samples in zip(states, (19, 20, 19, 41), strict=True):
        row[5 : 5 + samples, StateIndex.Y] = 0.6
    states[2][26:, StateIndex.Y] = 0.6  # 19 + 15 samples, with a break of two between
    states[3][:, StateIndex.Y] = 0.49
    assert judge(make_street(metric="epdms_v2"), *states)[LK] == [1.0, 0.0, 1.0, 1.0]


def test_in_an_intersection_lanes_need_not_be_kept() -> None:
    assert judge(make_street(metric="epdms_v2", intersection=True), drive(speed=5.0, y=1.0))[LK] == [1.0]


def test_extended_comfort_compares_the_common_time() -> None:
    plan = drive(speed=5.0)
    plan[:, StateIndex.AX] = np.linspace(0, 2, 41)
    later = np.concatenate([plan[5:], np.tile(plan[-1], (5, 1))])
    rough = later.copy()
    rough[:, StateIndex.AX] += 0.8
    first, second, third = (motion(torch.from_numpy(states)) for states in (plan, later, rough))
    assert extended_comfort(second, first, 0.5).item() == 1.0
    assert extended_comfort(third, first, 0.5).item() == 0.0


def test_neighbours_are_scenes_of_one_log_half_a_second_apart() -> None:
    logs = ["b", "a", "a", "a", "b", "a"]
    times = [0, 500_000, 0, 1_500_000, 600_000, 2_000_000]
    assert sorted(preceding_scenes(logs, times)) == [(1, 2, 0.5), (5, 3, 0.5)]


# --- aggregation -----------------------------------------------------------------------------------------------------


def columns(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def test_pdms_worked_by_hand() -> None:
    found = columns(
        no_at_fault_collisions=0.5, drivable_area_compliance=1.0, driving_direction_compliance=0.0,
        ego_progress=0.4, time_to_collision_within_bound=1.0, comfort=0.0,
    )  # fmt: skip
    assert aggregate.weighted_score(found, "pdms_v1").item() == pytest.approx(0.5 * (5 * 0.4 + 5) / 12)


def test_epdms_worked_by_hand_with_and_without_a_preceding_scene() -> None:
    found = columns(
        no_at_fault_collisions=1.0, drivable_area_compliance=1.0, driving_direction_compliance=0.5,
        traffic_light_compliance=1.0, ego_progress=0.8, time_to_collision_within_bound=1.0, lane_keeping=0.0,
        history_comfort=1.0, two_frame_extended_comfort=1.0,
    )  # fmt: skip
    assert aggregate.weighted_score(found, "epdms_v2").item() == pytest.approx(0.5 * (4 + 5 + 0 + 2 + 2) / 16)
    found["two_frame_extended_comfort"] = torch.tensor(torch.nan, dtype=torch.float64)
    assert aggregate.weighted_score(found, "epdms_v2").item() == pytest.approx(0.5 * (4 + 5 + 0 + 2) / 14)


def test_the_human_filter_forgives_a_zero_and_nothing_else() -> None:
    plans = {name: torch.zeros(1, 3) for name in aggregate.COLUMNS["epdms_v2"]}
    human = {name: torch.ones(1, 1) for name in plans} | {DAC: torch.zeros(1, 1), DDC: torch.full((1, 1), 0.5)}
    found = aggregate.forgive_human_faults(plans, human)
    assert {name for name, values in found.items() if values.any()} == {DAC}


def test_area_kinds_decide_what_is_drivable() -> None:
    """Lanes alone are no ground to drive on; a car park is."""
    street = make_street()
    for kind, expected in ((AreaKind.CARPARK, 1.0), (AreaKind.INTERSECTION, 1.0), (AreaKind.LANE, 0.0)):
        kinds = np.where(street.drivable_map.kinds == AreaKind.ROADBLOCK, kind, street.drivable_map.kinds)
        street.drivable_map.kinds[:] = kinds
        assert judge(street, drive(speed=5.0))[DAC] == [expected]
        street.drivable_map.kinds[0] = AreaKind.ROADBLOCK


def test_before_its_fix_the_human_filter_changed_what_is_reported_but_not_the_score() -> None:
    names = aggregate.COLUMNS["epdms_v2"]
    plain = {name: torch.tensor([1.0], dtype=torch.float64) for name in names}
    unfiltered = {f"unfiltered_{name}": value for name, value in plain.items()}
    columns = {**plain, **unfiltered, "two_frame_extended_comfort": torch.tensor([0.0], dtype=torch.float64)}
    assert (
        aggregate.final_score(columns, "epdms_v2").item()
        == aggregate.final_score(columns, "epdms_v2_unfixed_filter").item()
        == 14 / 16
    )
    columns["unfiltered_lane_keeping"] = torch.tensor([0.0], dtype=torch.float64)  # forgiven: 1 in `lane_keeping`
    assert aggregate.final_score(columns, "epdms_v2").item() == 14 / 16
    assert aggregate.final_score(columns, "epdms_v2_unfixed_filter").item() == 12 / 16
    columns["unfiltered_drivable_area_compliance"] = torch.tensor([0.0], dtype=torch.float64)
    assert aggregate.final_score(columns, "epdms_v2_unfixed_filter").item() == 0.0
    assert (
        aggregate.base_metric("epdms_v2_unfixed_filter") == "epdms_v2" and aggregate.base_metric("pdms_v1") == "pdms_v1"
    )
    assert aggregate.table_columns("epdms_v2_unfixed_filter") == aggregate.table_columns("epdms_v2")
