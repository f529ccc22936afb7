"""The metric caches of a split on disk: built once, in parallel, resumable; read by scoring and by privileged planners.

A store is a folder of packed shards (`navsim_eval.shards`), one record a scene: the arrays of
`navsim_eval.pdm.cache.to_arrays` and the sizes of the log and map file that they were made from, so that a store which
outlived its data is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import DataError, UserError
from navsim_eval.executor import Workers
from navsim_eval.formats.map_store import MapStore
from navsim_eval.formats.synthetic import SyntheticScene
from navsim_eval.metrics.aggregate import base_metric
from navsim_eval.pdm.cache import FORMAT_VERSION, build_metric_caches, from_arrays, to_arrays
from navsim_eval.pdm.types import MetricCache
from navsim_eval.shards import BuildReport, ShardReader, build_shards
from navsim_eval.two_stage_dataset import TwoStageDataset

SCENES_TOGETHER = 16  # twice as many are no faster, and a worker that dies loses that much work
_SOURCE = "source_bytes"
DEFLATED = dict.fromkeys((
    "drivable_map.polygons.wkb", "drivable_map.polygons.xy", "drivable_map.ids", "observation.red_light_polygons.wkb",
    "observation.red_light_polygons.xy", "observation.poses", "observation.tokens", "centerline", "history_states",
    "reference_poses", "traffic.points",
), 1)  # fmt: skip


def store_folder(parent: Path | str, metric: str) -> Path:
    """Where the store of a metric lies: `metric_cache=` of every tool names the parent, with one sub-folder a metric.

    Revisions of a metric share a store. Raises UserError where `parent` is itself a store.
    """
    parent, metric = Path(parent), base_metric(metric)
    if (parent / "manifest.json").exists():
        raise UserError(f"metric_cache={parent} is one store; name the folder that holds {metric}/: {parent.parent}")
    return parent / metric


def stored_caches(folder: Path | str) -> Iterator[MetricCache]:
    """All metric caches of a store, without the logs and maps that they were made from; whether those have changed
    since is not asked. Raises DataError for a damaged store."""
    reader = ShardReader(folder, expect={"content": "metric_cache", "cache_version": FORMAT_VERSION})
    for token in reader:
        yield from_arrays({name: array.copy() for name, array in reader[token].items() if name != _SOURCE})


class MetricCaches:
    """Metric caches of one split under one metric version. Picklable: workers reopen the files.

    dataset: recorded scenes, or those of both stages (`TwoStageDataset`);  metric: revisions share their base's caches
    folder: of the store; None, or a folder without a store: every cache is computed when it is asked for
    """

    def __init__(
        self, data: DataConfig, dataset: SceneDataset | TwoStageDataset, metric: str, folder: Path | str | None = None
    ):
        self.dataset, self.metric = dataset, base_metric(metric)
        self.folder = None if folder is None else Path(folder)
        self.maps = MapStore(data.maps, data.map_version)

    def __getitem__(self, token: str) -> MetricCache:
        """Cache of a scene. Raises DataError when it cannot be built, or was built from other files."""
        if not self._stored(token):
            return self._build([token])[0]
        arrays = {name: array.copy() for name, array in self._reader[token].items()}
        if not np.array_equal(arrays.pop(_SOURCE), self._source(token, arrays["map_name"].item())):
            problem = f"scene {token} was cached from another version of its log or map"
            raise DataError(self.folder, problem, remedy="delete this metric cache and run again")
        return from_arrays(arrays)

    def made_together(self, tokens: Sequence[str]) -> dict[str, MetricCache]:
        """Caches of those scenes that the store lacks, by token: one by one takes twice as long. Raises DataError when
        a single one cannot be built."""
        lacking = [token for token in tokens if not self._stored(token)]
        return dict(zip(lacking, self._build(lacking), strict=True)) if lacking else {}

    def arrays(self, tokens: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """What the store keeps of some scenes, computed now."""
        caches = zip(tokens, self._build(tokens), strict=True)
        return [{**to_arrays(cache), _SOURCE: self._source(token, cache.map_name)} for token, cache in caches]

    def build(self, workers: int | Workers = 0, progress: Callable[[int], None] | None = None) -> BuildReport:
        """Fill the store with the scenes that it lacks. A scene that fails is counted and named in the report."""
        self.__dict__.pop("_reader", None)
        report = build_shards(
            self.folder, self.manifest, self.dataset.tokens, self.arrays,
            deflate=DEFLATED, workers=workers, chunk_size=SCENES_TOGETHER, together=True, progress=progress,
        )  # fmt: skip
        self.__dict__.pop("_reader", None)
        return report

    @property
    def manifest(self) -> dict[str, Any]:
        """What distinguishes this store from others."""
        return {
            "content": "metric_cache",
            "cache_version": FORMAT_VERSION,
            "metric": self.metric,
            "split": self.dataset.split.name,
        }

    @cached_property
    def _reader(self) -> ShardReader | None:
        stored = self.folder is not None and (self.folder / "manifest.json").exists()
        return ShardReader(self.folder, expect=self.manifest) if stored else None

    def _stored(self, token: str) -> bool:
        return self._reader is not None and token in self._reader

    def _build(self, tokens: Sequence[str]) -> list[MetricCache]:
        scenes = [self.dataset.observed(token) for token in tokens]
        windows = (scene.scene if isinstance(scene, SyntheticScene) else scene for scene in scenes)
        return build_metric_caches(scenes, [self.maps.get(window.map_name) for window in windows], self.metric)

    def _source(self, token: str, map_name: str) -> np.ndarray:
        """(2,) int64 bytes of the file (log, or second-stage scene) and of the map that a scene comes from."""
        paths = self.dataset.source_file(token), self.maps.path(map_name)
        return np.array([path.stat().st_size for path in paths], np.int64)
