"""Logs and maps made to harm: nothing in them runs, loops or swells; each is one clear error in bounded time.

Files built for a purpose are read in a process of their own with little memory and time, since what they try is to
crash the reader. Files damaged at random are read here.
"""

from __future__ import annotations

import json
import pickle
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy._core import multiarray, numeric

from navsim_eval.errors import DataError
from navsim_eval.formats.logs import read_log, write_log
from navsim_eval.formats.map_layers import REQUIRED_LAYERS
from navsim_eval.formats.maps import RoadMap
from tests.worlds import drive, write_road_map

READER = """
import json, resource, sys, time
from navsim_eval.errors import DataError
from navsim_eval.formats.logs import read_log
from navsim_eval.formats.map_layers import REQUIRED_LAYERS
from navsim_eval.formats.maps import RoadMap

def read_map(path):
    road_map = RoadMap(path)
    for name in REQUIRED_LAYERS:
        road_map.layer(name)
    for name in ("lanes_polygons", "lane_connectors"):
        for edge in road_map.layer(name).ids.tolist():
            road_map.speed_limit(edge), road_map.baseline(edge), road_map.polygon(edge), road_map.outgoing(edge)

resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
results = {}
for path in sys.argv[1:]:
    started = time.process_time()
    try:
        (read_log if path.endswith(".pkl") else read_map)(path)
        problem = None
    except DataError as error:
        problem = str(error)
    results[path] = problem, time.process_time() - started
print(json.dumps(results))
"""
CPU_SECONDS = 10.0  # for any one file


class Call:
    """Pickled as a call of a function, then BUILD with a state, both of the attacker's choice."""

    def __init__(self, function: Callable, *arguments: Any, state: Any = None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple:
        return self.call


def array_of(dtype: Any, content: Any, shape: tuple[int, ...] = (1,)) -> Call:
    return Call(multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, content))


def lying_type(code: str, size: int = -1, alignment: int = -1, flags: int = 0, names=None, fields=None) -> Call:
    state = (3, "|" if code[0] in "OVS" else "<", None, names, fields, size, alignment, flags)
    return Call(np.dtype, code, False, True, state=state)


def nested_list(depth: int = 12, width: int = 10, core: Any = 1.0) -> list:
    """A list of `width` ** `depth` elements in a few hundred bytes."""
    for _ in range(depth):
        core = [core] * width
    return core


TEXTS = ["a" * 500_000] * 100_000  # 50 GB, or 200 as an array
SET_TWICE = array_of(np.dtype("f8"), bytes(8))
BAD_VALUES: dict[str, tuple[tuple[str, ...], Any]] = {
    "objects declared to be none": (("driving_command",), array_of(lying_type("O8"), b"A" * 8)),
    "text of another size than its letters": (("token",), array_of(lying_type("U1", 5, 4, 8), b"A" * 5)),
    "field outside its element": (
        ("ego_dynamic_state",),
        array_of(lying_type("V8", 8, 1, 0, ("a",), {"a": (np.dtype("f8"), 10**6)}), b"A" * 8),
    ),
    "elements without size": (("ego_dynamic_state",), array_of(lying_type("S1", 0, 1, 0), b"", (10**15,))),
    "scalar object": (("timestamp",), Call(multiarray.scalar, lying_type("O8"), b"A" * 8)),
    "array over an array": (
        ("driving_command",),
        Call(numeric._frombuffer, np.zeros(4), np.dtype("f8"), (4,), "C"),
    ),
    "array of a given size": (("driving_command",), Call(np.ndarray, (10**9,), np.dtype("f8"))),
    "endless numbers": (("ego_dynamic_state",), nested_list()),
    "endless pose": (("ego2global_translation",), nested_list()),
    "endless boxes": (("anns", "gt_boxes"), nested_list()),
    "endless names": (("anns", "gt_names"), nested_list(core="vehicle")),
    "endless token": (("token",), nested_list()),
    "endless map name": (("map_location",), nested_list()),
    "endless route": (("roadblock_ids",), TEXTS),
    "long names": (("anns", "gt_names"), TEXTS),
    "long tracks": (("anns", "track_tokens"), TEXTS),
    "long token": (("token",), TEXTS[0]),
    "time beyond counting": (("timestamp",), 10**30),
    "speed beyond counting": (("ego_dynamic_state",), [1e300, 0.0, 0.0, 0.0]),
    "light beyond counting": (("traffic_lights",), [(10**5000, True)]),
}


def bad_log(path: Path, keys: tuple[str, ...], value: Any) -> Path:
    """A log whose frame 1 holds the value."""
    write_log(path, drive("log", 3))
    content = pickle.loads(path.read_bytes())
    target = content[1]
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


def view(select: str) -> list[str]:
    """The lanes replaced by a query."""
    return ["ALTER TABLE lanes_polygons RENAME TO stored", f"CREATE VIEW lanes_polygons AS {select}"]


ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c)"
POINT = shapely.to_wkb(shapely.Point(0, 0))
HEADER = struct.pack("<2sBBi", b"GP", 0, 1, 4326)
GEOMETRY = "UPDATE lanes_polygons SET geom = x'{}' WHERE fid = 11"


def geometry(wkb: bytes) -> list[str]:
    return [GEOMETRY.format((HEADER + wkb).hex())]


def wkb_of(shape: shapely.Geometry) -> list[str]:
    return geometry(shapely.to_wkb(shape))


BAD_STATEMENTS: dict[str, list[str]] = {
    "endless rows": view(f"{ENDLESS} SELECT n AS fid, NULL AS geom, 0 AS lane_group_fid, 1 AS speed_limit_mps FROM c"),
    "endless catalogue": [
        "ALTER TABLE gpkg_contents RENAME TO stored",
        f"CREATE VIEW gpkg_contents AS {ENDLESS} SELECT 'x' AS table_name, 'features' AS data_type FROM c WHERE n < 0",
    ],
    "huge blobs": view("SELECT fid, zeroblob(900000000) AS geom, 0 AS lane_group_fid FROM stored"),
    "rows again and again": view("SELECT a.* FROM stored a" + "".join(f", stored {name}" for name in "bcdefghijkl")),
    "collections in collections": geometry(struct.pack("<BII", 1, 7, 1) * 200_000 + POINT),
    "polygons in polygons": geometry(struct.pack("<BII", 1, 6, 1) * 200_000 + POINT),
    "four billion parts": geometry(struct.pack("<BII", 1, 6, 2**32 - 1)),
    "four billion rings": geometry(struct.pack("<BII", 1, 3, 2**32 - 1)),
    "four billion points": geometry(struct.pack("<BIII", 1, 3, 1, 2**32 - 1)),
    "curves": geometry(struct.pack("<BII", 1, 10, 1)),
    "coordinates that are not a number": wkb_of(shapely.Polygon([(0, 0), (1, np.nan), (1, 1)])),
    "coordinates at infinity": wkb_of(shapely.Polygon([(0, 0), (1, np.inf), (1, 1)])),
    "coordinates beyond the world": wkb_of(shapely.Polygon([(0, 0), (1e300, 1), (1, 1)])),
    "a line for a lane": wkb_of(shapely.LineString([(0, 0), (1, 1)])),
    "a point for a baseline": ["UPDATE baseline_paths SET geom = "
                               f"x'{(HEADER + shapely.to_wkb(shapely.MultiPoint([(0, 0)]))).hex()}'"],
    "a number for a geometry": ["UPDATE lanes_polygons SET geom = 7"],
    "a text for a geometry": ["UPDATE lanes_polygons SET geom = 'GP'"],
    "a text for a speed limit": ["UPDATE lanes_polygons SET speed_limit_mps = 'fast'"],
    "a long text for a key": ["UPDATE lane_connectors SET exit_lane_fid = printf('%.*c', 400000, 'x')"],
    "a text for a coordinate system": ["UPDATE gpkg_geometry_columns SET srs_id = 'abc'"],
    "no geometry columns": ["DROP TABLE gpkg_geometry_columns"],
    "no table behind a layer": ["DROP TABLE lanes_polygons"],
    "meta of another shape": ["DROP TABLE meta", "CREATE TABLE meta (a, b, c)"],
    "meta that says nothing": ["UPDATE meta SET value = NULL"],
    "a virtual table": ["DROP TABLE lanes_polygons", "CREATE VIRTUAL TABLE lanes_polygons USING fts5(fid, geom)"],
}  # fmt: skip


def bad_map(root: Path, statements: list[str]) -> Path:
    path = write_road_map(root)
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA legacy_alter_table = ON")
        for statement in statements:
            connection.execute(statement)
    finally:
        connection.close()
    return path


def outcomes(paths: list[Path]) -> dict[str, tuple[str | None, float]]:
    """(the error, CPU seconds) of reading each file, all in one process of little memory."""
    command = [sys.executable, "-c", READER, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"the reader ended with {done.returncode}: {done.stderr[-1500:]}"
    return json.loads(done.stdout)


def test_logs_made_to_harm_are_clear_errors_in_bounded_time_and_memory(tmp_path: Path) -> None:
    paths = {name: bad_log(tmp_path / f"{number}.pkl", *bad) for number, (name, bad) in enumerate(BAD_VALUES.items())}
    results = outcomes(list(paths.values()))
    for name, path in paths.items():
        problem, seconds = results[str(path)]
        assert problem is not None and problem.startswith(str(path)), f"{name}: {problem}"
        assert seconds < CPU_SECONDS, f"{name}: {seconds:.1f} s"
        assert len(problem) < 1000


def test_maps_made_to_harm_are_clear_errors_in_bounded_time_and_memory(tmp_path: Path) -> None:
    paths = {name: bad_map(tmp_path / str(number), bad) for number, (name, bad) in enumerate(BAD_STATEMENTS.items())}
    results = outcomes(list(paths.values()))
    for name, path in paths.items():
        problem, seconds = results[str(path)]
        assert problem is not None and problem.startswith(str(path)), f"{name}: {problem}"
        assert seconds < CPU_SECONDS, f"{name}: {seconds:.1f} s"
        assert len(problem) < 1000


def test_a_file_that_builds_an_array_twice_is_refused(tmp_path: Path) -> None:
    """The second state would free memory that a view of the first still shows."""
    twice = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I1\ntcnumpy\ndtype\n(S'f8'\ntRI00\nS'AAAAAAAA'\ntb(I1\n(I1\ntcnumpy\ndtype\n(S'f8'\ntRI00\nS'BBBBBBBB'\ntb."
    )
    (tmp_path / "x.pkl").write_bytes(twice)
    with pytest.raises(DataError, match="given twice"):
        read_log(tmp_path / "x.pkl")


# --- damaged at random -----------------------------------------------------------------------------------------------


def damaged(whole: bytes, data: st.DataObject) -> bytes:
    """Some bytes changed, then perhaps the end cut off, or a stretch repeated."""
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(content)), st.integers(0, len(content)))))
    change = data.draw(st.sampled_from(["none", "cut", "repeat", "remove"]))
    if change == "cut":
        return bytes(content[:stop])
    if change == "repeat":
        return bytes(content[:stop] + content[start:])
    return bytes(content[:start] + content[stop:]) if change == "remove" else bytes(content)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    """A folder, the bytes of a log and of a map."""
    folder = tmp_path_factory.mktemp("damaged")
    write_log(folder / "log.pkl", drive("log", 2))
    return folder, (folder / "log.pkl").read_bytes(), write_road_map(folder).read_bytes()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_damaged_log_is_read_or_refused(sound: tuple[Path, bytes, bytes], data: st.DataObject) -> None:
    folder, log, _ = sound
    (folder / "x.pkl").write_bytes(damaged(log, data))
    check(folder / "x.pkl", read_log)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_damaged_map_is_read_or_refused(sound: tuple[Path, bytes, bytes], data: st.DataObject) -> None:
    folder, _, map_file = sound
    (folder / "x.gpkg").write_bytes(damaged(map_file, data))

    def read(path: Path) -> None:
        road_map = RoadMap(path)
        for name in REQUIRED_LAYERS:
            road_map.layer(name)

    check(folder / "x.gpkg", read)


def check(path: Path, read: Callable[[Path], Any]) -> None:
    started = time.process_time()
    try:
        read(path)
    except DataError as error:
        assert str(path) in str(error)
    assert time.process_time() - started < CPU_SECONDS
