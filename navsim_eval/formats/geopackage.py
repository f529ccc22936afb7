"""GeoPackage feature tables, read and written with sqlite3 and shapely alone.

A GeoPackage is an SQLite file: one table per layer with an integer primary key `fid`, a geometry blob (short header,
then WKB) and attribute columns. Only what nuPlan maps use is covered: vector layers and a plain `meta` table. What the
layers mean is the business of `navsim_eval.formats.map_layers`.

A file may be damaged or hostile: queries are given as many steps as a sound file of that size can need and return as
many bytes as it holds, and geometries nested in each other, which GEOS would follow without end, are refused.
"""

from __future__ import annotations

import contextlib
import sqlite3
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import shapely

from navsim_eval.errors import DataError
from navsim_eval.files import atomic_write
from navsim_eval.formats.wkb import is_flat

WGS84 = 4326
_APPLICATION_ID = 0x47504B47  # "GPKG"
_USER_VERSION = 10300  # GeoPackage 1.3
_ENVELOPE_BYTES = (0, 32, 48, 48, 64)
_STEPS_PER_BYTE, _STEPS_AT_ONCE = 4, 100_000  # steps of SQLite's virtual machine
_SLACK = 1_000_000  # steps and bytes that a file of any size may take
_LAST_CHANGE = "2000-01-01T00:00:00.000Z"  # fixed, so that equal input gives equal bytes
_DAMAGED = "the file is damaged or not a GeoPackage; unpack or download the map again"


@dataclass(frozen=True)
class FeatureTable:
    """One vector layer as it lies in the file.

    fids:       (n,) int64 primary keys, ascending when read
    geometries: (n,) object array of 2D shapely geometries, None where the file holds NULL
    columns:    name → (n,) array: int64 (no NULL), float64 (NULL is NaN), bool, or object array of str (NULL is "")
    srs_id:     coordinate system of the geometries as an EPSG code (4326: longitude, latitude)
    """

    fids: np.ndarray
    geometries: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    srs_id: int = WGS84

    def __post_init__(self) -> None:
        for name, values in (("geometries", self.geometries), *self.columns.items()):
            if len(values) != len(self.fids):
                raise ValueError(f"feature table: {len(self.fids)} fids but {len(values)} {name}")

    def __len__(self) -> int:
        return len(self.fids)


# --- reading ---------------------------------------------------------------------------------------------------------


def list_layers(path: Path | str) -> list[str]:
    """Names of the vector layers. Raises DataError for a file that is absent or no GeoPackage."""
    with _open(path) as connection:
        rows = connection.execute("SELECT table_name FROM gpkg_contents WHERE data_type = 'features'")
        return sorted(str(name) for (name,) in _rows(rows, path))


def read_meta(path: Path | str) -> dict[str, str]:
    """Key-value pairs of the plain table `meta`; empty without one."""
    with _open(path) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            return {}
        rows = connection.execute('SELECT "key", "value" FROM "meta"')
        return {str(key): str(value) for key, value in _rows(rows, path)}


def read_layer(path: Path | str, name: str) -> FeatureTable:
    """One layer, rows in ascending fid, geometries forced to 2D and otherwise as stored (no repair).

    Raises DataError, naming file and layer, for an absent layer or a geometry that cannot be parsed.
    """
    with _open(path) as connection:
        found = connection.execute(
            "SELECT column_name, srs_id FROM gpkg_geometry_columns WHERE table_name = ?", (name,)
        ).fetchone()
        if found is None:
            raise DataError(path, "no such layer", field=name, remedy=f"the file holds {', '.join(list_layers(path))}")
        geometry_column, srs_id = found
        info = connection.execute(f"PRAGMA table_info({_quoted(name)})").fetchall()
        key = next((column for _, column, *_, primary in info if primary), "rowid")
        attributes = [(column, kind) for _, column, kind, *_ in info if column not in (key, geometry_column)]
        wanted = ", ".join(_quoted(column) for column in (key, geometry_column, *(column for column, _ in attributes)))
        rows = _rows(connection.execute(f"SELECT {wanted} FROM {_quoted(name)} ORDER BY {_quoted(key)}"), path)
    fids, blobs, *values = zip(*rows, strict=True) if rows else ((), (), *(() for _ in attributes))
    if not all(isinstance(number, int) for number in (srs_id, *fids)):
        raise DataError(path, "a key or coordinate system that is no number", field=name, remedy=_DAMAGED)
    fids = np.array(fids, dtype=np.int64)
    columns = {column: _column(cells, kind) for (column, kind), cells in zip(attributes, values, strict=True)}
    return FeatureTable(fids, _geometries(blobs, fids, path, name), columns, srs_id)


@contextlib.contextmanager
def _open(path: Path | str) -> Iterator[sqlite3.Connection]:
    """Read-only connection that needs no write access and leaves no lock or journal beside the file."""
    path = Path(path)
    if not path.is_file():
        raise DataError(path, "no such file", remedy="check data.maps (or $NUPLAN_MAPS_ROOT)")
    connection = None
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
        _confine(connection, path.stat().st_size)
        connection.execute("SELECT table_name FROM gpkg_contents LIMIT 1")
        yield connection
    except sqlite3.Error as error:
        raise DataError(path, f"cannot be read as a GeoPackage ({error})", remedy=_DAMAGED) from error
    finally:
        if connection is not None:
            connection.close()


def _confine(connection: sqlite3.Connection, size: int) -> None:
    """Bound what a query may cost by the size of the file [bytes]: a view may loop, or make blobs of any length."""
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, size + _SLACK)
    left = (_STEPS_PER_BYTE * size + _SLACK) // _STEPS_AT_ONCE

    def give_up() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    connection.set_progress_handler(give_up, _STEPS_AT_ONCE)


def _rows(cursor: sqlite3.Cursor, path: Path | str) -> list[tuple]:
    """All rows of a query. Raises DataError when their texts and blobs are longer than the file they come from."""
    rows, left = [], Path(path).stat().st_size + _SLACK
    for row in cursor:
        left -= sum(len(cell) for cell in row if isinstance(cell, bytes | str))
        if left < 0:
            raise DataError(path, "holds one piece of content many times over", remedy=_DAMAGED)
        rows.append(row)
    return rows


def _column(cells: Sequence[object], kind: str) -> np.ndarray:
    """Cells of one column as an array; SQLite types are per cell, so a declared number may still hold text."""
    kind = kind.upper()
    declared = any(word in kind for word in ("INT", "REAL", "DOUB", "FLOA", "NUM", "BOOL"))
    if declared and all(cell is None or isinstance(cell, int | float) for cell in cells):
        numbers = np.array([np.nan if cell is None else cell for cell in cells] if None in cells else cells)
        if len(cells) == 0:
            numbers = numbers.astype(np.int64 if "INT" in kind or "BOOL" in kind else np.float64)
        if numbers.dtype.kind in "if":
            return numbers.astype(bool) if "BOOL" in kind and numbers.dtype.kind == "i" else numbers
    column = np.empty(len(cells), dtype=object)
    column[:] = ["" if cell is None else str(cell) for cell in cells]
    return column


def _geometries(blobs: Sequence[bytes | None], fids: np.ndarray, path: Path | str, name: str) -> np.ndarray:
    wkb = np.empty(len(blobs), dtype=object)
    wkb[:] = [None if blob is None else _well_known_binary(blob) for blob in blobs]
    geometries = shapely.from_wkb(wkb, on_invalid="ignore")
    broken = np.flatnonzero(shapely.is_missing(geometries) & np.array([blob is not None for blob in blobs], bool))
    if len(broken):
        fid = fids[broken[0]]
        raise DataError(path, f"geometry of fid {fid} cannot be parsed", field=name, remedy=_DAMAGED)
    return shapely.force_2d(geometries) if shapely.has_z(geometries).any() else geometries


def _well_known_binary(blob: object) -> bytes:
    """Strip the GeoPackage header: "GP", version, flags, srs id, optional envelope. Empty for anything unsound."""
    if not isinstance(blob, bytes) or len(blob) <= 8 or blob[:2] != b"GP":
        return b""
    envelope = (blob[3] >> 1) & 7
    if envelope >= len(_ENVELOPE_BYTES):
        return b""
    body = blob[8 + _ENVELOPE_BYTES[envelope] :]
    return body if is_flat(body) else b""


# --- writing ---------------------------------------------------------------------------------------------------------


def write_geopackage(path: Path | str, layers: Mapping[str, FeatureTable], meta: Mapping[str, str]) -> Path:
    """Write vector layers and a `meta` table; equal input gives equal bytes. Returns the path.

    Columns: integers, floats, bools and strings become INTEGER, REAL, BOOLEAN and TEXT. NaN becomes NULL. A float
    column whose name ends in `_fid` is a nullable foreign key and is written as INTEGER.
    """

    def write(temporary: Path) -> None:
        temporary.unlink(missing_ok=True)
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = OFF")  # the rename makes it atomic, not a journal
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {_USER_VERSION}")
            connection.execute("BEGIN")
            _create_catalogue(connection, {table.srs_id for table in layers.values()})
            _write_meta(connection, meta)
            for name, table in layers.items():
                _write_table(connection, name, table)
            connection.execute("COMMIT")
        finally:
            connection.close()

    return atomic_write(path, write)


def _create_catalogue(connection: sqlite3.Connection, srs_ids: set[int]) -> None:
    for statement in (
        "CREATE TABLE gpkg_spatial_ref_sys (srs_name TEXT NOT NULL, srs_id INTEGER NOT NULL PRIMARY KEY, organization "
        "TEXT NOT NULL, organization_coordsys_id INTEGER NOT NULL, definition TEXT NOT NULL, description TEXT)",
        "CREATE TABLE gpkg_contents (table_name TEXT NOT NULL PRIMARY KEY, data_type TEXT NOT NULL, identifier TEXT "
        "UNIQUE, description TEXT DEFAULT '', last_change DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ',"
        "'now')), min_x DOUBLE, min_y DOUBLE, max_x DOUBLE, max_y DOUBLE, srs_id INTEGER, CONSTRAINT fk_gc_r_srs_id "
        "FOREIGN KEY (srs_id) REFERENCES gpkg_spatial_ref_sys(srs_id))",
        "CREATE TABLE gpkg_geometry_columns (table_name TEXT NOT NULL, column_name TEXT NOT NULL, geometry_type_name "
        "TEXT NOT NULL, srs_id INTEGER NOT NULL, z TINYINT NOT NULL, m TINYINT NOT NULL, CONSTRAINT pk_geom_cols "
        "PRIMARY KEY (table_name, column_name), CONSTRAINT uk_gc_table_name UNIQUE (table_name), CONSTRAINT fk_gc_tn "
        "FOREIGN KEY (table_name) REFERENCES gpkg_contents(table_name), CONSTRAINT fk_gc_srs FOREIGN KEY (srs_id) "
        "REFERENCES gpkg_spatial_ref_sys (srs_id))",
    ):
        connection.execute(statement)
    systems = [
        ("Undefined Cartesian SRS", -1, "NONE", -1, "undefined"),
        ("Undefined geographic SRS", 0, "NONE", 0, "undefined"),
        ("WGS 84 geodetic", WGS84, "EPSG", WGS84, _WGS84_DEFINITION),
    ]
    systems += [(f"EPSG:{code}", code, "EPSG", code, "undefined") for code in sorted(srs_ids - {-1, 0, WGS84})]
    connection.executemany("INSERT INTO gpkg_spatial_ref_sys VALUES (?, ?, ?, ?, ?, NULL)", systems)


_WGS84_DEFINITION = (
    'GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563,AUTHORITY["EPSG","7030"]],'
    'AUTHORITY["EPSG","6326"]],PRIMEM["Greenwich",0,AUTHORITY["EPSG","8901"]],UNIT["degree",0.0174532925199433,'
    'AUTHORITY["EPSG","9122"]],AXIS["Latitude",NORTH],AXIS["Longitude",EAST],AUTHORITY["EPSG","4326"]]'
)


def _write_meta(connection: sqlite3.Connection, meta: Mapping[str, str]) -> None:
    connection.execute("CREATE TABLE meta (fid INTEGER PRIMARY KEY NOT NULL, key TEXT, value TEXT)")
    connection.execute(
        "INSERT INTO gpkg_contents VALUES ('meta', 'attributes', 'meta', '', ?, NULL, NULL, NULL, NULL, 0)",
        (_LAST_CHANGE,),
    )
    connection.executemany("INSERT INTO meta (key, value) VALUES (?, ?)", [(k, str(v)) for k, v in meta.items()])


def _write_table(connection: sqlite3.Connection, name: str, table: FeatureTable) -> None:
    geometry_type = _geometry_type(table.geometries)
    kinds = {column: _sql_type(column, values) for column, values in table.columns.items()}
    declared = "".join(f", {_quoted(column)} {kind}" for column, kind in kinds.items())
    connection.execute(
        f'CREATE TABLE {_quoted(name)} ("fid" INTEGER PRIMARY KEY NOT NULL, "geom" {geometry_type}{declared})'
    )
    bounds = [None] * 4
    if len(table) and not np.isnan(total := shapely.total_bounds(table.geometries)).any():
        bounds = [float(value) for value in total]
    connection.execute(
        "INSERT INTO gpkg_contents VALUES (?, 'features', ?, '', ?, ?, ?, ?, ?, ?)",
        (name, name, _LAST_CHANGE, *bounds, table.srs_id),
    )
    connection.execute(
        "INSERT INTO gpkg_geometry_columns VALUES (?, 'geom', ?, ?, 0, 0)", (name, geometry_type, table.srs_id)
    )
    cells = [_cells(values, kinds[column]) for column, values in table.columns.items()]
    rows = zip(np.asarray(table.fids).tolist(), _blobs(table), *cells, strict=True)
    marks = ", ".join("?" * (2 + len(cells)))
    connection.executemany(f"INSERT INTO {_quoted(name)} VALUES ({marks})", rows)


def _geometry_type(geometries: np.ndarray) -> str:
    names = {geometry.geom_type.upper() for geometry in geometries if geometry is not None}
    return names.pop() if len(names) == 1 else "GEOMETRY"


def _sql_type(column: str, values: np.ndarray) -> str:
    kind = np.asarray(values).dtype.kind
    if kind == "f":
        return "INTEGER" if column.endswith("_fid") else "REAL"
    return {"i": "INTEGER", "u": "INTEGER", "b": "BOOLEAN"}.get(kind, "TEXT")


def _cells(values: np.ndarray, kind: str) -> list[object]:
    cells = np.asarray(values).tolist()
    if kind == "TEXT":
        return [None if cell is None else str(cell) for cell in cells]
    if kind == "BOOLEAN":
        return [int(cell) for cell in cells]
    cells = [None if cell != cell else cell for cell in cells]
    return [None if cell is None else int(cell) for cell in cells] if kind == "INTEGER" else cells


def _blobs(table: FeatureTable) -> list[bytes | None]:
    """GeoPackage blobs without an envelope: "GP", version 0, flags (bit 0 little endian, bit 4 empty), srs id, WKB."""
    little = [struct.pack("<2sBBi", b"GP", 0, flags, table.srs_id) for flags in (0b00001, 0b10001)]
    empty = shapely.is_empty(table.geometries)
    wkb = shapely.to_wkb(table.geometries, byte_order=1, output_dimension=2)
    return [None if body is None else little[int(e)] + body for body, e in zip(wkb, empty, strict=True)]


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'
