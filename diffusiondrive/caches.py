"""The caches of a split: which there are, where they lie, building and checking them.

<output_dir>/<split>/features     features and targets (`diffusiondrive.feature_cache`)
<output_dir>/<split>/pdms_v1      metric caches of a metric version (`navsim_eval.metric_caches`)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from diffusiondrive.feature_cache import PURPOSE as FEATURES
from diffusiondrive.feature_cache import FeatureCacheConfig, RawSamples, build_feature_cache
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import UserError
from navsim_eval.executor import Workers
from navsim_eval.formats.map_store import MapStore
from navsim_eval.shards import BuildReport, Verification, repair, verify

KINDS = ("features", "metrics", "both")
MODES = ("build", "verify", "repair")


@dataclass
class CacheConfig(FeatureCacheConfig):
    """Which caches of which split, and what to do with them.

    kind:    features, metrics or both
    mode:    build (or resume), verify (read everything, compare checksums), repair (drop what is damaged, so that
             the next build makes it again)
    metric:  metric versions whose caches are meant: pdms_v1, epdms_v2
    workers: processes (0: one per core);  executor: local, or ray for several machines;
    ray_address: see `navsim_eval.executor.Workers`
    """

    data: DataConfig = field(default_factory=DataConfig)
    split: str = "train"
    kind: str = "both"
    mode: str = "build"
    metric: list[str] = field(default_factory=lambda: ["pdms_v1"])
    workers: int = 0
    executor: str = "local"
    ray_address: str = ""
    output_dir: str = "outputs/cache"

    def __post_init__(self) -> None:
        super().__post_init__()
        Workers.of(self)
        for key, value, allowed in (("kind", self.kind, KINDS), ("mode", self.mode, MODES)):
            if value not in allowed:
                raise UserError(f"{key}: '{value}' is none of {', '.join(allowed)}")


def cache_folders(config: CacheConfig) -> dict[str, Path]:
    """Folder of each cache that the configuration asks for, by its name: "features" or a metric version."""
    names = [FEATURES] if config.kind != "metrics" else []
    names += config.metric if config.kind != "features" else []
    return {name: Path(config.output_dir) / config.split / name for name in names}


def build_cache(
    name: str, folder: Path, scenes: SceneDataset, config: CacheConfig, progress: Callable[[int], None] | None = None
) -> BuildReport:
    """Build or resume one cache of `cache_folders`; broken scenes are left out, counted and listed in its folder.

    Raises UserError when the folder holds a cache of another configuration, or not a single scene could be cached.
    """
    if name != FEATURES:
        from navsim_eval.metric_caches import MetricCaches  # needs torch: seconds that feature workers do not pay

        return MetricCaches(config.data, scenes, name, folder).build(Workers.of(config), progress)
    maps = MapStore(config.data.maps, config.data.map_version)
    samples = RawSamples(scenes, maps, config.features, config.targets, config.labels)
    return build_feature_cache(folder, samples, config.split, config, workers=Workers.of(config), progress=progress)


def check_caches(config: CacheConfig, progress: Callable[[int], None] | None = None) -> dict[str, Verification]:
    """Verify or repair (by `config.mode`) those of the caches that exist. Raises UserError when there is none."""
    present = {name: folder for name, folder in cache_folders(config).items() if (folder / "manifest.json").exists()}
    if not present:
        folders = ", ".join(str(folder) for folder in cache_folders(config).values())
        raise UserError(
            f"no cache to {config.mode} in {folders}; build one with mode=build, or check output_dir and split"
        )
    action = verify if config.mode == "verify" else repair
    return {name: action(folder, progress) for name, folder in present.items()}
