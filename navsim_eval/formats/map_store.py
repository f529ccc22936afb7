"""The folder of maps: which file is a location's map, and how a map is written into such a folder."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from navsim_eval.errors import DataError
from navsim_eval.files import atomic_write
from navsim_eval.formats.geopackage import WGS84, FeatureTable, write_geopackage
from navsim_eval.formats.map_layers import transform_geometries
from navsim_eval.formats.maps import RoadMap
from navsim_eval.formats.utm import parse_epsg, utm_to_lonlat

DEFAULT_VERSION_FILE = "nuplan-maps-v1.0"
MAP_ALIASES = {"las_vegas": "us-nv-las-vegas-strip"}


class MapStore:
    """The maps under one root folder, each opened once per process.

    root:         holds `<version_file>.json` and `<location>/<version>/map.gpkg` (config data.maps, $NUPLAN_MAPS_ROOT)
    version_file: name of the version file, with or without `.json` (config data.map_version)

    Without a version file, or without an entry in it, the newest sub-folder of the location that holds a map counts.
    """

    def __init__(self, root: Path | str, version_file: str = DEFAULT_VERSION_FILE):
        self.root = Path(root)
        self.version_file = version_file.removesuffix(".json")

    def get(self, name: str) -> RoadMap:
        """The map of a location, also under the spellings that logs use (`las_vegas`, a trailing `.gpkg`)."""
        path = self.path(name)
        status = path.stat()
        return _open_map(path, canonical_map_name(name), status.st_mtime_ns, status.st_size)

    def path(self, name: str) -> Path:
        """Where the location's `map.gpkg` lies. Raises DataError that lists the maps which are there."""
        location = canonical_map_name(name)
        version = self._versions().get(location)
        folder = self.root / location
        if version is not None and (folder / version / "map.gpkg").is_file():
            return folder / version / "map.gpkg"
        found = sorted(folder.glob("*/map.gpkg"), key=lambda path: _version_key(path.parent.name))
        if version is None and found:
            return found[-1]
        wanted = folder / (version or "<version>") / "map.gpkg"
        present = sorted({path.parent.parent.name for path in self.root.glob("*/*/map.gpkg")})
        raise DataError(
            wanted,
            f"no map for location '{name}' (present: {', '.join(present) or 'none'})",
            remedy="set data.maps (or $NUPLAN_MAPS_ROOT) to the folder that holds <location>/<version>/map.gpkg, "
            "or make a synthetic city with tools/make_city.py",
        )

    def _versions(self) -> dict[str, str]:
        path = self.root / f"{self.version_file}.json"
        if not path.is_file():
            return {}
        try:
            content = json.loads(path.read_text())
            return {location: str(entry["version"]) for location, entry in content.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                path,
                "not a version file of the form {location: {version: …}}",
                remedy="restore it, or delete it to use the newest map of each location",
            ) from error


def canonical_map_name(name: str) -> str:
    """Location name without a trailing `.gpkg` and with nuPlan's alias resolved."""
    name = name.removesuffix(".gpkg")
    return MAP_ALIASES.get(name, name)


def write_map(
    root: Path | str,
    location: str,
    version: str,
    layers: Mapping[str, FeatureTable],
    epsg: int,
    version_file: str = DEFAULT_VERSION_FILE,
) -> Path:
    """Write a map that `MapStore(root)` finds, in nuPlan's layout: geographic coordinates, `meta`, version file.

    layers: table name → features with geometries in metres of the UTM zone `epsg` (326zz north, 327zz south).
    Returns the path of the GeoPackage.
    """
    zone, south = parse_epsg(str(epsg))

    def geographic(table: FeatureTable) -> FeatureTable:
        lonlat = transform_geometries(table.geometries, lambda x, y: utm_to_lonlat(x, y, zone, south))
        return FeatureTable(table.fids, lonlat, table.columns, WGS84)

    path = Path(root) / location / version / "map.gpkg"
    meta = {"projectedCoordSystem": f"epsg:{epsg}", "geographicCoordSystem": f"epsg:{WGS84}"}
    write_geopackage(path, {name: geographic(table) for name, table in layers.items()}, meta)
    index = Path(root) / f"{version_file.removesuffix('.json')}.json"
    versions = json.loads(index.read_text()) if index.is_file() else {}
    versions[location] = {"version": version, "layers": {}}
    atomic_write(index, json.dumps(versions, indent=1, sort_keys=True) + "\n")
    return path


def _version_key(version: str) -> Sequence[tuple[int, str]]:
    """Sort key by which 9.17.1964 comes after 9.9.2000."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"[.\-_]", version)]


@functools.lru_cache(maxsize=16)
def _open_map(path: Path, name: str, modified_ns: int, size: int) -> RoadMap:
    """One RoadMap per file and process; a file that was rewritten (other time stamp or size) is opened anew."""
    return RoadMap(path, name)
