"""Configuration: Hydra's grammar on the command line, typed dataclasses as the truth.

A tool names a dataclass (its schema) and a YAML file under `configs/`. Groups (`data`, `model`, `trainer`, …) are
small YAML files that fill fields of that dataclass. An unknown key or a value of the wrong type is a `UserError` that
names the key and the nearest valid one.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from navsim_eval.errors import UserError

T = TypeVar("T")
DEFAULT_ROOT = "data/city"  # the synthetic city
CONFIG_ROOT = Path(__file__).resolve().parent.parent / "configs"


@dataclass
class DataConfig:
    """Where the data lies. Defaults come from the environment variables that NAVSIM users export.

    root:  holds `navsim_logs/` and `sensor_blobs/` ($OPENSCENE_DATA_ROOT, else the synthetic city in ./data/city)
    maps:  holds `<location>/<version>/map.gpkg` ($NUPLAN_MAPS_ROOT, else <root>/maps)
    map_version: name of the version file ($NUPLAN_MAP_VERSION)
    filters: folder with NAVSIM scene filter YAML files, for published split names ($NAVSIM_DEVKIT_ROOT's, if set)
    """

    root: str = ""
    maps: str = ""
    map_version: str = ""
    filters: str = ""

    def __post_init__(self) -> None:
        environment = os.environ
        explicit, from_environment = bool(self.root), environment.get("OPENSCENE_DATA_ROOT", "")
        self.root = self.root or from_environment or DEFAULT_ROOT
        beside = str(Path(self.root) / "maps")
        environment_maps = environment.get("NUPLAN_MAPS_ROOT", "")
        if not self.maps:
            own = explicit or not from_environment
            self.maps = beside if own and (Path(beside).is_dir() or not explicit) else environment_maps or beside
        self.map_version = self.map_version or environment.get("NUPLAN_MAP_VERSION", "") or "nuplan-maps-v1.0"
        devkit = environment.get("NAVSIM_DEVKIT_ROOT", "")
        if not self.filters and devkit:
            self.filters = str(Path(devkit) / "navsim/planning/script/config/common/train_test_split")


def load_config(schema: type[T], name: str, overrides: Sequence[str] = (), root: Path = CONFIG_ROOT) -> T:
    """Compose `configs/<name>.yaml` with command-line overrides and fill the dataclass `schema`.

    Raises UserError for an unknown key, group option or ill-typed value, with the nearest valid key.
    """
    GlobalHydra.instance().clear()
    keys = sorted(key_paths(schema))
    listed = groups_in_defaults(root / f"{name}.yaml")
    accepted = [_accept(override, keys, listed, root) for override in overrides]
    try:
        with initialize_config_dir(str(root.resolve()), version_base="1.3"):
            raw = compose(name, overrides=accepted)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"configuration: {_first_line(error)}") from error
    return from_mapping(schema, raw, source=f"configs/{name}.yaml")


def from_mapping(schema: type[T], values: Any, source: str = "configuration") -> T:
    """Fill dataclass `schema` from a mapping; strict about keys and types. Raises UserError."""
    _refuse_unknown(schema, values, source, prefix="")
    try:
        merged = OmegaConf.merge(_structured(schema), values)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{source}: {key or 'value'}: {_first_line(error)}") from error


def key_paths(schema: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of a nested dataclass."""
    hints = get_type_hints(schema)
    for item in fields(schema):
        yield prefix + item.name
        if is_dataclass(hints[item.name]):
            yield from key_paths(hints[item.name], f"{prefix}{item.name}.")


def describe(schema: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, type, default) of every leaf field, for `--help`."""
    rows = []
    hints = get_type_hints(schema)
    for item in fields(schema):
        if is_dataclass(hints[item.name]):
            rows += describe(hints[item.name], f"{prefix}{item.name}.")
            continue
        default = item.default if item.default is not MISSING else None
        if item.default_factory is not MISSING:
            default = item.default_factory()
        kind = hints[item.name]
        shown = re.sub(r"typing\.|<class '|'>", "", str(kind) if not isinstance(kind, type) else kind.__name__)
        rows.append((prefix + item.name, shown, "" if default is None else str(default)))
    return rows


def _structured(schema: type) -> DictConfig:
    """Schema node whose nested dataclasses have not run their `__post_init__` yet (that belongs after the merge)."""
    node = OmegaConf.structured(schema)
    hints = get_type_hints(schema)
    for item in fields(schema):
        if is_dataclass(hints[item.name]) and item.default_factory is hints[item.name]:
            node[item.name] = _structured(hints[item.name])
    return node


def _accept(override: str, keys: Sequence[str], listed: set[str], root: Path) -> str:
    """Check an override's key and mark it for Hydra: schema fields may be set whether or not the YAML mentions them."""
    key = override.lstrip("+~").split("=", 1)[0].split("@")[0]
    if "=" not in override and not override.startswith("~"):
        raise UserError(f"'{override}' is not an override; write key=value, for example data.root=PATH")
    value = override.split("=", 1)[-1]
    if (root / key).is_dir() and (root / key / f"{value}.yaml").is_file():
        return override if key in listed or override[0] in "+~" else f"+{override}"
    if (root / key).is_dir():
        options = sorted(path.stem for path in (root / key).glob("*.yaml"))
        raise UserError(f"{key}={value}: no such option; there are {', '.join(options)}{_nearest(value, options, '')}")
    free = any(key.startswith(f"{parent}.") and _is_mapping(parent, keys) for parent in keys)
    if key not in keys and not free:
        raise UserError(f"unknown key '{key}'{_nearest(key, keys)}")
    return override if override[0] in "+~" else f"++{override}"


def groups_in_defaults(path: Path) -> set[str]:
    """Config groups that a top-level YAML lists under `defaults`."""
    if not path.is_file():
        raise UserError(f"configuration {path} does not exist")
    entries = OmegaConf.to_container(OmegaConf.load(path)).get("defaults", []) if path.stat().st_size else []
    names = [next(iter(entry)) for entry in entries if isinstance(entry, dict)]
    return {str(name).replace("optional ", "").replace("override ", "").lstrip("/").split("@")[0] for name in names}


def _is_mapping(parent: str, keys: Sequence[str]) -> bool:
    """A leaf field (no children in the schema) may be a free mapping; its inner keys are checked by type only."""
    return not any(key.startswith(parent + ".") for key in keys) and parent.endswith("_options")


def _refuse_unknown(schema: type, values: Any, source: str, prefix: str) -> None:
    if values is None:
        return
    hints = get_type_hints(schema)
    names = [item.name for item in fields(schema)]
    for key in values:
        if key not in names:
            valid = [prefix + name for name in names]
            raise UserError(f"{source}: unknown key '{prefix}{key}'{_nearest(prefix + str(key), valid)}")
        if is_dataclass(hints[key]):
            node = values._get_node(key) if isinstance(values, DictConfig) else values[key]
            if node is not None and hasattr(node, "keys"):
                _refuse_unknown(hints[key], node, source, f"{prefix}{key}.")


def _nearest(key: str, keys: Sequence[str], otherwise: str | None = None) -> str:
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not close:
        close = [k for k in keys if k.split(".")[-1] == key.split(".")[-1]][:1]
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; valid keys: {', '.join(keys)}" if otherwise is None else otherwise


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
