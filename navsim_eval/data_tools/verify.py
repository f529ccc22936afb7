"""After the download: which logs, sensor files and maps of a split are there, and which of them can be read.

Every check names what it expected, what it found and the first things that are wrong; nothing stops at the first
problem and nothing is changed. Work is spread over processes log by log.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from navsim_eval.config import DataConfig
from navsim_eval.data_tools.checksums import compare_archives, compare_checksums, default_list
from navsim_eval.data_tools.config import DataToolConfig
from navsim_eval.dataset import SceneDataset, sensor_files
from navsim_eval.errors import DataError, UserError
from navsim_eval.executor import run_jobs
from navsim_eval.files import sha256
from navsim_eval.formats.map_layers import REQUIRED_LAYERS
from navsim_eval.formats.map_store import MapStore
from navsim_eval.formats.maps import RoadMap
from navsim_eval.formats.sensors import read_image, read_point_cloud
from navsim_eval.formats.splits import CITY_MANIFEST, LOGS_FOLDER
from navsim_eval.scene import Frame, Scene

OK, WARNING, ERROR = "ok", "warning", "error"
USED_LAYERS = {  # optional layers that something here reads, and what is wrong without them
    "walkways": "the semantic training target has no walkways",
    "crosswalks": "pictures in reports lack them",
    "generic_drivable_areas": "pictures in reports lack them",
}
_LISTED = 1000  # problems of one check that are kept by name; all are counted
Bar = Callable[[str, int], Any]  # title, total → context manager that gives an `update(n)`


@dataclass
class Check:
    """One thing looked at. found, expected: in words;  problems: the first `_LISTED` of `wrong` things."""

    subject: str
    state: str = OK
    found: str = ""
    expected: str = ""
    remedy: str = ""
    wrong: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, state: str, problems: Collection[str], count: int | None = None) -> None:
        """Note things that are wrong; the state only ever gets worse."""
        if not problems:
            return
        order = (OK, WARNING, ERROR)
        self.state = order[max(order.index(self.state), order.index(state))]
        self.wrong += len(problems) if count is None else count
        self.problems += list(problems)[: _LISTED - len(self.problems)]


def verify(config: DataToolConfig, bar: Bar) -> list[Check]:
    """All checks of one split. Raises UserError only where there is no such split at all."""
    city = _city_logs(config.data, config.split)
    try:
        scenes = SceneDataset.from_config(config.data, config.split, workers=max(config.workers, 1), progress=True)
    except DataError:
        raise
    except UserError as error:
        if not (Path(config.data.root) / LOGS_FOLDER).is_dir() or "is unknown" in str(error):
            raise
        check = Check("logs", ERROR, "no scene", expected=f"{len(city)} logs" if city else "", wrong=1)
        check.problems = [str(error)]
        return [check]
    findings = _Findings()
    jobs = tokens_by_log(scenes)
    inspect = InspectLog(scenes, tuple(config.cameras), config.lidar, config.frames, config.read)
    with bar("reading" if config.read else "looking", len(jobs)) as update:
        for outcome in run_jobs(inspect, jobs, workers=config.workers):
            update(1)
            if outcome.ok:
                findings.merge(outcome.value)
            else:
                findings.frames[jobs[outcome.index][0]] = outcome.error
    checks = [_logs(scenes, city, config), _frames(scenes, findings, city), *_sensors(findings, config)]
    checks += [_map(config.data, name, routes) for name, routes in sorted(findings.routes.items())]
    listed = Path(config.checksums or default_list(config.data.root, config.split))
    if config.checksums or listed.is_file():
        checks.append(_sums(listed, config, bar))
    if config.archives:
        checks.append(_archives(config.archives, bar))
    return checks


def listed_files(config: DataToolConfig) -> list[Path]:
    """Files of a split for a list of checksums: its logs, the chosen sensor files, and maps that lie below the root.

    Sensor files that are not there are left out; a log that cannot be read is an error.
    """
    scenes = SceneDataset.from_config(config.data, config.split, workers=max(config.workers, 1), progress=True)
    if scenes.coverage.logs_broken:
        raise DataError(scenes.logs, f"log {scenes.coverage.logs_broken[0][1]}", remedy="verify the split first")
    root, maps = Path(config.data.root), MapStore(config.data.maps, config.data.map_version)
    files = {scenes.logs / f"{name}.pkl" for name in scenes.log_names}
    for scene in scenes:
        paths = (path for _, path in files_of(scene, config.cameras, config.lidar, config.frames))
        files.update(path for path in paths if isinstance(path, Path) and path.is_file())
        files.update([maps.path(scene.map_name)] if Path(config.data.maps).is_relative_to(root) else [])
    return sorted(files)


def tokens_by_log(scenes: SceneDataset) -> list[tuple[str, list[str]]]:
    """(log name, its tokens), in order."""
    grouped: dict[str, list[str]] = {}
    for token in scenes.tokens:
        grouped.setdefault(scenes.log_of(token), []).append(token)
    return list(grouped.items())


# --- what one log needs ----------------------------------------------------------------------------------------------


@dataclass
class _Findings:
    """Seen in some logs: files by kind (there, missing, damaged), frames that cannot be read, routes by map."""

    there: dict[str, int] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    damaged: dict[str, list[str]] = field(default_factory=dict)
    frames: dict[str, str] = field(default_factory=dict)
    routes: dict[str, set[str]] = field(default_factory=dict)

    def merge(self, other: _Findings) -> None:
        for kind, count in other.there.items():
            self.there[kind] = self.there.get(kind, 0) + count
        for mine, theirs in ((self.missing, other.missing), (self.damaged, other.damaged)):
            for kind, paths in theirs.items():
                mine.setdefault(kind, []).extend(paths)
        self.frames |= other.frames
        for name, route in other.routes.items():
            self.routes.setdefault(name, set()).update(route)


@dataclass(frozen=True)
class InspectLog:
    """Looks at the scenes of one log, (log name, its tokens); sent to every worker once."""

    scenes: SceneDataset
    cameras: tuple[str, ...]
    lidar: bool
    frames: str
    read: bool

    def __call__(self, item: tuple[str, list[str]]) -> _Findings:
        _, tokens = item
        found, seen = _Findings(), set()
        for token in tokens:
            try:
                scene = self.scenes[token]
            except DataError as error:
                found.frames[token] = str(error)
                continue
            found.routes.setdefault(scene.map_name, set()).update(scene.current.roadblock_ids)
            for kind, path in files_of(scene, self.cameras, self.lidar, self.frames):
                if path not in seen:
                    seen.add(path)
                    self._look(kind, path, found)
        return found

    def _look(self, kind: str, path: Path | str, found: _Findings) -> None:
        if isinstance(path, str) or not path.is_file():
            found.missing.setdefault(kind, []).append(str(path))
            return
        found.there[kind] = found.there.get(kind, 0) + 1
        try:
            if path.stat().st_size == 0:
                raise DataError(path, "is empty")
            if self.read:
                read_point_cloud(path) if kind == "point clouds" else read_image(path)
        except DataError as error:
            found.damaged.setdefault(kind, []).append(str(error))


def files_of(scene: Scene, cameras: Collection[str], lidar: bool, frames: str) -> Iterator[tuple[str, Path | str]]:
    """(kind, path) of the sensor files of a scene; a text in place of a path where the log lists no such sensor."""
    chosen = {"current": [scene.num_history - 1], "history": range(scene.num_history), "all": range(len(scene.frames))}
    for index in chosen[frames]:
        frame = scene.frames[index]
        for camera in _cameras(frame, cameras):
            yield "images", _path(scene, index, [camera], False)
        if lidar:
            yield "point clouds", _path(scene, index, [], True)


def _cameras(frame: Frame, cameras: Collection[str]) -> Collection[str]:
    return list(frame.cameras) if "all" in cameras else cameras


def _path(scene: Scene, index: int, cameras: list[str], lidar: bool) -> Path | str:
    try:
        return sensor_files(scene, cameras, lidar, [index])[0]
    except DataError as error:
        return str(error)


# --- checks ----------------------------------------------------------------------------------------------------------


def _logs(scenes: SceneDataset, city: Mapping[str, CityLog], config: DataToolConfig) -> Check:
    coverage = scenes.coverage
    broken = [reason for _, reason in coverage.logs_broken]
    unreadable = {name for name, _ in coverage.logs_broken}
    present = {path.stem: path for path in scenes.logs.glob("*.pkl")}
    missing = [*coverage.logs_missing, *(name for name in city if name not in present)]
    known = [log for log in city.values() if log.sha256 and log.name in present and log.name not in unreadable]
    changed = [log.name for log in known if sha256(present[log.name]) != log.sha256]
    total = coverage.logs_found + len(broken) + len(missing)
    check = Check("logs", found=f"{coverage.logs_found} readable", expected=f"{total}")
    check.add(ERROR, [f"{name}.pkl is not there" for name in missing])
    check.add(ERROR, broken)
    check.add(WARNING, [f"{name}.pkl is not the log that the city wrote" for name in changed])
    published = coverage.published
    if published and published.logs is not None and total != published.logs:
        check.add(WARNING, [f"the published split has {published.logs} logs, here {total} are listed or present"])
    check.remedy = _remedy(config.data, "logs") if check.wrong else ""
    return check


def _frames(scenes: SceneDataset, findings: _Findings, city: Mapping[str, CityLog]) -> Check:
    coverage = scenes.coverage
    found = len(scenes) - len(findings.frames)
    listed = sum(log.scenes for log in city.values()) or coverage.scenes_expected
    check = Check("scenes", found=f"{found} readable", expected=str(listed or len(scenes)))
    here = set(scenes.log_names)
    check.add(ERROR, [f"{log.scenes} scenes of log {log.name}" for log in city.values() if log.name not in here])
    check.add(ERROR, [f"scene {token}: {reason}" for token, reason in findings.frames.items()])
    check.add(ERROR, [f"scene {token} is in no log" for token in coverage.tokens_missing])
    return check


def _sensors(findings: _Findings, config: DataToolConfig) -> Iterator[Check]:
    kinds = ["images"] * bool(config.cameras) + ["point clouds"] * config.lidar
    for kind in kinds:
        missing, damaged = findings.missing.get(kind, []), findings.damaged.get(kind, [])
        there = findings.there.get(kind, 0)
        word = "readable" if config.read else "there"
        check = Check(kind, found=f"{there - len(damaged)} {word}", expected=str(there + len(missing)))
        check.add(ERROR, [_missing(path) for path in missing])
        check.add(ERROR, damaged)
        check.remedy = _remedy(config.data, "sensors") if check.wrong else ""
        yield check


def _missing(text: str) -> str:
    return text if " lists no " in text else f"{text} is not there"


def _map(data: DataConfig, name: str, routes: set[str]) -> Check:
    """Layers that something reads, and whether the routes of the logs are on the map."""
    if not name:
        return Check("map", found="none", expected="none", remedy="plans can be made and learnt here, not scored")
    check = Check(f"map {name}")
    try:
        road_map = MapStore(data.maps, data.map_version).get(name)
        present = road_map.available
    except DataError as error:
        check.add(ERROR, [str(error)])
        return check
    wanted = [*REQUIRED_LAYERS, *USED_LAYERS]
    problems = {layer: _layer_problem(road_map, layer) for layer in wanted}
    check.found = f"{sum(layer in present for layer in wanted)} layers, {_count(road_map)} lanes"
    check.expected = f"{len(wanted)} layers"
    check.add(ERROR, [problems[layer] for layer in REQUIRED_LAYERS if problems[layer]])
    check.add(WARNING, [problems[layer] for layer in USED_LAYERS if problems[layer]])
    if check.state != ERROR:
        strangers = sorted(block for block in routes if not road_map.has_block(block))
        check.add(WARNING, [f"route id {block} is not on the map" for block in strangers])
    check.remedy = _remedy(data, "maps") if check.wrong else ""
    return check


def _layer_problem(road_map: RoadMap, layer: str) -> str:
    """What is wrong with a layer, or nothing."""
    if layer not in road_map.available:
        consequence = USED_LAYERS.get(layer, "lanes, routes or drivable area cannot be read: no scene can be scored")
        return f"{road_map.path}: layer {layer} is missing ({consequence})"
    try:
        road_map.layer(layer)
    except DataError as error:
        return str(error)
    return ""


def _count(road_map: RoadMap) -> int:
    try:
        return len(road_map.layer("lanes_polygons"))
    except DataError:
        return 0


def _sums(listed: Path, config: DataToolConfig, bar: Bar) -> Check:
    result = compare_checksums(listed, Path(config.data.root), config.workers, bar)
    check = Check("checksums", found=f"{result.equal} equal", expected=f"{result.expected} in {listed}")
    check.add(ERROR, [f"{name} is not there" for name in result.missing])
    check.add(ERROR, [f"{name} has another checksum" for name in result.different])
    check.remedy = "download these files again" if check.wrong else ""
    return check


def _archives(folder: str, bar: Bar) -> Check:
    result = compare_archives(Path(folder), bar)
    check = Check("archives", found=f"{result.equal} equal", expected=f"{result.expected} of known MD5 in {folder}")
    check.add(ERROR, [f"{name} has another MD5 sum than published" for name in result.different])
    check.remedy = "download these archives again" if check.wrong else ""
    return check


@dataclass(frozen=True)
class CityLog:
    """What a synthetic city noted about a log that it wrote."""

    name: str
    scenes: int
    sha256: str


def _city_logs(data: DataConfig, split: str) -> dict[str, CityLog]:
    """Logs that a synthetic city says it has in this split, by name; empty for other data."""
    path = Path(data.root) / CITY_MANIFEST
    try:
        logs = json.loads(path.read_text())["splits"].get(split, {}).get("logs", {})
        return {name: CityLog(name, int(log["scenes"]), str(log["sha256"])) for name, log in logs.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(path, f"cannot be read ({error})", remedy="make the city again") from error


def _remedy(data: DataConfig, what: str) -> str:
    if (Path(data.root) / CITY_MANIFEST).is_file():
        if what == "sensors":
            return "delete damaged files, then tools/make_city.py renders what is missing"
        return f"copy the {what} from a whole city, or make the city again in another data.root"
    return f"download the {what} again (tools/data.py plan says which archives)"
