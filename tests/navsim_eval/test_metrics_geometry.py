"""The packed geometry under the sub-scores, against shapely: points in polygons, touching boxes, polylines."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_eval.geometry import Vehicle, box_corners
from navsim_eval.metrics import polygons as packed
from navsim_eval.metrics.footprint import Boxes, Footprints, find_contacts, rectangles_touch
from navsim_eval.metrics.polygons import BITS, PolygonBatch, build_grid
from navsim_eval.metrics.polyline import Polylines
from navsim_eval.pdm.types import StateIndex

ORIGIN = np.array([664_123.25, 3_997_456.5])
SEEDS = st.integers(0, 10_000)


def random_polygons(seed: int, count: int = 30, spread: float = 60.0) -> np.ndarray:
    """Star-shaped polygons around ORIGIN; some with a hole, some of several parts."""
    rng = np.random.default_rng(seed)
    shapes = []
    for index in range(count):
        center, vertices = rng.uniform(-spread, spread, 2), rng.integers(4, 30)
        angle = (np.arange(vertices) + rng.uniform(0, 0.9, vertices)) * 2 * np.pi / vertices
        radius = rng.uniform(3, 25) * rng.uniform(0.5, 1.0, vertices)
        ring = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        shape = shapely.Polygon(ORIGIN + center + ring, [ORIGIN + center + 0.3 * ring] if index % 3 == 0 else None)
        if index % 5 == 0:
            shape = shapely.MultiPolygon([shape, shapely.box(*(ORIGIN + center + 40), *(ORIGIN + center + 45))])
        shapes.append(shape)
    return np.array(shapes, dtype=object)


def located(grids: list, points: np.ndarray, count: int) -> np.ndarray:
    """(P, S, Q) bool from points (S, Q, 2) relative to ORIGIN."""
    batch = PolygonBatch.of(grids)
    x, y = torch.from_numpy(points).unbind(-1)
    words = batch.locate("all", torch.arange(len(grids))[:, None], x, y).numpy()
    return np.stack([words[p // BITS] >> (p % BITS) & 1 for p in range(count)]).astype(bool)


def contained(polygons: np.ndarray, points: np.ndarray) -> np.ndarray:
    x, y = points[..., 0] + ORIGIN[0], points[..., 1] + ORIGIN[1]
    return np.stack([shapely.contains_xy(polygon, x, y) for polygon in polygons])


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([10, 64, 140]), st.sampled_from([20.0, 60.0]))
def test_points_are_located_as_shapely_does_inside_and_beyond_the_grid(seed: int, count: int, reach: float) -> None:
    polygons = random_polygons(seed, count)
    points = np.random.default_rng(seed).uniform(-90, 90, (1, 400, 2))
    found = located([build_grid(polygons, ORIGIN, reach)], points, count)
    np.testing.assert_array_equal(found, contained(polygons, points))


def test_scenes_in_a_batch_keep_their_own_polygons() -> None:
    worlds = [random_polygons(seed, count) for seed, count in ((1, 5), (2, 90), (3, 20))]
    points = np.random.default_rng(0).uniform(-90, 90, (3, 500, 2))
    grids = [build_grid(world, ORIGIN, 50.0) for world in worlds]
    found = located(grids, points, 90)
    for index, world in enumerate(worlds):
        np.testing.assert_array_equal(found[: len(world), index], contained(world, points[index]))
        assert not found[len(world) :, index].any()


@pytest.mark.parametrize("shift", [0.0, 100.0])  # inside the grid, and beyond it
def test_the_boundary_is_outside(shift: float) -> None:
    square = np.array([shapely.box(*(ORIGIN + shift), *(ORIGIN + shift + 8))], dtype=object)
    points = np.array([[4, 4], [0, 4], [8, 4], [4, 0], [4, 8], [0, 0], [8, 8], [7.999, 4], [8.001, 4]]) + shift
    found = located([build_grid(square, ORIGIN, 20.0)], points[None], 1)[0, 0]
    np.testing.assert_array_equal(found, [True, False, False, False, False, False, False, True, False])


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_round_coordinates_of_test_worlds_are_located_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low = rng.integers(-20, 15, (40, 2))
    boxes = shapely.box(*(low + ORIGIN).T, *(low + rng.integers(1, 12, (40, 2)) + ORIGIN).T)
    points = rng.integers(-42, 50, (1, 400, 2)) / 2.0  # many on edges and corners
    found = located([build_grid(boxes, ORIGIN, 15.0)], points, 40)
    np.testing.assert_array_equal(found, contained(boxes, points))


def test_a_map_without_polygons_contains_nothing() -> None:
    grid = build_grid(np.array([], dtype=object), ORIGIN, 20.0)
    assert not PolygonBatch.of([grid]).locate("all", torch.tensor([[0]]), *torch.zeros(2, 1, 3)).any()


def test_far_points_are_tested_in_chunks(monkeypatch) -> None:
    polygons, points = random_polygons(5), np.random.default_rng(5).uniform(-90, 90, (1, 300, 2))
    grid = build_grid(polygons, ORIGIN, 10.0)
    whole = located([grid], points, len(polygons))
    monkeypatch.setattr(packed, "_SLOW_CHUNK", 5000)
    np.testing.assert_array_equal(located([grid], points, len(polygons)), whole)


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_rectangles_touch_where_shapely_says_they_intersect(seed: int) -> None:
    rng = np.random.default_rng(seed)
    poses = np.concatenate([rng.uniform(-4, 4, (2, 100, 2)), rng.uniform(-4, 4, (2, 100, 1))], axis=-1)
    sizes = rng.uniform(0.2, 6, (2, 100, 2))
    first, second = (shapely.polygons(box_corners(p, s[:, 0], s[:, 1])) for p, s in zip(poses, sizes, strict=True))
    a, b, half = torch.from_numpy(poses[0]), torch.from_numpy(poses[1]), torch.from_numpy(sizes / 2)
    found = rectangles_touch(
        b[:, 0] - a[:, 0], b[:, 1] - a[:, 1], torch.cos(a[:, 2]), torch.sin(a[:, 2]), *half[0].T,
        torch.cos(b[:, 2]), torch.sin(b[:, 2]), *half[1].T,
    )  # fmt: skip
    np.testing.assert_array_equal(found.numpy(), shapely.intersects(first, second))


def test_rectangles_that_share_an_edge_or_a_corner_touch() -> None:
    one, zero, size = torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0)
    assert rectangles_touch(torch.tensor(2.0), zero, one, zero, size, size, one, zero, size, size)
    assert rectangles_touch(torch.tensor(2.0), torch.tensor(2.0), one, zero, size, size, one, zero, size, size)
    assert not rectangles_touch(torch.tensor(2.001), zero, one, zero, size, size, one, zero, size, size)


def random_traffic(seed: int, scenes: int = 2, objects: int = 12, steps: int = 51) -> tuple[Boxes, np.ndarray]:
    """Boxes that wander around the origin, some absent at times; and their poses (S, T, N, 3)."""
    rng = np.random.default_rng(seed)
    start, velocity = rng.uniform(-15, 15, (scenes, 1, objects, 2)), rng.uniform(-6, 6, (scenes, 1, objects, 2))
    position = start + velocity * 0.1 * np.arange(steps)[:, None, None]
    heading = np.broadcast_to(rng.uniform(-4, 4, (scenes, 1, objects, 1)), (*position.shape[:-1], 1))
    poses = np.concatenate([position, heading], axis=-1)
    poses[rng.random(poses.shape[:-1]) < 0.2] = np.nan
    x, y, angle = torch.from_numpy(poses).unbind(-1)
    sizes = torch.from_numpy(rng.uniform(0.3, 3, (2, scenes, objects)))
    flags = torch.from_numpy(rng.random((3, scenes, objects)) < 0.3)
    return Boxes(x, y, torch.cos(angle), torch.sin(angle), *sizes, *flags), poses


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_contacts_are_those_that_shapely_finds(seed: int) -> None:
    boxes, poses = random_traffic(seed)
    rng = np.random.default_rng(seed + 1)
    states = np.zeros((2, 3, 41, StateIndex.SIZE))
    states[..., :2], states[..., 2] = rng.uniform(-12, 12, (2, 3, 41, 2)), rng.uniform(-4, 4, (2, 3, 41))
    states[..., StateIndex.VX] = rng.uniform(-2, 10, (2, 3, 41))
    ego = Footprints.of(torch.from_numpy(states))
    contacts = find_contacts(ego, boxes, (0, 9), 0.1)
    indices = contacts.scene, contacts.proposal, contacts.time, contacts.lead, contacts.object
    found = set(zip(*(index.tolist() for index in indices), strict=True))

    expected = set()
    length, width = 2 * boxes.half_length.numpy(), 2 * boxes.half_width.numpy()
    for lead in (0, 9):
        shift = Vehicle.REAR_AXLE_TO_CENTER + lead * 0.1 * np.abs(states[..., StateIndex.VX])
        center = states[..., :3].copy()
        center[..., 0] += shift * np.cos(states[..., 2])
        center[..., 1] += shift * np.sin(states[..., 2])
        egos = shapely.polygons(box_corners(center, Vehicle.LENGTH, Vehicle.WIDTH))
        for scene, item in np.ndindex(poses.shape[0], poses.shape[2]):
            if boxes.is_ignored[scene, item]:
                continue
            corners = box_corners(poses[scene, :, item], length[scene, item], width[scene, item])
            present = np.isfinite(corners).all(axis=(1, 2))
            for time in np.flatnonzero(present[lead : lead + 41]):
                hits = shapely.intersects(egos[scene, :, time], shapely.Polygon(corners[time + lead]))
                expected |= {(scene, int(p), int(time), lead, item) for p in np.flatnonzero(hits)}
    assert found == expected


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_projection_and_nearness_equal_shapely(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lines = [np.cumsum(rng.uniform(-1, 3, (count, 2)), axis=0) for count in (2, 40, 133)]
    lines[1][20] = lines[1][19]  # a doubled vertex
    points = rng.uniform(-5, 60, (3, 200, 2))
    vertices = np.stack([line[rng.integers(0, len(line), 100)] for line in lines])
    points[:, 100:] = vertices + rng.normal(0, 0.5, vertices.shape)
    packed_lines = Polylines.of(lines)
    x, y = torch.from_numpy(points).unbind(-1)
    for index, line in enumerate(lines):
        shape = shapely.LineString(line)
        arc = shapely.line_locate_point(shape, shapely.points(points[index]))
        np.testing.assert_allclose(packed_lines.project(x, y)[index], arc, atol=1e-9)
        near = shapely.distance(shape, shapely.points(points[index])) <= 0.5
        np.testing.assert_array_equal(packed_lines.within(x, y, 0.5)[index].numpy(), near)
