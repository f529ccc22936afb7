"""What is here, what is missing, and the command that mends it: findings about the machine, the packages and the data.

Each finding is ok, a warning (something optional is absent) or an error (something needed is wrong), with its remedy.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from navsim_eval import selfcheck
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SENSORS_FOLDER
from navsim_eval.environment import describe_git, describe_hardware, gpu_names, package_version
from navsim_eval.errors import UserError
from navsim_eval.formats.map_store import MapStore
from navsim_eval.formats.splits import LOGS_FOLDER

OK, WARNING, ERROR = "ok", "warning", "error"
NEEDED = ("torch", "torchvision", "timm", "numpy", "scipy", "shapely", "pyogrio", "opencv-python-headless",
          "pytorch-lightning", "hydra-core", "safetensors", "matplotlib")  # fmt: skip
EXTRAS = {  # extra → (what it is for, its packages)
    "city": ("the synthetic city", ("eclipse-sumo", "trimesh", "embreex")),
    "export": ("export", ("onnx", "onnxruntime")),
    "ray": ("several machines", ("ray",)),
    "mm": ("mmengine configurations", ("mmengine-lite", "mmcv-lite")),
}
VARIABLES = {  # name → (is it an existing folder?, meaning)
    "OPENSCENE_DATA_ROOT": (True, "folder that holds navsim_logs/ and sensor_blobs/"),
    "NUPLAN_MAPS_ROOT": (True, "folder that holds the maps"),
    "NUPLAN_MAP_VERSION": (False, "name of the map version file"),
    "NAVSIM_EXP_ROOT": (False, "where results go"),
    "NAVSIM_DEVKIT_ROOT": (True, "devkit checkout whose split files are read"),
}
_FREE_GIB = 10.0


@dataclass
class DoctorConfig:
    """What to look at.

    data: the data set that is examined (default: the one the tools would use)
    """

    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    subject: str
    state: str
    detail: str
    remedy: str = ""


def examine(config: DoctorConfig) -> list[Finding]:
    """Look at everything; nothing raises and nothing is changed."""
    return [*_interpreter(), *_packages(), *_devices(), *_variables(), *_data(config.data), *_arithmetic()]


def _interpreter() -> Iterator[Finding]:
    version = sys.version_info
    fits = (3, 11) <= version[:2] < (3, 14)
    remedy = "" if fits else "use Python 3.11, 3.12 or 3.13"
    yield Finding("python", OK if fits else ERROR, f"{version.major}.{version.minor}.{version.micro}", remedy)
    git = describe_git()
    if git["commit"]:
        yield Finding("source", OK, git["commit"][:12] + (", modified" if git["modified"] else ""))


def _packages() -> Iterator[Finding]:
    versions = {name: package_version(name) for name in NEEDED}
    held = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield Finding("packages", OK, held or "none")
    for name in (name for name, version in versions.items() if not version):
        yield Finding(name, ERROR, "not installed", "make setup")
    for extra, (purpose, names) in EXTRAS.items():
        absent = [name for name in names if not package_version(name)]
        detail = f"{', '.join(absent)} not installed (for {purpose})" if absent else ", ".join(names)
        remedy = f"pip install -e '.[{extra}]'" if absent else ""
        yield Finding(f"extra {extra}", WARNING if absent else OK, detail, remedy)
    try:
        importlib.import_module("cv2")
    except ImportError as error:
        remedy = "pip install --force-reinstall --no-deps opencv-python-headless"
        yield Finding("opencv", ERROR, f"cannot be imported: {error}", remedy)


def _devices() -> Iterator[Finding]:
    hardware = describe_hardware()
    yield Finding("cpu", OK, f"{hardware['cpu']}, {hardware['cores']} usable cores, {hardware['memory_gib']} GiB")
    try:
        names = gpu_names()
    except (ImportError, RuntimeError) as error:
        yield Finding("gpu", ERROR, f"torch cannot be used: {error}", "make setup")
        return
    if names:
        yield Finding("gpu", OK, ", ".join(names))
    else:
        yield Finding("gpu", WARNING, "none that torch can use", "everything runs on the CPU; train model=city_nano")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    remedy = "" if free > _FREE_GIB else "free some space, or set output_dir and data.root to another disk"
    yield Finding("disk", OK if free > _FREE_GIB else WARNING, f"{free:.0f} GiB free here", remedy)


def _variables() -> Iterator[Finding]:
    unset = [name for name in VARIABLES if not os.environ.get(name)]
    for name, (is_folder, meaning) in VARIABLES.items():
        value = os.environ.get(name, "")
        if value and is_folder and not Path(value).is_dir():
            yield Finding(f"${name}", ERROR, f"{value} is no folder", f"export {name}=<{meaning}>, or unset it")
        elif value:
            yield Finding(f"${name}", OK, value)
    if unset:
        yield Finding("not set", OK, ", ".join(f"${name}" for name in unset))


def _data(data: DataConfig) -> Iterator[Finding]:
    root = Path(data.root)
    logs = root / LOGS_FOLDER
    folders = sorted(path for path in logs.iterdir() if path.is_dir()) if logs.is_dir() else []
    splits = {path.name: len(list(path.rglob("*.pkl"))) for path in folders}
    if not splits:
        remedy = "python tools/make_city.py, or set data.root (or $OPENSCENE_DATA_ROOT) to real data"
        yield Finding("logs", WARNING, f"no {LOGS_FOLDER}/ in {root}", remedy)
        return
    yield Finding("logs", OK, f"{logs}: " + ", ".join(f"{name} ({count} logs)" for name, count in splits.items()))
    for name in splits:
        sensors = root / SENSORS_FOLDER / name
        held = sensors.is_dir() and any(sensors.iterdir())
        remedy = "" if held else "download the split's sensor_blobs; logs alone serve baselines and scoring"
        detail = str(sensors) if held else f"no {sensors}"
        yield Finding(f"sensors of {name}", OK if held else WARNING, detail, remedy)
    yield from _maps(data)


def _maps(data: DataConfig) -> Iterator[Finding]:
    root = Path(data.maps)
    locations = sorted({path.parent.parent.name for path in root.glob("*/*/map.gpkg")})
    if not locations:
        remedy = "set data.maps (or $NUPLAN_MAPS_ROOT), or make a city with python tools/make_city.py"
        yield Finding("maps", ERROR, f"no <location>/<version>/map.gpkg in {root}", remedy)
        return
    store = MapStore(root, data.map_version)
    for name in locations:
        try:
            lanes = len(store.get(name).layer("lanes_polygons"))
            yield Finding(f"map {name}", OK, f"{lanes} lanes")
        except UserError as error:
            yield Finding(f"map {name}", ERROR, str(error), "download or make this map again")


def _arithmetic() -> Iterator[Finding]:
    found = selfcheck.problems()
    for problem in found:
        yield Finding("self-check", ERROR, problem, "install another build of numpy and torch (make setup)")
    if not found:
        yield Finding("self-check", OK, "matrix products, simulation and scoring give the expected numbers")
