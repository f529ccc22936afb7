"""GeoPackage files: what is written is read back, by us and by an independent reader."""

from __future__ import annotations

import os
import sqlite3
import struct
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_eval.errors import DataError
from navsim_eval.formats.geopackage import FeatureTable, list_layers, read_layer, read_meta, write_geopackage
from tests.golden import GOLDEN, needs_golden

GOLDEN_MAPS = sorted(GOLDEN.glob("*/maps/*/*/map.gpkg"))


def objects(values: list) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def mixed_table() -> FeatureTable:
    return FeatureTable(
        fids=np.array([3, 7, 12]),
        geometries=objects([shapely.Point(1, 2), None, shapely.LineString([(0, 0), (1, 1)])]),
        columns={
            "count": np.array([1, -2, 3]),
            "speed": np.array([1.5, np.nan, 0.1]),
            "lane_fid": np.array([5.0, np.nan, 9.0]),
            "marked": np.array([True, False, True]),
            "name": objects(["a", "", "ü 'quoted'"]),
        },
    )


def assert_equal(left: FeatureTable, right: FeatureTable) -> None:
    np.testing.assert_array_equal(left.fids, right.fids)
    assert [g is None or g.wkb for g in left.geometries] == [g is None or g.wkb for g in right.geometries]
    assert list(left.columns) == list(right.columns)
    for name in left.columns:
        np.testing.assert_array_equal(left.columns[name], right.columns[name], err_msg=name)
    assert left.srs_id == right.srs_id


def test_round_trip_of_every_column_kind(tmp_path: Path) -> None:
    path = write_geopackage(tmp_path / "m.gpkg", {"things": mixed_table()}, {"key": "value", "projected": "x"})
    assert_equal(read_layer(path, "things"), mixed_table())
    assert read_meta(path) == {"key": "value", "projected": "x"}
    assert list_layers(path) == ["things"]


def test_same_input_same_bytes_and_nothing_left_behind(tmp_path: Path) -> None:
    first = write_geopackage(tmp_path / "a" / "m.gpkg", {"things": mixed_table()}, {"k": "v"})
    second = write_geopackage(tmp_path / "b" / "m.gpkg", {"things": mixed_table()}, {"k": "v"})
    assert first.read_bytes() == second.read_bytes()
    assert os.listdir(first.parent) == ["m.gpkg"]


def test_an_independent_reader_agrees(tmp_path: Path) -> None:
    path = write_geopackage(tmp_path / "m.gpkg", {"things": mixed_table()}, {})
    meta, fids, wkb, columns = pyogrio.raw.read(path, layer="things", return_fids=True)
    assert meta["crs"] == "EPSG:4326"
    np.testing.assert_array_equal(fids, [3, 7, 12])
    values = dict(zip(meta["fields"], columns, strict=True))
    np.testing.assert_array_equal(values["speed"], [1.5, np.nan, 0.1])
    np.testing.assert_array_equal(values["lane_fid"], [5.0, np.nan, 9.0])
    assert values["marked"].dtype == bool and values["name"][2] == "ü 'quoted'"
    assert shapely.from_wkb(wkb[2]).equals(shapely.LineString([(0, 0), (1, 1)]))


coordinates = st.floats(-180, 180)
polygons = st.builds(lambda x, y, d: shapely.box(x, y, x + d, y + d), coordinates, coordinates, st.floats(1e-6, 1))
geometries = st.one_of(
    st.none(),
    polygons,
    st.builds(shapely.Point, coordinates, coordinates),
    st.builds(lambda a, b: shapely.MultiPolygon([a, b]), polygons, polygons),
    st.just(shapely.Polygon()),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(geometries, st.integers(-(2**53), 2**53), st.text("aé\"'; -", max_size=5)), max_size=6))
def test_round_trip_of_any_layer(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    shapes, numbers, texts = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    table = FeatureTable(
        np.arange(1, len(rows) + 1),
        objects(shapes),
        {"number": np.array(numbers, np.int64), "text": objects(texts), "other_fid": np.array(numbers, np.float64)},
    )
    path = write_geopackage(tmp_path_factory.mktemp("gpkg") / "m.gpkg", {'odd "name"': table}, {})
    back = read_layer(path, 'odd "name"')
    assert_equal(back, table)


def test_rows_come_in_ascending_fid_and_flat(tmp_path: Path) -> None:
    table = FeatureTable(np.array([9, 2]), objects([shapely.Point(1, 2, 3), shapely.Point(4, 5, 6)]))
    back = read_layer(write_geopackage(tmp_path / "m.gpkg", {"points": table}, {}), "points")
    assert back.fids.tolist() == [2, 9]
    assert not shapely.has_z(back.geometries).any()


@pytest.mark.parametrize("kind, envelope", [(0, 0), (1, 4), (2, 6), (3, 6), (4, 8)])
@pytest.mark.parametrize("order", ["<", ">"])
def test_blob_headers_of_other_writers(tmp_path: Path, kind: int, envelope: int, order: str) -> None:
    """Any envelope kind, either byte order, and z coordinates."""
    path = write_geopackage(tmp_path / "m.gpkg", {"points": FeatureTable(np.array([1]), objects([None]))}, {})
    header = struct.pack(f"{order}2sBBi{envelope}d", b"GP", 0, (kind << 1) | (order == "<"), 4326, *range(envelope))
    body = shapely.to_wkb(shapely.Point(1, 2, 3), byte_order=int(order == "<"), output_dimension=3)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE points SET geom = ?", (header + body,))
    connection.close()
    assert read_layer(path, "points").geometries[0] == shapely.Point(1, 2)


def test_reading_needs_no_write_access_and_locks_nothing(tmp_path: Path) -> None:
    path = write_geopackage(tmp_path / "odd #name?" / "m.gpkg", {"things": mixed_table()}, {})
    os.chmod(path, 0o444)
    os.chmod(path.parent, 0o555)
    try:
        read_layer(path, "things")
        assert os.listdir(path.parent) == ["m.gpkg"]
    finally:
        os.chmod(path.parent, 0o755)


def test_errors_name_file_and_layer(tmp_path: Path) -> None:
    path = write_geopackage(tmp_path / "m.gpkg", {"things": mixed_table()}, {})
    with pytest.raises(DataError, match=r"m\.gpkg \[lanes\]: no such layer — the file holds things"):
        read_layer(path, "lanes")
    with pytest.raises(DataError, match=r"none\.gpkg: no such file"):
        list_layers(tmp_path / "none.gpkg")
    for name, content in {"empty": b"", "text": b"not a database" * 100, "cut": path.read_bytes()[:5000]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as a GeoPackage"):
            list_layers(tmp_path / name)
            read_layer(tmp_path / name, "things")
    for blob in (b"GP", b"xx\0\1" + bytes(40), b"GP\0\x0f" + bytes(40), b"GP\0\1" + bytes(40)):
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE things SET geom = ? WHERE fid = 7", (blob,))
        connection.close()
        with pytest.raises(DataError, match=r"\[things\]: geometry of fid 7 cannot be parsed"):
            read_layer(path, "things")


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 fids but 1 name"):
        FeatureTable(np.array([1, 2]), objects([None, None]), {"name": objects(["x"])})


@needs_golden
@pytest.mark.golden
@pytest.mark.parametrize("path", GOLDEN_MAPS, ids=lambda p: "-".join(p.parts[-5:-1]))
def test_golden_maps_read_as_an_independent_reader_reads_them(path: Path, tmp_path: Path) -> None:
    assert GOLDEN_MAPS
    layers = {name: read_layer(path, name) for name in list_layers(path)}
    assert sorted(layers) == sorted(n for n, kind in pyogrio.list_layers(path) if kind is not None)
    for name, table in layers.items():
        meta, fids, wkb, columns = pyogrio.raw.read(path, layer=name, return_fids=True)
        np.testing.assert_array_equal(fids, table.fids)
        assert shapely.equals_exact(shapely.from_wkb(wkb), table.geometries).all()
        assert sorted(meta["fields"]) == sorted(table.columns)
        for column, values in zip(meta["fields"], columns, strict=True):
            cells = ["" if value is None else value for value in values] if values.dtype == object else values
            np.testing.assert_array_equal(table.columns[column], np.array(cells, values.dtype), err_msg=column)
    copy = write_geopackage(tmp_path / "copy.gpkg", layers, read_meta(path))
    for name, table in layers.items():
        assert_equal(read_layer(copy, name), table)
