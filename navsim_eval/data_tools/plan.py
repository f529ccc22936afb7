"""Before the download: what each published split holds, what it weighs, and whether it fits on this disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from navsim_eval.config import DataConfig
from navsim_eval.data_tools.published import (
    ARCHIVES,
    FACTS,
    ON_THE_SERVER,
    SOURCES,
    UNKNOWN,
    Number,
    SplitFacts,
    published,
)
from navsim_eval.errors import UserError
from navsim_eval.formats.splits import CITY_MANIFEST, LOGS_FOLDER

FILES_A_SCENE = 4  # three front cameras and one point cloud: what the planners here read of the current frame
CACHE_MB = {"features, lossless": 0.89, "features, JPEG": 0.078, "metric cache": 0.12}  # a scene of the city, 10⁶ bytes


@dataclass(frozen=True)
class SplitPlan:
    """One published split as numbers with sources. Sizes in GB (10⁹ bytes); None: no source states it.

    logs, scenes, second_stage: counts;  logs_gb, sensors_gb: unpacked;  sensor_files: that planners here read
    caches_gb: what tools/cache.py will add, projected
    logs_present: log files of its data folder that are here already
    """

    name: str
    folder: str
    keeps: str
    window: str
    use: str
    metric: str
    logs: Number
    scenes: Number
    second_stage: Number
    logs_gb: Number
    sensors_gb: Number
    sensor_files: Number
    caches_gb: dict[str, Number]
    archives: tuple[str, ...]
    logs_present: int


def plan_split(name: str, data: DataConfig) -> SplitPlan:
    """Facts of one published split. Raises UserError for an unknown name, listing the known ones."""
    if name not in FACTS:
        raise UserError(f"split '{name}' is not published, so there is nothing to plan; published: {', '.join(FACTS)}")
    facts, counts = FACTS[name], published(name)
    folder = Path(data.root) / LOGS_FOLDER / counts.folder
    scenes = counts.tokens
    return SplitPlan(
        name=name,
        folder=counts.folder,
        keeps=facts.keeps,
        window=facts.window,
        use=facts.use,
        metric=facts.metric,
        logs=_number(counts.logs, facts.logs_source),
        scenes=_number(scenes, facts.scenes_source),
        second_stage=_number(counts.second_stage_tokens, facts.scenes_source),
        logs_gb=facts.logs_gb,
        sensors_gb=facts.sensors_gb,
        sensor_files=_number(scenes and scenes * FILES_A_SCENE, "g"),
        caches_gb={kind: _cache_gb(kind, scenes, facts) for kind in CACHE_MB},
        archives=("maps", *facts.archives),
        logs_present=len(list(folder.rglob("*.pkl"))) if folder.is_dir() else 0,
    )


def _cache_gb(kind: str, scenes: int | None, facts: SplitFacts) -> Number:
    """Size of a cache of all scenes; scenes that only a server can score have no metric cache."""
    if kind == "metric cache" and facts.metric == ON_THE_SERVER:
        return UNKNOWN
    return _number(scenes and scenes * CACHE_MB[kind] / 1e3, "h")


def _number(value: float | None, source: str) -> Number:
    return UNKNOWN if value is None else Number(value, source)


def plan(split: str, data: DataConfig) -> list[SplitPlan]:
    """Plans of one published split, or of all of them for an empty name."""
    return [plan_split(name, data) for name in ([split] if split else FACTS)]


def as_json(plans: Iterable[SplitPlan], data: DataConfig) -> dict[str, Any]:
    """Everything with its sources, and the room on the disk that `data.root` lies on."""
    return {
        "splits": [asdict(one) for one in plans],
        "archives": {name: asdict(group) for name, group in ARCHIVES.items()},
        "sources": dict(SOURCES),
        "free_gb": free_gb(data.root),
    }


def free_gb(root: str) -> float:
    """Room [GB] on the disk that holds the data root, or will hold it."""
    folder = Path(root).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 1e9


# --- tables ----------------------------------------------------------------------------------------------------------


def splits_table(plans: Iterable[SplitPlan]) -> Table:
    """What each split filters and is for."""
    table = Table(title="Published splits", title_justify="left", show_lines=True)
    for column in ("split", "data folder", "keeps", "window", "scenes", "GB", "for", "metric"):
        right = column in ("scenes", "GB")
        table.add_column(column, justify="right" if right else "left", no_wrap=column == "split")
    for one in plans:
        second = f" + {one.second_stage.value:.0f}" if one.second_stage.value is not None else ""
        total, scenes = needed_gb(one), shown(one.scenes, source=False) + second
        size = "?" if total is None else f"{total:,.3g}" if total < 1000 else f"{total:,.0f}"
        table.add_row(one.name, one.folder, one.keeps, one.window, scenes, size, one.use, one.metric or "–")
    return table


def local_table(data: DataConfig) -> Table:
    """Folders of logs that are here: any of them is a split, too. Empty where there are none."""
    root = Path(data.root)
    folders = sorted(path for path in (root / LOGS_FOLDER).glob("*") if path.is_dir())
    city = (root / CITY_MANIFEST).is_file()
    kind = ", a synthetic city" if city else ""
    table = Table(title=escape(f"Splits in {root / LOGS_FOLDER}{kind}"), title_justify="left")
    for column in ("split", "log files", "log GB", "keeps"):
        table.add_column(column, justify="right" if column.startswith("log") else "left")
    for folder in folders:
        sizes = [path.stat().st_size for path in folder.rglob("*.pkl")]
        known = not city and folder.name in FACTS
        keeps = FACTS[folder.name].keeps if known else "all windows of 4+10 frames at stride 1 with a route"
        table.add_row(folder.name, str(len(sizes)), f"{sum(sizes) / 1e9:.3g}", keeps)
    return table


def sizes_table(plans: Iterable[SplitPlan]) -> Table:
    """What each split weighs; letters name the sources."""
    table = Table(title="Sizes in GB; letters: sources", title_justify="left")
    columns = ["split", "logs", "scenes", "logs GB", "sensors GB", "files read", *CACHE_MB, "logs here"]
    for column in columns:
        table.add_column(column, justify="left" if column == "split" else "right", no_wrap=column == "split")
    for one in plans:
        caches = [shown(number, "{:.2g}") for number in one.caches_gb.values()]
        numbers = [one.logs, one.scenes, one.logs_gb, one.sensors_gb, one.sensor_files]
        table.add_row(one.name, *map(shown, numbers), *caches, str(one.logs_present))
    return table


def archives_table(one: SplitPlan) -> Table:
    """What to download for one split."""
    table = Table(title=f"Archives of {one.name}", title_justify="left")
    for column in ("archives", "number", "GB, packed", "checksums"):
        table.add_column(column, justify="right" if column in ("number", "GB, packed") else "left", overflow="fold")
    for name in one.archives:
        group = ARCHIVES[name]
        last = group.first + group.count - 1
        names = group.names.format(f"{{{group.first}…{last}}}") if group.count > 1 else group.names
        sums = "MD5 published" if group.md5 else "none published"
        table.add_row(names, str(group.count), shown(group.gb), sums)
    return table


def shown(number: Number, form: str = "{:g}", source: bool = True) -> str:
    """The number with its source's letter, or a question mark."""
    if number.value is None:
        return "?"
    text = f"{number.value:,.0f}" if number.value >= 1000 else form.format(number.value)
    return f"{text} {number.source}" if source else text


def needed_gb(one: SplitPlan) -> float | None:
    """Logs and sensors, unpacked; None where no source states one of them."""
    parts = (one.logs_gb.value, one.sensors_gb.value)
    return None if None in parts else float(sum(parts))
