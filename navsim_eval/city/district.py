"""One district of a city, from its seed to a map and logs in a folder of its own.

network → map layers → traffic → scenes that pass the filter → log pickles. The folder is complete once it holds the
mark `done.json`; a run that finds the mark takes the result from it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.city.furniture import furnish
from navsim_eval.city.network import LOCATIONS, STYLES, District, build_network
from navsim_eval.city.recorder import FUTURE_FRAMES, HISTORY_FRAMES, Recorder
from navsim_eval.city.rig import with_sensors
from navsim_eval.city.road_map import assign_ids, district_layers
from navsim_eval.city.selection import Run, run_frames, select_runs
from navsim_eval.city.sumo_net import read_network
from navsim_eval.city.traffic import STEP_S, simulate
from navsim_eval.files import atomic_write, sha256
from navsim_eval.formats.logs import write_log
from navsim_eval.formats.map_store import MapStore, write_map
from navsim_eval.scene import FRAME_INTERVAL_S

SIMULATED_S, SIMULATED_S_PER_SCENE = 40.0, 1.2


@dataclass(frozen=True)
class DistrictJob:
    """A district to make in its own folder. quota: scenes wanted of it; image_size: (height, width) [px]."""

    district: District
    quota: int
    image_size: tuple[int, int]
    folder: Path


def make_district(job: DistrictJob) -> dict[str, Any]:
    """Make a district, unless its folder holds it already.

    Returns {quota, folder, scenes, logs: {name: {scenes, start, sha256}}}, start: global x, y of the first scene [m];
    fewer scenes than the quota where the traffic offers no more.
    """
    mark = job.folder / "done.json"
    if mark.is_file() and (result := json.loads(mark.read_text()))["quota"] == job.quota:
        return {**result, "folder": str(job.folder)}
    shutil.rmtree(job.folder, ignore_errors=True)
    district, style = job.district, STYLES[job.district.style]

    network = read_network(build_network(style, district.seed, job.folder))
    ids = assign_ids(network, district.index)
    furniture, car_parks = furnish(network, district.seed)
    layers = district_layers(network, ids, district.index, district.offset, car_parks)
    where = district.location
    write_map(job.folder / "maps", where.name, where.version, layers, 32600 + where.utm_zone)
    road_map = MapStore(job.folder / "maps").get(where.name)

    traffic = simulate(network, style, district.seed, job.folder, SIMULATED_S + SIMULATED_S_PER_SCENE * job.quota)
    recorder = Recorder(district, network, ids, traffic, furniture)
    runs = select_runs(recorder, road_map, job.quota, np.random.default_rng([district.seed, 3]))

    logs: dict[str, dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: (run.drive.track.id, run.first)):
        name = _log_name(district, run)
        if name in logs:
            raise ValueError(f"two logs are named {name}")
        frames = [with_sensors(frame, *job.image_size) for frame in run_frames(recorder, road_map, run, name)]
        path = write_log(job.folder / "logs" / f"{name}.pkl", frames, vehicle_name=name.split("_")[1])
        start = frames[HISTORY_FRAMES].ego_pose[:2].round(1).tolist()
        logs[name] = {"scenes": run.count, "start": start, "sha256": sha256(path)}
    scenes = sum(log["scenes"] for log in logs.values())
    result = {"quota": job.quota, "folder": str(job.folder), "scenes": scenes, "logs": logs}
    atomic_write(mark, json.dumps(result))
    return result


def _log_name(district: District, run: Run) -> str:
    """Unique in a city and shaped as in the published data: start time, vehicle, first and last second."""
    month = 5 + list(LOCATIONS).index(district.split)
    day, hour = district.index % 28 + 1, 8 + district.index // 28
    number = int(run.drive.track.id[1:])
    first = run.first * STEP_S - HISTORY_FRAMES * FRAME_INTERVAL_S
    last = first + (HISTORY_FRAMES + run.count - 1 + FUTURE_FRAMES) * FRAME_INTERVAL_S
    time = f"2021.{month:02d}.{day:02d}.{hour:02d}.{number // 60 % 60:02d}.{number % 60:02d}"
    return f"{time}_veh-{number // 3600 % 90 + 10:02d}_{int(first):05d}_{int(np.ceil(last)):05d}"
