"""Scenes of a two-stage split: recorded ones, then the synthetic ones that continue them 4 s later.

    <root>/navsim_logs/<folder>/*.pkl                    first stage (<root>/<split>/openscene_meta_datas if not there)
    <root>/<split>/synthetic_scene_pickles/*.pkl         second stage
    <root>/<split>/sensor_blobs/                         images of the second stage

Which scenes belong together is listed in the split's file (`reactive_all_mapping`), nowhere else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from navsim_eval.config import DataConfig
from navsim_eval.coverage import SplitCoverage
from navsim_eval.dataset import SENSORS_FOLDER, SceneDataset
from navsim_eval.errors import UserError
from navsim_eval.formats.splits import LOGS_FOLDER, Split, find_split
from navsim_eval.formats.synthetic import SyntheticScene, list_synthetic_scenes, read_synthetic_scene
from navsim_eval.metrics.two_stage import Group
from navsim_eval.scene import Scene

SCENES_FOLDER, METAS_FOLDER = "synthetic_scene_pickles", "openscene_meta_datas"


class TwoStageDataset:
    """Both stages of a split behind one another, for whoever plans in, caches or scores scenes one by one.

    first:  the recorded scenes;  groups: which scenes belong together, see `metrics.two_stage`
    Second-stage scenes are known by their initial token. `coverage` accounts for both stages.
    """

    def __init__(self, first: SceneDataset, folder: Path, groups: Sequence[Group], sensor_root: Path | None = None):
        """Index the second stage. Raises UserError where the split has none, DataError for a folder without scenes."""
        if not groups:
            raise UserError(f"split {first.split.name} has no second stage: its file lists no reactive_all_mapping")
        wanted = [token for _, _, pairs in groups for pair in pairs for token in pair]
        found, broken = list_synthetic_scenes(folder, wanted)
        self.first, self.groups = first, tuple(groups)
        self.split: Split = first.split
        self.sensor_root = sensor_root
        self._second = {token: found[token] for token in wanted if token in found}  # token → (file, log)
        self._tokens = (*first.tokens, *sorted(self._second, key=lambda token: (self._second[token][1], token)))
        self.coverage = _coverage(first.coverage, wanted, self._second, broken)

    @classmethod
    def from_config(
        cls, data: DataConfig, split: str, *, tokens: Collection[str] | None = None, progress: bool = False
    ) -> TwoStageDataset:
        """The scenes of a two-stage split.

        tokens: only groups of which at least one scene is among these
        Raises UserError for a split that is unknown, has no second stage, or of which nothing is on disk.
        """
        found = find_split(split, data.root, data.filters)
        groups = found.second_stage
        if not groups:
            raise UserError(f"split {split} has no second stage: its file lists no reactive_all_mapping")
        if tokens is not None:
            kept = set(tokens)
            groups = tuple(group for group in groups if kept & {*group[:2], *(t for pair in group[2] for t in pair)})
            if not groups:
                raise UserError(f"split {split}: none of the scenes belongs to one of its groups")
        listed = tuple(dict.fromkeys(token for now, previous, _ in groups for token in (now, previous)))
        root = Path(data.root)
        first_stage = replace(
            found,
            scene_filter=replace(found.scene_filter, tokens=listed, include_synthetic_scenes=True),
            second_stage=groups,
            published=found.published if tokens is None else None,
        )
        logs, metas = root / LOGS_FOLDER / found.folder, root / split / METAS_FOLDER
        if not any(logs.glob("*.pkl")) and any(metas.glob("*.pkl")):
            logs = metas
        first = SceneDataset(first_stage, logs, root / SENSORS_FOLDER / found.folder, progress=progress)
        return cls(first, root / split / SCENES_FOLDER, groups, root / split / SENSORS_FOLDER)

    @property
    def tokens(self) -> tuple[str, ...]:
        """All scenes: the first stage in its own order, then the second by log and token."""
        return self._tokens

    def is_second_stage(self, token: str) -> bool:
        return token in self._second

    def log_of(self, token: str) -> str:
        """Log that a scene belongs to. Raises UserError for a token that is not in the split."""
        return self._second[token][1] if token in self._second else self.first.log_of(token)

    def source_file(self, token: str) -> Path:
        """File that a scene is read from."""
        return self._second[token][0] if token in self._second else self.first.source_file(token)

    def observed(self, token: str) -> Scene | SyntheticScene:
        """A scene with everything that scoring may know about its future; a recorded one without its sensors."""
        if token in self._second:
            return read_synthetic_scene(self._second[token][0], self.sensor_root)
        return self.first.observed(token)

    def __getitem__(self, token: str) -> Scene:
        """What a planner gets to see. Raises UserError (unknown token) or DataError (broken file)."""
        return self.observed(token).scene if token in self._second else self.first[token]

    def __len__(self) -> int:
        return len(self._tokens)

    def __contains__(self, token: object) -> bool:
        return token in self._second or token in self.first


def _coverage(
    first: SplitCoverage, wanted: Sequence[str], found: Collection[str], broken: Mapping[str, str]
) -> SplitCoverage:
    """The account of the first stage, with the scenes of the second added."""
    expected = None if first.scenes_expected is None else first.scenes_expected + len(wanted)
    return replace(
        first,
        scenes_found=first.scenes_found + len(found),
        logs_broken=(*first.logs_broken, *broken.items()),
        scenes_expected=expected,
        tokens_missing=(*first.tokens_missing, *(token for token in wanted if token not in found)),
    )
