"""Maps: relations on a map drawn by hand, agreement with reference results, and messages for what is missing."""

from __future__ import annotations

import json
import pickle
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_eval.errors import DataError
from navsim_eval.formats.geopackage import FeatureTable, list_layers, read_layer, read_meta, write_geopackage
from navsim_eval.formats.map_layers import REQUIRED_LAYERS, Layer
from navsim_eval.formats.map_store import MapStore, canonical_map_name, write_map
from navsim_eval.formats.maps import RoadMap
from navsim_eval.pdm.drivable import build_drivable_map
from tests.golden import GOLDEN, needs_golden
from tests.navsim_eval.tiny_map import CONNECTOR, LANE, ORIGIN, write_tiny_map

BLOCKS = {1: ((0, 0), (50, 0)), 2: ((60, 0), (100, 0)), 3: ((60, 30), (100, 30))}
LINKS = {10: (1, 2), 11: (1, 3)}


@pytest.fixture
def tiny(tmp_path: Path) -> RoadMap:
    return write_tiny_map(tmp_path / "maps", BLOCKS, LINKS, {1: 12.5})


def lane(block: int) -> str:
    return str(LANE + block)


def connector(link: int) -> str:
    return str(CONNECTOR + link)


# --- relations -------------------------------------------------------------------------------------------------------


def test_edges(tiny: RoadMap) -> None:
    assert tiny.outgoing(lane(1)) == (connector(10), connector(11))
    assert tiny.incoming(lane(1)) == () and tiny.outgoing(lane(2)) == ()
    assert tiny.incoming(connector(11)) == (lane(1),) and tiny.outgoing(connector(11)) == (lane(3),)
    assert tiny.is_connector(connector(10)) and not tiny.is_connector(lane(1)) and not tiny.is_connector("nothing")
    assert tiny.has_edge(lane(2)) and tiny.has_edge(connector(10)) and not tiny.has_edge("1")
    assert tiny.block_of(lane(3)) == "3" and tiny.block_of(connector(11)) == "11"
    assert tiny.speed_limit(lane(1)) == 12.5 and tiny.speed_limit(lane(2)) is None
    assert tiny.speed_limit(connector(10)) is None


def test_blocks(tiny: RoadMap) -> None:
    assert tiny.roadblock_outgoing("1") == ("10", "11") and tiny.roadblock_incoming("1") == ()
    assert tiny.roadblock_outgoing("10") == ("2",) and tiny.roadblock_incoming("10") == ("1",)
    assert tiny.roadblock_incoming("3") == ("11",)
    assert tiny.interior_edges("1") == (lane(1),) and tiny.interior_edges("11") == (connector(11),)
    assert tiny.interior_edges("nothing") == ()
    assert tiny.has_block("1") and tiny.has_block("10") and not tiny.has_block(lane(1))
    assert tiny.is_block_connector("10") and not tiny.is_block_connector("1")


def test_geometry_is_in_utm_metres(tiny: RoadMap) -> None:
    np.testing.assert_allclose(tiny.baseline(lane(1))[[0, -1]] - ORIGIN, [[0, 0], [50, 0]], atol=1e-6)
    assert tiny.baseline(lane(1)).dtype == np.float64
    assert tiny.polygon(lane(1)).area == pytest.approx(200, abs=1e-4)
    assert tiny.polygon(connector(10)).area == pytest.approx(40, abs=1e-4)
    assert tiny.block_polygon("3").area == pytest.approx(160, abs=1e-4)
    assert tiny.block_polygon("10").equals(tiny.layer("lane_group_connectors").geometries[0])
    assert tiny.utm_zone == (19, False)


def test_null_and_dangling_keys_are_no_links(tmp_path: Path) -> None:
    road_map = write_tiny_map(tmp_path / "maps", BLOCKS, LINKS)
    with sqlite3.connect(road_map.path) as connection:
        connection.execute(
            f"UPDATE lane_connectors SET entry_lane_fid = 77, lane_group_connector_fid = NULL "
            f"WHERE fid = {CONNECTOR + 10}"
        )
        connection.execute("UPDATE lane_group_connectors SET from_lane_group_fid = NULL WHERE fid = 11")
    connection.close()
    changed = MapStore(tmp_path / "maps").get("tiny")
    assert changed.outgoing(connector(10)) == () and changed.incoming(connector(10)) == (lane(1),)
    assert changed.block_of(connector(10)) is None and changed.interior_edges("10") == ()
    assert changed.roadblock_incoming("11") == () and changed.roadblock_outgoing("1") == ("10",)
    assert changed.incoming(lane(2)) == ()


def test_layer_of_a_map(tiny: RoadMap) -> None:
    lanes = tiny.layer("lanes_polygons")
    assert lanes.ids.tolist() == [lane(1), lane(2), lane(3)] and lanes.row[lane(2)] == 1 and len(lanes) == 3
    assert lanes.keys("lane_group_fid").tolist() == ["1", "2", "3"]
    assert tiny.layer("lanes_polygons") is lanes, "read once"
    assert tiny.layer("baseline_paths").keys("lane_fid").tolist()[-1] == "", "NULL"
    empty = tiny.layer("crosswalks")
    assert len(empty) == 0 and empty.in_square(0, 0, 1e9).tolist() == [] and empty.row == {}


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20), st.floats(0.1, 5)), max_size=12),
    st.tuples(st.floats(-20, 20), st.floats(-20, 20), st.floats(0, 10)),
)
def test_square_query_equals_the_plain_test(circles: list, square: tuple[float, float, float]) -> None:
    """Same rows as testing each geometry against the square, in table order."""
    geometries = np.array([shapely.Point(x, y).buffer(r) for x, y, r in circles], dtype=object)
    layer = Layer("circles", np.arange(len(circles)).astype(str), geometries, {})
    x, y, half = square
    box = shapely.box(x - half, y - half, x + half, y + half)
    assert layer.in_square(x, y, half).tolist() == [i for i, g in enumerate(geometries) if g.intersects(box)]


def test_square_is_closed(tiny: RoadMap) -> None:
    layer = Layer("one", np.array(["1"]), np.array([shapely.box(1, 0, 2, 1)], dtype=object), {})
    assert layer.in_square(0, 0, 1).tolist() == [0]
    assert layer.in_square(0, 0, np.nextafter(1, 0)).tolist() == []


# --- finding and reopening -------------------------------------------------------------------------------------------


def test_names_that_logs_use(tmp_path: Path, tiny: RoadMap) -> None:
    assert canonical_map_name("las_vegas") == "us-nv-las-vegas-strip"
    assert canonical_map_name("us-ma-boston.gpkg") == "us-ma-boston"
    store = MapStore(tmp_path / "maps")
    assert store.get("tiny.gpkg") is store.get("tiny") is MapStore(tmp_path / "maps").get("tiny"), "opened once"


def test_version_file_decides_else_the_newest(tmp_path: Path, tiny: RoadMap) -> None:
    root = tmp_path / "maps"
    for version in ("0.9", "1.10", "1.9"):
        shutil.copytree(root / "tiny/1.0", root / "tiny" / version)
    assert MapStore(root).path("tiny").parent.name == "1.0"
    (root / "nuplan-maps-v1.0.json").unlink()
    assert MapStore(root).path("tiny").parent.name == "1.10"
    (root / "other.json").write_text(json.dumps({"tiny": {"version": "0.9"}}))
    assert MapStore(root, "other").path("tiny").parent.name == "0.9"
    assert MapStore(root, "other.json").path("tiny").parent.name == "0.9"


def test_a_rewritten_file_is_opened_anew(tmp_path: Path, tiny: RoadMap) -> None:
    assert len(MapStore(tmp_path / "maps").get("tiny").layer("lanes_polygons")) == 3
    write_tiny_map(tmp_path / "maps", {1: BLOCKS[1]}, {})
    assert len(MapStore(tmp_path / "maps").get("tiny").layer("lanes_polygons")) == 1


def test_a_copy_for_a_worker_reopens_the_file(tiny: RoadMap) -> None:
    tiny.layer("lanes_polygons")
    message = pickle.dumps(tiny)
    assert len(message) < 500
    copy = pickle.loads(message)
    assert copy.name == "tiny" and copy.outgoing(lane(1)) == tiny.outgoing(lane(1))


def test_written_map_is_in_lonlat_and_versions_accumulate(tmp_path: Path, tiny: RoadMap) -> None:
    stored = read_layer(tiny.path, "lanes_polygons")
    lon, lat = shapely.get_coordinates(stored.geometries)[0]
    assert stored.srs_id == 4326 and -72 < lon < -69 and 42 < lat < 43
    write_map(tmp_path / "maps", "second", "2.0", {}, epsg=32619)
    versions = json.loads((tmp_path / "maps/nuplan-maps-v1.0.json").read_text())
    assert {name: entry["version"] for name, entry in versions.items()} == {"tiny": "1.0", "second": "2.0"}


def test_layers_already_in_metres_are_taken_as_they_are(tiny: RoadMap, tmp_path: Path) -> None:
    layers = {}
    for name in list_layers(tiny.path):
        table = read_layer(tiny.path, name)
        layers[name] = FeatureTable(table.fids, tiny.layer(name).geometries, table.columns, srs_id=32619)
    metric = RoadMap(write_geopackage(tmp_path / "metric.gpkg", layers, read_meta(tiny.path)))
    np.testing.assert_array_equal(metric.baseline(lane(1)), tiny.baseline(lane(1)))


def test_multi_part_lines_are_one_baseline(tiny: RoadMap, tmp_path: Path) -> None:
    layers = {name: read_layer(tiny.path, name) for name in list_layers(tiny.path)}
    paths = layers["baseline_paths"]
    multi = np.array([shapely.MultiLineString([line]) for line in paths.geometries], dtype=object)
    layers["baseline_paths"] = FeatureTable(paths.fids, multi, paths.columns)
    copy = RoadMap(write_geopackage(tmp_path / "multi.gpkg", layers, read_meta(tiny.path)))
    np.testing.assert_array_equal(copy.baseline(lane(1)), tiny.baseline(lane(1)))


# --- what is missing -------------------------------------------------------------------------------------------------


def test_missing_map_says_where_it_looked_and_what_to_set(tmp_path: Path, tiny: RoadMap) -> None:
    with pytest.raises(DataError, match=r"no map for location 'nowhere' \(present: tiny\).*NUPLAN_MAPS_ROOT"):
        MapStore(tmp_path / "maps").get("nowhere")
    with pytest.raises(DataError, match=r"\(present: none\)"):
        MapStore(tmp_path / "absent").get("tiny")
    (tmp_path / "maps/nuplan-maps-v1.0.json").write_text("{nonsense")
    with pytest.raises(DataError, match=r"nuplan-maps-v1\.0\.json: not a version file"):
        MapStore(tmp_path / "maps").get("tiny")


@pytest.mark.parametrize("name", sorted(REQUIRED_LAYERS))
def test_missing_layer_or_column_is_named(tiny: RoadMap, name: str, tmp_path: Path) -> None:
    layers = {name: read_layer(tiny.path, name) for name in list_layers(tiny.path)}
    without = {other: table for other, table in layers.items() if other != name}
    broken = RoadMap(write_geopackage(tmp_path / "a.gpkg", without, read_meta(tiny.path)))
    with pytest.raises(DataError, match=rf"a\.gpkg: layer {name} is missing \(present: .*\) — unpack or download"):
        broken.layer(name)
    for column in REQUIRED_LAYERS[name]:
        table = layers[name]
        rest = {other: values for other, values in table.columns.items() if other != column}
        without = {**layers, name: FeatureTable(table.fids, table.geometries, rest)}
        broken = RoadMap(write_geopackage(tmp_path / "b.gpkg", without, read_meta(tiny.path)))
        with pytest.raises(DataError, match=rf"b\.gpkg \[{name}\.{column}\]: column is missing"):
            broken.layer(name)


def test_a_map_without_the_layer_of_car_parks_has_none(tiny: RoadMap, tmp_path: Path) -> None:
    layers = {name: read_layer(tiny.path, name) for name in list_layers(tiny.path)}
    park = FeatureTable(np.array([77]), layers["intersections"].geometries[:1])
    maps = {}
    for name, parks in (("with", {"carpark_areas": park}), ("without", {})):
        rest = {other: table for other, table in layers.items() if other != "carpark_areas"}
        maps[name] = RoadMap(write_geopackage(tmp_path / f"{name}.gpkg", {**rest, **parks}, read_meta(tiny.path)))
    ids = {name: build_drivable_map(found, np.append(ORIGIN, 0.0), []).ids.tolist() for name, found in maps.items()}
    assert "carpark_areas" not in maps["without"].available and ids["with"] == [*ids["without"], "77"]


def test_unknown_ids_and_layers(tiny: RoadMap) -> None:
    with pytest.raises(DataError, match=r"\[baseline_paths\]: nothing belongs to id 99"):
        tiny.baseline("99")
    with pytest.raises(DataError, match=r"\[lanes_polygons\]: nothing belongs to id 99"):
        tiny.polygon("99")
    with pytest.raises(DataError, match="no lane or lane connector with id 99"):
        tiny.block_of("99")
    with pytest.raises(DataError, match="layer lane_polygons is missing"):
        tiny.layer("lane_polygons")


@pytest.mark.parametrize(
    "meta, problem",
    [({}, "no key projectedCoordSystem"), ({"projectedCoordSystem": "epsg:4326"}, "'epsg:4326' is not a WGS 84 / UTM")],
)
def test_unusable_coordinate_system(tiny: RoadMap, tmp_path: Path, meta: dict, problem: str) -> None:
    layers = {"lane_groups_polygons": read_layer(tiny.path, "lane_groups_polygons")}
    with pytest.raises(DataError, match=problem):
        RoadMap(write_geopackage(tmp_path / "m.gpkg", layers, meta)).layer("lane_groups_polygons")
    table = layers["lane_groups_polygons"]
    other = {"lane_groups_polygons": FeatureTable(table.fids, table.geometries, table.columns, srs_id=32631)}
    with pytest.raises(DataError, match="coordinate system 32631 is neither EPSG:4326 nor"):
        RoadMap(write_geopackage(tmp_path / "n.gpkg", other, read_meta(tiny.path))).layer("lane_groups_polygons")


# --- reference results -----------------------------------------------------------------------------------------------


@needs_golden
@pytest.mark.golden
@pytest.mark.parametrize("path", sorted((GOLDEN / "pdms/debug").glob("*.npz")), ids=lambda p: p.stem)
def test_vertices_of_the_reference_centreline(path: Path) -> None:
    """The reference's centreline concatenates stored baselines: each of its vertices is one of ours."""
    road_map = MapStore(GOLDEN / "pdms/maps").get("us-ma-boston")
    debug = np.load(path)
    ours = np.concatenate([road_map.baseline(edge) for edge in debug["route_lane_ids"].tolist()])
    distance = np.abs(debug["centerline"][:, None, :2] - ours[None]).max(axis=2).min(axis=1)
    assert distance.max() < 1e-8


@needs_golden
@pytest.mark.golden
@pytest.mark.parametrize(
    "root, location, counts",
    [
        ("pdms", "us-ma-boston", (252, 342, 138, 228, 72)),
        ("real_scenes", "sg-one-north", (415, 445, 296, 334, 91)),
        ("real_scenes", "us-ma-boston", (247, 269, 217, 252, 59)),
        ("real_scenes", "us-nv-las-vegas-strip", (0, 0, 0, 0, 0)),
    ],
)
def test_golden_maps_hold_together(root: str, location: str, counts: tuple[int, ...]) -> None:
    road_map = MapStore(GOLDEN / root / "maps").get(location)
    names = ("lanes_polygons", "lane_connectors", "lane_groups_polygons", "lane_group_connectors", "intersections")
    assert tuple(len(road_map.layer(name)) for name in names) == counts
    edges = [*road_map.layer(names[0]).ids.tolist(), *road_map.layer(names[1]).ids.tolist()]
    for edge in edges:
        assert len(road_map.baseline(edge)) > 1 and road_map.polygon(edge).area > 0
        assert edge in road_map.interior_edges(road_map.block_of(edge))
        for after in road_map.outgoing(edge):
            assert edge in road_map.incoming(after) and road_map.is_connector(edge) != road_map.is_connector(after)
    for block in [*road_map.layer(names[2]).ids.tolist(), *road_map.layer(names[3]).ids.tolist()]:
        for after in road_map.roadblock_outgoing(block):
            assert block in road_map.roadblock_incoming(after)
