"""Which windows of which logs make a split: NAVSIM's scene filters, split files and train/validation log lists.

A split is either published (a name, a data folder and a filter that NAVSIM ships as YAML) or simply a folder under
`navsim_logs/`, of which all windows at stride 1 with a route count.

Tokens are hexadecimal text, and some look like numbers (`1e7330…`, digits only). They are read as text whatever their
quoting: filters by a line scanner (the navtrain filter has 104 000 lines), split files by YAML without type guessing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from navsim_eval.errors import DataError, UserError
from navsim_eval.files import atomic_write

LOGS_FOLDER = "navsim_logs"
CITY_MANIFEST = "city.json"  # beside `navsim_logs/`: this data root is a synthetic city
OWN_FILTER_FILE = "scene_filter.yaml"  # in a folder of logs: the filter of the split that the folder is
LOG_LIST_FILE = "default_train_val_test_log_split.yaml"
LOG_PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class SceneFilter:
    """What to cut from logs; field names and defaults are those of NAVSIM's scene filter YAML.

    num_history_frames: frames up to and including the current one;  num_future_frames: frames after it
    frame_interval:     stride of window starts; None: windows do not overlap
    has_route:          skip windows whose current frame has no route
    max_scenes:         stop after so many, counted over all logs
    log_names:          keep only these logs;  tokens: keep only windows with these current-frame tokens
    Second-stage (synthetic) fields are those of NAVSIM v2; `all_mapping` is carried along unread.
    """

    num_history_frames: int = 4
    num_future_frames: int = 10
    frame_interval: int | None = None
    has_route: bool = True
    max_scenes: int | None = None
    log_names: tuple[str, ...] | None = None
    tokens: tuple[str, ...] | None = None
    include_synthetic_scenes: bool = False
    synthetic_scene_tokens: tuple[str, ...] | None = None
    reactive_synthetic_initial_tokens: tuple[str, ...] | None = None
    non_reactive_synthetic_initial_tokens: tuple[str, ...] | None = None
    all_mapping: Any = None

    def __post_init__(self) -> None:
        for name, least in (("num_history_frames", 1), ("num_future_frames", 0), ("frame_interval", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"scene filter: {name} is {value}; the least is {least}")
        if self.max_scenes is not None and self.max_scenes < 1:
            raise UserError(f"scene filter: max_scenes is {self.max_scenes}; the least is 1 (null: all)")

    @property
    def num_frames(self) -> int:
        """Length of a window."""
        return self.num_history_frames + self.num_future_frames

    @property
    def stride(self) -> int:
        """Distance of window starts in frames."""
        return self.num_frames if self.frame_interval is None else self.frame_interval

    def window_starts(self, num_log_frames: int) -> range:
        """First frames of all complete windows of a log; gaps in time are not looked at."""
        return range(0, max(num_log_frames - self.num_frames + 1, 0), self.stride)


@dataclass(frozen=True)
class PublishedSplit:
    """A split that NAVSIM publishes, and how much of it there is when everything is downloaded.

    folder: data folder under `navsim_logs/`;  scene_filter: name of the filter file, None: all windows
    logs, tokens, second_stage_tokens: published counts, None where all that the folder holds count
    """

    folder: str
    scene_filter: str | None = None
    logs: int | None = None
    tokens: int | None = None
    second_stage_tokens: int | None = None


PUBLISHED_SPLITS: Mapping[str, PublishedSplit] = {
    "mini": PublishedSplit("mini", logs=64),
    "trainval": PublishedSplit("trainval", logs=1310),
    "test": PublishedSplit("test", logs=147),
    "navmini": PublishedSplit("mini", "navmini", 62, 396),
    "navtrain": PublishedSplit("trainval", "navtrain", 1192, 103288),
    "navtest": PublishedSplit("test", "navtest", 136, 12146),
    "navtest_two_stage": PublishedSplit("test", "navtest_two_stage", 136, 12146),
    "navhard_two_stage": PublishedSplit("test", "navhard_two_stage", 76, 450, 5462),
    "warmup_two_stage": PublishedSplit("test", "warmup_two_stage", 7, 16, 204),
    "navsafe_two_stage": PublishedSplit("test", "navsafe_two_stage", 36, 164, 978),
    "private_test_hard_two_stage": PublishedSplit("private_test_hard", "private_test_hard_two_stage", None, 140, 1732),
    "private_test_e2e": PublishedSplit("private_test_e2e", "private_test_e2e", None, 2000),
    "warmup_test_e2e": PublishedSplit("mini", "warmup_test_e2e", 62, 563),
}


@dataclass(frozen=True)
class Split:
    """A split that can be read: its data folder, its filter, and what is known about its full size.

    second_stage: v2 mapping, (now token, previous token, ((second now, second previous), …)) per group
    """

    name: str
    folder: str
    scene_filter: SceneFilter
    published: PublishedSplit | None = None
    second_stage: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = field(default=(), repr=False)


def find_split(name: str, root: Path | str, filters: Path | str = "") -> Split:
    """The split of that name.

    root:    data root, holds `navsim_logs/`
    filters: folder with NAVSIM's split files (`train_test_split` of a devkit checkout), or empty

    In a synthetic city a split is a folder. Elsewhere a split file in `filters` comes first; then the published splits
    that need no list of tokens (mini, trainval, test: windows do not overlap); then any folder under `navsim_logs/`.
    A folder stands for all its windows at stride 1 that have a route, unless it holds a `scene_filter.yaml` of its own.
    Raises UserError that lists what there is.
    """
    if (Path(root) / CITY_MANIFEST).is_file() and name in _log_folders(Path(root)):
        return Split(name, name, _folder_filter(Path(root), name))
    if filters and not Path(filters).is_dir():
        raise UserError(f"data.filters={filters} is not a folder; it is NAVSIM's config/common/train_test_split")
    published = PUBLISHED_SPLITS.get(name)
    split_file = Path(filters) / f"{name}.yaml"
    if filters and split_file.is_file():
        return _read_split_file(split_file, name)
    if published and published.scene_filter is None:
        return Split(name, published.folder, SceneFilter(), published)
    folders = _log_folders(Path(root))
    if name in folders:
        return Split(name, name, _folder_filter(Path(root), name))
    if published:
        raise UserError(
            f"split '{name}' needs NAVSIM's list of tokens; set data.filters (or $NAVSIM_DEVKIT_ROOT) to the folder "
            f"with {name}.yaml, in a devkit checkout navsim/planning/script/config/common/train_test_split"
        )
    raise UserError(
        f"split '{name}' is unknown; folders under {Path(root) / LOGS_FOLDER}: {', '.join(folders) or 'none'}; "
        f"published splits: {', '.join(PUBLISHED_SPLITS)}"
    )


def _folder_filter(root: Path, name: str) -> SceneFilter:
    own = root / LOGS_FOLDER / name / OWN_FILTER_FILE
    return read_scene_filter(own) if own.is_file() else SceneFilter(frame_interval=1)


def read_scene_filter(path: Path | str) -> SceneFilter:
    """A scene filter YAML file. Missing keys take the defaults; Hydra's own keys are ignored.

    Raises DataError, naming file and line or key, for an unknown key or a value of the wrong type.
    """
    types = {item.name: str(item.type) for item in fields(SceneFilter)}
    values: dict[str, Any] = {}
    for key, value in _scan(Path(path)):
        if key.startswith("_") and key.endswith("_"):
            continue
        if key not in types:
            remedy = f"known keys: {', '.join(types)}"
            raise DataError(path, "unknown key", field=key, remedy=remedy)
        values[key] = _typed(value, types[key], key, path)
    try:
        return SceneFilter(**values)
    except UserError as error:
        raise DataError(path, str(error)) from error


def write_scene_filter(path: Path | str, scene_filter: SceneFilter) -> Path:
    """Write a filter as NAVSIM reads it, tokens and log names quoted, `all_mapping` left out. Returns the path."""
    lines = ["_target_: navsim.common.dataclasses.SceneFilter", "_convert_: 'all'"]
    for item in fields(scene_filter):
        if item.name == "all_mapping":
            continue
        value = getattr(scene_filter, item.name)
        if isinstance(value, tuple):
            lines += [f"{item.name}:" if value else f"{item.name}: []", *(f"  - '{entry}'" for entry in value)]
        else:
            lines.append(f"{item.name}: {'null' if value is None else str(value).lower()}")
    return atomic_write(path, "\n".join(lines) + "\n")


def read_log_lists(path: Path | str) -> dict[str, frozenset[str]]:
    """Log names by part ("train", "val", "test") from NAVSIM's log split file. Raises DataError."""
    lists = dict(_scan(Path(path)))
    parts = {}
    for part in LOG_PARTS:
        names = lists.get(f"{part}_logs")
        if not isinstance(names, list):
            raise DataError(path, "missing, or not a list", field=f"{part}_logs", remedy="restore the file")
        parts[part] = frozenset(names)
    return parts


def logs_of_part(part: str, filters: Path | str) -> frozenset[str]:
    """Logs that NAVSIM's training script uses for "train", "val" or "test". Raises UserError for any other part."""
    if part not in LOG_PARTS:
        raise UserError(f"split part ':{part}' is none of {', '.join(':' + p for p in LOG_PARTS)}")
    path = log_lists_path(filters)
    if not filters or not path.is_file():
        raise UserError(
            f"split part ':{part}' needs NAVSIM's log lists ({LOG_LIST_FILE}); set data.filters (or "
            "$NAVSIM_DEVKIT_ROOT) to the train_test_split folder of a devkit checkout"
        )
    return read_log_lists(path)[part]


def log_lists_path(filters: Path | str) -> Path:
    """Where a devkit checkout keeps the log split file, given its `train_test_split` folder."""
    return Path(filters).parent.parent / "training" / LOG_LIST_FILE


def _log_folders(root: Path) -> list[str]:
    logs = root / LOGS_FOLDER
    if not logs.is_dir():
        raise UserError(
            f"no folder {logs}; set data.root (or $OPENSCENE_DATA_ROOT) to the folder that holds {LOGS_FOLDER}/, "
            "or make a synthetic city with tools/make_city.py"
        )
    return sorted(path.name for path in logs.iterdir() if path.is_dir() and not path.name.startswith("."))


def _read_split_file(path: Path, name: str) -> Split:
    try:
        content = yaml.load(path.read_text(), Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
        defaults = {key: value for entry in content["defaults"] for key, value in dict(entry).items()}
        folder, filter_name = str(content["data_split"]), str(defaults["scene_filter"])
        second_stage = tuple(
            (now, previous, tuple((a, b) for a, b in pairs))
            for now, previous, pairs in content.get("reactive_all_mapping") or ()
        )
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        remedy = "it needs defaults (with scene_filter) and data_split"
        raise DataError(path, f"not a split file ({str(error).splitlines()[0]})", remedy=remedy) from error
    scene_filter = read_scene_filter(path.parent / "scene_filter" / f"{filter_name}.yaml")
    return Split(name, folder, scene_filter, PUBLISHED_SPLITS.get(name), second_stage)


_KEY = re.compile(r"([A-Za-z_]\w*)\s*:(?:\s+(.*))?$")
_QUOTED = re.compile(r"""(['"])(.*?)\1\s*(?:#.*)?$""")


def _scan(path: Path) -> Iterator[tuple[str, str | list[str] | None]]:
    """Top-level keys of a flat YAML file, each with a text, a list of texts, or None for null.

    `all_mapping`, the one key that may nest, is passed over: nothing reads it.
    """
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError as error:
        raise DataError(path, "no such file", remedy="check data.filters (or $NAVSIM_DEVKIT_ROOT)") from error
    key, items = "", None
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if key == "all_mapping" and line[:1] in (" ", "-"):
            continue
        if text.startswith("- ") and key:
            items = items if items is not None else []
            items.append(_plain(text[2:].strip()))
            continue
        if not text or text.startswith("#") or text == "---":
            continue
        match = _KEY.match(text) if line[0] not in " \t" else None
        if match is None:
            raise DataError(path, f"line {number} is neither 'key: value' nor a list entry: {text[:40]!r}")
        if key:
            yield key, items
        key, items = match[1], None
        value = _plain((match[2] or "").strip())
        if value.startswith("[") and value.endswith("]"):
            items = [_plain(part.strip()) for part in value[1:-1].split(",") if part.strip()]
        elif value and value not in ("null", "~"):
            yield key, value
            key = ""
    if key:
        yield key, items


def _plain(text: str) -> str:
    """A YAML scalar as text, without quotes or a trailing comment."""
    if text[:1] in ("'", '"'):
        match = _QUOTED.match(text)
        return match[2] if match else text
    return text if "#" not in text else re.split(r"(?:^|\s)#", text, maxsplit=1)[0].strip()


def _typed(value: str | list[str] | None, kind: str, key: str, path: Path | str) -> Any:
    if value is None or kind == "Any":
        if value is None and "None" not in kind and kind != "Any":
            raise DataError(path, "null where a value is needed", field=key)
        return None if value is None else value
    if kind.startswith("tuple"):
        if isinstance(value, list):
            return tuple(value)
        raise DataError(path, f"'{value}' where a list is expected", field=key)
    if isinstance(value, str):
        if kind == "bool" and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if kind.startswith("int") and re.fullmatch(r"-?\d+", value):
            return int(value)
    wanted = "true or false" if kind == "bool" else "a whole number"
    raise DataError(path, f"{value!r} where {wanted} is expected", field=key)
