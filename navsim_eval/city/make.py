"""Make a synthetic city on disk: networks → traffic → scenes → logs and maps → camera images and point clouds.

The result has NAVSIM's layout under one root: `navsim_logs/<split>/*.pkl`, `sensor_blobs/<split>/…`, `maps/…`. Each
split is a city of its own. Work is spread over processes by district and by log; finished districts, logs and frames
are kept and skipped by the next run, so an interrupted run resumes. `city.json` tells what was made and how.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from navsim_eval.city.district import DistrictJob, make_district
from navsim_eval.city.network import LOCATIONS, STYLES, District, district_seed, sumo_home
from navsim_eval.city.road_map import merge_layers
from navsim_eval.city.sensors import SENSOR_SETS, RenderLog, require_renderer
from navsim_eval.errors import UserError
from navsim_eval.executor import run_jobs
from navsim_eval.files import atomic_write
from navsim_eval.formats.geopackage import list_layers, read_layer, read_meta, write_geopackage
from navsim_eval.formats.map_store import DEFAULT_VERSION_FILE
from navsim_eval.formats.splits import CITY_MANIFEST

FORMAT_VERSION = 2
SCENES_PER_DISTRICT = 60
MIN_SCENES_PER_DISTRICT = 30  # small splits still mix styles of streets
MAX_EXTRA_DISTRICTS = 8
_STYLE_ORDER = {
    "train": ("grid", "irregular", "arterial", "ring"),
    "val": ("irregular", "arterial", "grid", "ring"),
    "test": ("arterial", "grid", "irregular", "ring"),
}
LOGS_TOGETHER = 16  # neighbours go to one renderer, which has their streets ready
_STRIP_M = 128.0  # width of the strips in which logs are put in order, up one and down the next


@dataclass
class CityConfig:
    """What city to make.

    scenes:  scenes of the training split
    val_scenes, test_scenes: of the other two; -1 means a tenth and a fifth of `scenes`
    seed:    decides everything; equal configurations give equal files on one machine
    sensors: all (8 cameras and LiDAR), front (the three front cameras and LiDAR) or none
    width:   image width [px]; the height is 9/16 of it (960 × 540, 1920 × 1080 as in the real data)
    splits:  which of train, val, test to make
    whole_logs: sensors for every frame of a log instead of the current frames of its scenes (for tools/drive_loop.py)
    """

    scenes: int = 600
    val_scenes: int = -1
    test_scenes: int = -1
    seed: int = 0
    sensors: str = "front"
    width: int = 960
    splits: list[str] = field(default_factory=lambda: ["train", "val", "test"])
    whole_logs: bool = False

    def __post_init__(self) -> None:
        if self.sensors not in SENSOR_SETS:
            raise UserError(f"city.sensors={self.sensors}: choose one of {', '.join(SENSOR_SETS)}")
        unknown = [split for split in self.splits if split not in LOCATIONS]
        if unknown or not self.splits:
            raise UserError(f"city.splits={','.join(self.splits)}: choose from {', '.join(LOCATIONS)}")
        if self.scenes < 1 or self.width < 32 or self.width % 16 or self.seed < 0:
            raise UserError("city: scenes ≥ 1, seed ≥ 0 and a width that is a multiple of 16 are needed")

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) [px]."""
        return self.width * 9 // 16, self.width

    def count(self, split: str) -> int:
        """Number of scenes of a split."""
        given = {"train": self.scenes, "val": self.val_scenes, "test": self.test_scenes}[split]
        share = {"train": 1, "val": 10, "test": 5}[split]
        return given if given >= 0 else max(1, round(self.scenes / share))


@dataclass
class CityReport:
    """What a run of `make_city` did: scenes, logs and newly rendered frames per split, wall time [s] per stage."""

    root: Path
    scenes: dict[str, int] = field(default_factory=dict)
    logs: dict[str, int] = field(default_factory=dict)
    rendered: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


Progress = Callable[[str, int, int], None]  # stage, newly finished units, units of the stage so far known


def make_city(
    config: CityConfig,
    root: Path | str,
    maps: Path | str | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> CityReport:
    """Make the city under `root`, or finish one that an earlier run with the same configuration began.

    maps: maps root, by default `<root>/maps`; workers: processes, 0 for one per core
    Asking for other sensors of an existing city renders only what is missing. Raises UserError when `root` holds
    another city, or a package is missing.
    """
    root = Path(root)
    maps = Path(maps) if maps else root / "maps"
    sumo_home()
    if config.sensors != "none":
        require_renderer()
    manifest = _Manifest.open(root, config)
    report = CityReport(root)

    begun = perf_counter()
    for split, results in _make_districts(config, manifest.missing(config.splits), root / ".build", workers, progress):
        _merge_maps(split, [result["folder"] for result in results], maps)
        manifest.add_split(split, _collect_logs(root / "navsim_logs" / split, results))
    shutil.rmtree(root / ".build", ignore_errors=True)
    report.seconds["scenes"] = perf_counter() - begun

    begun = perf_counter()
    for split in config.splits:
        entry = manifest.content["splits"][split]
        report.scenes[split], report.logs[split] = entry["scenes"], len(entry["logs"])
    if config.sensors != "none":
        job = RenderLog(root, maps, config.sensors, config.image_size, config.seed, config.whole_logs)
        logs = [(split, name) for split in config.splits for name in _neighbours(manifest.content["splits"][split])]
        report.rendered = _render(job, logs, workers, progress)
    report.seconds["sensors"] = perf_counter() - begun
    return report


# --- what has been made ----------------------------------------------------------------------------------------------


class _Manifest:
    """`city.json`: the configuration that decides the logs, and the finished splits with a checksum per log."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self.path, self.content = path, content

    @staticmethod
    def open(root: Path, config: CityConfig) -> _Manifest:
        path = root / CITY_MANIFEST
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.root={root} cannot be written ({error.strerror})") from error
        wanted = {
            "format": FORMAT_VERSION,
            "seed": config.seed,
            "width": config.width,
            "scenes": {split: config.count(split) for split in LOCATIONS},
        }
        if not path.is_file():
            foreign = root / "navsim_logs"
            if foreign.is_dir() and any(foreign.iterdir()):
                raise UserError(f"{foreign} holds logs that are no synthetic city; choose another data.root")
            manifest = _Manifest(path, {**wanted, "splits": {}})
            manifest.write()
            return manifest
        try:
            content = json.loads(path.read_text())
            found = {key: content[key] for key in wanted}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: unreadable ({error}); delete {root} or choose another data.root") from error
        if found != wanted:
            shown = ", ".join(f"{key} {found[key]} ≠ {wanted[key]}" for key in wanted if found[key] != wanted[key])
            raise UserError(f"{root} holds another city ({shown}); choose another data.root or delete it")
        return _Manifest(path, content)

    def missing(self, splits: Sequence[str]) -> list[str]:
        """Splits that no earlier run has finished."""
        return [split for split in splits if split not in self.content["splits"]]

    def add_split(self, split: str, logs: dict[str, dict[str, Any]]) -> None:
        scenes = sum(log["scenes"] for log in logs.values())
        self.content["splits"][split] = {"scenes": scenes, "logs": logs}
        self.write()

    def write(self) -> None:
        atomic_write(self.path, json.dumps(self.content, indent=1, sort_keys=True) + "\n")


# --- scenes ----------------------------------------------------------------------------------------------------------


def _make_districts(
    config: CityConfig, splits: Sequence[str], build: Path, workers: int, progress: Progress | None
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Results of all districts, split by split. Splits short of scenes get further districts until they have them."""
    done: dict[str, list[dict[str, Any]]] = defaultdict(list)
    jobs = [_district_job(config, split, k, n, build) for split in splits for k, n in enumerate(_quotas(config, split))]
    total = len(jobs)
    tell = (lambda n: progress("districts", n, total)) if progress else None
    while jobs:
        for outcome in run_jobs(make_district, jobs, workers=workers, progress=tell):
            if not outcome.ok:
                district = jobs[outcome.index].district
                raise UserError(f"{district.split} district {district.index} ({district.style}): {outcome.error}")
            done[jobs[outcome.index].district.split].append(outcome.value)
        jobs = []
        for split in splits:
            missing = config.count(split) - sum(result["scenes"] for result in done[split])
            if missing > 0:
                if len(done[split]) >= len(_quotas(config, split)) + MAX_EXTRA_DISTRICTS:
                    raise UserError(f"split {split}: {missing} scenes short of {config.count(split)}; try another seed")
                jobs.append(_district_job(config, split, len(done[split]), missing, build))
        total += len(jobs)
    return list(done.items())


def _quotas(config: CityConfig, split: str) -> list[int]:
    """Scenes a district, as even as can be."""
    wanted = config.count(split)
    count = max(-(-wanted // SCENES_PER_DISTRICT), min(len(STYLES), wanted // MIN_SCENES_PER_DISTRICT), 1)
    return [wanted // count + (k < wanted % count) for k in range(count)]


def _district_job(config: CityConfig, split: str, index: int, quota: int, build: Path) -> DistrictJob:
    styles = _STYLE_ORDER[split]
    district = District(split, index, styles[index % len(styles)], district_seed(config.seed, split, index))
    return DistrictJob(district, quota, config.image_size, build / split / f"{index:03d}")


def _merge_maps(split: str, folders: Sequence[str], maps: Path) -> None:
    """One map of the split's location out of its districts' maps, which are already in longitude and latitude."""
    where = LOCATIONS[split]
    relative = Path(where.name) / where.version / "map.gpkg"
    sources = [Path(folder) / "maps" / relative for folder in folders]
    layers = [{name: read_layer(path, name) for name in list_layers(path)} for path in sources]
    write_geopackage(maps / relative, merge_layers(layers), read_meta(sources[0]))
    index = maps / f"{DEFAULT_VERSION_FILE}.json"
    versions = json.loads(index.read_text()) if index.is_file() else {}
    versions[where.name] = {"version": where.version, "layers": {}}
    atomic_write(index, json.dumps(versions, indent=1, sort_keys=True) + "\n")


def _collect_logs(folder: Path, results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Copy logs into the split's folder; a log there that no district made (an interrupted run's) goes away."""
    folder.mkdir(parents=True, exist_ok=True)
    logs = {name: entry for result in results for name, entry in result["logs"].items()}
    for path in folder.glob("*.pkl"):
        if path.stem not in logs:
            path.unlink()
    for result in results:
        for name in result["logs"]:
            atomic_write(folder / f"{name}.pkl", (Path(result["folder"]) / "logs" / f"{name}.pkl").read_bytes())
    return dict(sorted(logs.items()))


def _neighbours(split: dict[str, Any]) -> list[str]:
    """Names of a split's logs, such that those which start near each other follow each other."""

    def place(name: str) -> tuple[int, float]:
        x, y = split["logs"][name]["start"]
        strip = int(x // _STRIP_M)
        return strip, y if strip % 2 else -y

    return sorted(split["logs"], key=place)


def _render(job: RenderLog, logs: Sequence[tuple[str, str]], workers: int, progress: Progress | None) -> dict[str, int]:
    """Render what is missing; returns the number of frames rendered now, by split."""
    tell = (lambda n: progress("sensors", n, len(logs))) if progress else None
    rendered: dict[str, int] = defaultdict(int)
    for outcome in run_jobs(job, logs, workers=workers, chunk_size=LOGS_TOGETHER, progress=tell):
        split, name = logs[outcome.index]
        if not outcome.ok:
            raise UserError(f"rendering {split}/{name}: {outcome.error}")
        rendered[split] += outcome.value
    return dict(rendered)
