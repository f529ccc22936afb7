"""Scenes of a split: windows cut from logs, read one log at a time, with an honest account of what is missing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.config import DataConfig
from navsim_eval.coverage import SensorCoverage, SplitCoverage
from navsim_eval.errors import DataError, UserError
from navsim_eval.formats.logs import frame_from_dict, read_log_dicts
from navsim_eval.formats.splits import LOGS_FOLDER, SceneFilter, Split, find_split, logs_of_part
from navsim_eval.formats.synthetic import SyntheticScene
from navsim_eval.log_index import LogSummary, default_memory, summarize_logs
from navsim_eval.scene import FRAME_INTERVAL_S, Frame, Scene

SENSORS_FOLDER = "sensor_blobs"
GAP_TOLERANCE_S = 0.06  # a frame may lie one 20 Hz sweep off its place
_OPEN_LOGS = 2


@dataclass(frozen=True)
class _LogScan:
    """Windows of one log: (token, first frame) in order, and how many were left out; or why it cannot be read."""

    name: str
    windows: tuple[tuple[str, int], ...] = ()
    no_route: int = 0
    gaps: int = 0
    broken: str | None = None


class SceneDataset:
    """Scenes of a split, in log-name order and then in time.

    Iterating reads one log after the other and keeps at most two in memory. `dataset[token]` (or an index) reads the
    log it needs. Logs that cannot be read are left out and listed in `coverage`; a frame that cannot be read skips its
    scenes while iterating (listed in `failures`) and raises DataError when asked for by token.

    Picklable: workers receive the index, not the logs. `subset` shares it out. With $NAVSIM_EXP_ROOT set, what the
    logs hold is remembered there (`log_index/`), so that only the first use of a split reads all of them.
    """

    def __init__(
        self,
        split: Split,
        logs: Path | str,
        sensor_root: Path | str | None = None,
        *,
        strict_gaps: bool = False,
        workers: int = 1,
        progress: bool = False,
    ):
        """Scan the logs. Raises UserError for a folder without logs, and for a split without a single scene.

        logs:        folder with the split's log pickles;  sensor_root: folder that sensor paths are relative to
        strict_gaps: leave out windows in which consecutive frames are not 0.5 s apart (the published cut keeps them)
        workers:     processes that scan logs;  progress: show a bar while scanning
        """
        self.split = split
        self.logs = Path(logs)
        self.sensor_root = None if sensor_root is None else Path(sensor_root)
        self.failures: dict[str, str] = {}
        self._open: OrderedDict[str, _OpenLog] = OrderedDict()
        paths, missing = _log_paths(self.logs, split.scene_filter)
        summaries = summarize_logs(paths, workers, progress, default_memory())
        scans = list(_scan_logs(summaries, split.scene_filter, strict_gaps))
        summaries.close()
        self._windows = {token: (scan.name, start) for scan in scans for token, start in scan.windows}
        self.coverage = _coverage(split, scans, missing, self._windows)
        self._tokens = tuple(self._windows)
        if not self._tokens:
            raise UserError(_why_empty(self.coverage, split.scene_filter, self.logs))

    @classmethod
    def from_config(
        cls,
        data: DataConfig,
        split: str,
        *,
        tokens: Collection[str] | None = None,
        log_names: Collection[str] | None = None,
        max_scenes: int | None = None,
        strict_gaps: bool = False,
        workers: int = 1,
        progress: bool = False,
    ) -> SceneDataset:
        """The scenes of a published split, or of any folder under `navsim_logs/` (all windows at stride 1).

        split:      name, or name:train, name:val, name:test for the logs that NAVSIM's training lists assign to it
        tokens:     exactly these scenes, wherever they lie in the split's logs (its own filter then only gives the
                    window's length); `coverage.tokens_missing` lists those that the logs do not hold
        log_names:  only these logs;  max_scenes: stop after so many

        Raises UserError for an unknown split (listing what there is) and for one without scenes.
        """
        name, _, part = split.partition(":")
        found = replace(find_split(name, data.root, data.filters), name=split)
        chosen = found.scene_filter
        if part:
            listed = logs_of_part(part, data.filters)
            log_names = listed if log_names is None else listed.intersection(log_names)
        if tokens is not None:
            chosen = replace(chosen, tokens=tuple(dict.fromkeys(tokens)), log_names=None, frame_interval=1)
        if log_names is not None:
            allowed = set(log_names)
            kept = [log for log in chosen.log_names or allowed if log in allowed]
            chosen = replace(chosen, log_names=tuple(sorted(kept)))
        if max_scenes is not None:
            chosen = replace(chosen, max_scenes=max_scenes)
        if chosen is not found.scene_filter:
            found = replace(found, scene_filter=chosen, published=None)
        logs = _split_folder(Path(data.root) / LOGS_FOLDER, found.folder, "*.pkl")
        sensors = _split_folder(Path(data.root) / SENSORS_FOLDER, found.folder, "*")
        return cls(found, logs, sensors, strict_gaps=strict_gaps, workers=workers, progress=progress)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Scene tokens in the order of iteration."""
        return self._tokens

    @property
    def log_names(self) -> tuple[str, ...]:
        """Names of the logs that hold scenes, in order."""
        return tuple(dict.fromkeys(log for log, _ in self._windows.values()))

    def log_of(self, token: str) -> str:
        """Name of the log that holds a scene. Raises UserError for a token that is not in the split."""
        return self._window(token)[0]

    def start_of(self, token: str) -> int:
        """Index in its log of the first frame of a scene."""
        return self._window(token)[1]

    def __len__(self) -> int:
        return len(self._tokens)

    def __contains__(self, token: object) -> bool:
        return token in self._windows

    def __iter__(self) -> Iterator[Scene]:
        for token in self._tokens:
            try:
                scene = self[token]
            except DataError as error:
                self.failures[token] = str(error)
                continue
            yield scene

    def __getitem__(self, key: str | int) -> Scene:
        """Scene of a token, or at a position. Raises UserError (unknown token), IndexError, DataError (bad frame)."""
        return self._scene(key if isinstance(key, str) else self._tokens[key])

    def observed(self, token: str) -> Scene | SyntheticScene:
        """A scene with everything that scoring may know about its future, and without sensors, which it never needs."""
        return self._scene(token, sensors=False)

    def _scene(self, token: str, sensors: bool = True) -> Scene:
        log_name, start = self._window(token)
        frames = self._log(log_name).frames(start, self.split.scene_filter.num_frames, sensors)
        return Scene(frames, self.split.scene_filter.num_history_frames, self.sensor_root)

    def source_file(self, token: str) -> Path:
        """File that a scene is read from."""
        return self.logs / f"{self.log_of(token)}.pkl"

    def subset(self, tokens: Iterable[str] | None = None, log_names: Iterable[str] | None = None) -> SceneDataset:
        """The same dataset narrowed to some tokens and/or logs, without scanning again; order is kept.

        `coverage` keeps describing the whole. Raises UserError for a token that is not here.
        """
        kept = self._windows
        if tokens is not None:
            wanted = {token: self._window(token) for token in tokens}
            kept = {token: window for token, window in kept.items() if token in wanted}
        if log_names is not None:
            allowed = set(log_names)
            kept = {token: window for token, window in kept.items() if window[0] in allowed}
        narrowed = object.__new__(SceneDataset)
        narrowed.__dict__.update(self.__getstate__(), _windows=kept, _tokens=tuple(kept), failures={})
        return narrowed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _window(self, token: str) -> tuple[str, int]:
        if token not in self._windows:
            raise UserError(f"scene {token} is not in split {self.split.name} ({len(self)} scenes under {self.logs})")
        return self._windows[token]

    def _log(self, name: str) -> _OpenLog:
        if name not in self._open:
            while len(self._open) >= _OPEN_LOGS:
                self._open.popitem(last=False)
            self._open[name] = _OpenLog(self.logs / f"{name}.pkl")
        self._open.move_to_end(name)
        return self._open[name]


class _OpenLog:
    """One log in memory; frames are decoded on first use and shared by the windows that overlap."""

    def __init__(self, path: Path):
        self._path = path
        self._dicts = read_log_dicts(path)
        self._frames: dict[tuple[int, bool], Frame] = {}

    def frames(self, start: int, count: int, sensors: bool) -> tuple[Frame, ...]:
        return tuple(self._frame(index, sensors) for index in range(start, start + count))

    def _frame(self, index: int, sensors: bool) -> Frame:
        if (index, sensors) not in self._frames:
            self._frames[index, sensors] = frame_from_dict(self._dicts[index], self._path, index, sensors)
        return self._frames[index, sensors]


# --- sensors a scene needs -------------------------------------------------------------------------------------------


def sensor_files(
    scene: Scene, cameras: Sequence[str] = (), lidar: bool = False, frames: Sequence[int] | None = None
) -> list[Path]:
    """Paths of the sensor files of some frames of a scene (default: the current frame only).

    frames: indices within the window. Raises DataError for a camera or sweep that the log does not list.
    """
    if scene.sensor_root is None:
        raise UserError(f"scene {scene.token} has no sensor folder; give the dataset a sensor_root")
    indices = [scene.num_history - 1] if frames is None else frames
    paths = []
    for frame in (scene.frames[index] for index in indices):
        for camera in cameras:
            if camera not in frame.cameras:
                listed = ", ".join(frame.cameras) or "none"
                raise DataError(f"log {frame.log_name}", f"frame {frame.token} lists no {camera} (listed: {listed})")
            paths.append(scene.sensor_root / frame.cameras[camera].path)
        if lidar:
            if frame.lidar_path is None:
                raise DataError(f"log {frame.log_name}", f"frame {frame.token} lists no LiDAR sweep")
            paths.append(scene.sensor_root / frame.lidar_path)
    return paths


def missing_sensor_files(
    scene: Scene, cameras: Sequence[str] = (), lidar: bool = False, frames: Sequence[int] | None = None
) -> list[Path]:
    """Those of `sensor_files` that are absent or empty on disk."""
    paths = sensor_files(scene, cameras, lidar, frames)
    return [path for path in paths if not path.is_file() or path.stat().st_size == 0]


def sensor_coverage(dataset: SceneDataset, cameras: Sequence[str], lidar: bool, keep: int = 10) -> SensorCoverage:
    """How many of the sensor files that the current frames need are on disk; the first `keep` missing ones by path.

    Looks at directory entries only; no file is opened. A camera that a log does not list counts as a missing file.
    """
    expected = missing = complete = 0
    first: list[str] = []
    for scene in dataset:
        wanted = len(cameras) + lidar
        try:
            lost = [str(path) for path in missing_sensor_files(scene, cameras, lidar)]
        except DataError as error:
            lost = [str(error)]
        expected, missing, complete = expected + wanted, missing + len(lost), complete + (not lost)
        first += lost[: keep - len(first)]
    return SensorCoverage(dataset.split.name, len(dataset), complete, expected, missing, tuple(first))


# --- scanning --------------------------------------------------------------------------------------------------------


def _split_folder(parent: Path, folder: str, pattern: str) -> Path:
    """parent/folder, or parent/folder/folder (as the archives unpack) where only that one holds something."""
    direct, doubled = parent / folder, parent / folder / folder
    if doubled.is_dir() and any(doubled.glob(pattern)) and all(path == doubled for path in direct.glob(pattern)):
        return doubled
    return direct


def _log_paths(folder: Path, scene_filter: SceneFilter) -> tuple[list[Path], tuple[str, ...]]:
    """Log files to scan in name order, and the names that the filter lists but the folder lacks."""
    present = {path.stem: path for path in folder.glob("*.pkl")} if folder.is_dir() else {}
    if not present:
        remedy = "download them, or check data.root (or $OPENSCENE_DATA_ROOT)"
        raise UserError(f"no log files (*.pkl) in {folder}; {remedy}")
    names = sorted(present) if scene_filter.log_names is None else sorted(set(scene_filter.log_names))
    return [present[name] for name in names if name in present], tuple(name for name in names if name not in present)


def _scan_logs(
    summaries: Iterable[LogSummary], scene_filter: SceneFilter, strict_gaps: bool
) -> Iterator[_LogScan]:
    """Windows log by log; stops once max_scenes were found (the last log is cut to fit)."""
    tokens = None if scene_filter.tokens is None else frozenset(scene_filter.tokens)
    left = scene_filter.max_scenes
    for summary in summaries:
        scan = _scan_log(summary, scene_filter, tokens, strict_gaps)
        if left is not None:
            scan = replace(scan, windows=scan.windows[:left])
            left -= len(scan.windows)
        yield scan
        if left == 0:
            return


def _scan_log(
    log: LogSummary, scene_filter: SceneFilter, tokens: frozenset[str] | None, strict_gaps: bool
) -> _LogScan:
    """Windows of one log that pass the filter, as NAVSIM cuts them: by list position, gaps not looked at."""
    windows, no_route, gaps = [], 0, 0
    for start in scene_filter.window_starts(len(log)):
        current = start + scene_filter.num_history_frames - 1
        token = str(log.tokens[current])
        if tokens is not None and token not in tokens:
            continue
        if scene_filter.has_route and not log.has_route[current]:
            no_route += 1
        elif strict_gaps and _has_gap(log.timestamps_us[start : start + scene_filter.num_frames]):
            gaps += 1
        else:
            windows.append((token, start))
    return _LogScan(log.name, tuple(windows), no_route, gaps, log.broken)


def _has_gap(timestamps_us: np.ndarray) -> bool:
    steps = np.diff(timestamps_us) * 1e-6
    return bool((np.abs(steps - FRAME_INTERVAL_S) > GAP_TOLERANCE_S).any())


def _coverage(
    split: Split, scans: Sequence[_LogScan], missing: tuple[str, ...], windows: Collection[str]
) -> SplitCoverage:
    listed, limit = split.scene_filter.tokens, split.scene_filter.max_scenes
    limited = limit is not None and len(windows) >= limit
    expected = None
    if listed is not None:
        expected = len(listed) if limit is None else min(len(listed), limit)
    return SplitCoverage(
        split=split.name,
        logs_found=sum(scan.broken is None for scan in scans),
        logs_missing=() if limited else missing,
        logs_broken=tuple((scan.name, scan.broken) for scan in scans if scan.broken is not None),
        scenes_found=len(windows),
        scenes_expected=expected,
        tokens_missing=() if listed is None or limited else tuple(t for t in listed if t not in windows),
        no_route=sum(scan.no_route for scan in scans),
        gaps=sum(scan.gaps for scan in scans),
        published=None if limited else split.published,
    )


def _why_empty(coverage: SplitCoverage, scene_filter: SceneFilter, logs: Path) -> str:
    if coverage.logs_broken and not coverage.logs_found:
        reason = f"none of {len(coverage.logs_broken)} logs can be read (first: {coverage.logs_broken[0][1]})"
    elif not coverage.logs_found:
        reason = f"none of the {len(coverage.logs_missing)} logs of its filter are there"
    elif scene_filter.tokens is not None:
        reason = f"none of its {len(scene_filter.tokens)} tokens is in the {coverage.logs_found} logs there"
    else:
        length = f"{scene_filter.num_history_frames} + {scene_filter.num_future_frames} frames"
        reason = f"{coverage.logs_found} logs hold no window of {length}"
        reason += f" with a route ({coverage.no_route} without)" if scene_filter.has_route else ""
    return f"split {coverage.split} has no scenes under {logs}: {reason}; check split, data.root and data.filters"
